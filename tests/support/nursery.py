"""A process that has imported what takes long, and starts others that need not: by fork.

Each line that it reads orders one: {"argv": [script or "-m" and module, ...], "env": {}, "output":
file}. It answers with the new process's id and, when that has ended, its exit status.
"""

import importlib
import json
import os
import runpy
import sys
import traceback

IMPORTED = (
    *("torch", "torch.distributed.tensor", "torch.distributed.fsdp", "accelerate", "pytest"),
    *("self_rewarding_lm.trainer", "self_rewarding_lm.recipes.reader", "tests.support.models"),
)


def become(order: dict) -> None:
    """Be the process that was ordered; does not return."""
    status = 1
    try:
        os.environ.clear()
        os.environ.update(order["env"])
        nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(order["output"], os.O_WRONLY)
        for descriptor, place in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, place)
        first, *rest = order["argv"]
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, os.path.dirname(first))  # as `python FILE` does
            runpy.run_path(first, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
