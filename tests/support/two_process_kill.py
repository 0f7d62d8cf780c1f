"""What each of two processes runs until one of them, or both, are killed at a moment of writing."""

import os
import sys

from tests.runs.test_kill import Faults, kill, stages
from tests.test_trainer import model64, trainer_of


def main(folder: str, who: str, place: str) -> None:
    """who: the rank to be killed, "both" or "nobody". place: which of its moments."""
    run = trainer_of(folder, stages(), model64(), accelerate_kwargs=dict(cpu=True), keep_stages=2)
    at = int(place) if who in (os.environ["RANK"], "both") else None
    with Faults(at, "after", kill).watching():
        run(rehearse=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
