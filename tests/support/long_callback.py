"""A run whose callback takes minutes, in one process or several; each tells its number in a file."""

import os
import sys
import time
from pathlib import Path

from self_rewarding_lm import SamplingConfig, generate
from tests.test_trainer import model64, sft, trainer_of

SECONDS = 300


class Sleeping:
    """Called on the main process when the stage is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_stage_end(self, run, stage, model) -> None:
        (self.folder / "begun").touch()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            self.work(model)

    def work(self, model) -> None:
        time.sleep(SECONDS)


class Generating(Sleeping):
    def work(self, model) -> None:
        sampling = SamplingConfig(max_new_tokens=50, temperature=1.0)
        generate(model, [[1, 2, 3]] * 8, sampling=sampling)


class OnAll(Sleeping):
    """Called on all processes, when the stage's weights are on disk and it is not yet done."""

    def check(self, ctx) -> None:
        pass

    def on_stage_trained(self, ctx, out) -> None:
        self.on_stage_end(None, ctx.stage, ctx.model.module)


KINDS = {"sleep": Sleeping, "generate": Generating, "all": OnAll}


def main(kind: str, folder: str) -> None:
    where = Path(folder)
    (where / f"pid-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    callback = KINDS[kind](where)
    options = dict(accelerate_kwargs=dict(cpu=True), callbacks=[callback])
    trainer_of(where / "run", [sft()], model64(), **options)(rehearse=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
