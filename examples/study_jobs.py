"""What a job of the study is: one setting with one seed, in a folder of its own. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

M1 = "M1"
"""The job that trains the model from which all settings go on."""


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    stages: from the task's Lab, which has what the settings of a seed share. after: the job whose
    models or records it goes on with.
    """

    name: str
    words: str
    stages: Callable[[Any], list[Any]]
    after: str = M1


@dataclass(frozen=True)
class Job:
    """A setting (or M1) with a seed. model: a folder or a GGUF file, for tasks that take one."""

    name: str
    seed: int
    out: Path
    task: str
    sft_steps: int
    model: str | None = None

    @property
    def result(self) -> Path:
        """The file that is there when the job is done."""
        return self.out / f"{self.name}-{self.seed}.json"

    def folder(self, name: str | None = None) -> Path:
        """The run directory of this job, or of another one of its seed."""
        return self.out / "runs" / f"{name or self.name}-{self.seed}"
