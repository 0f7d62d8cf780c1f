"""One side's round, in a process of its own.

python benchmarks/round_worker.py request.json result.json
"""

import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from round_clock import PhaseClock
from round_request import read_round


def main() -> None:
    asked, result = read_round(Path(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    side = import_module(f"round_{asked.side}")  # its libraries are imported before the clock
    with tempfile.TemporaryDirectory() as name:
        clock = PhaseClock()
        made = side.run(asked, Path(name), clock)
        found = {**clock.report(), **made, "side": asked.side}
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
