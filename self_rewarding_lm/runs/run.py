"""A run directory as a whole, read back."""

import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.records import (
    Advantage,
    Candidate,
    Demonstration,
    Judgement,
    MetaJudgement,
    PreferencePair,
    Prompt,
    ReferenceLogprobs,
    TrainingRow,
    columns_of,
    is_trained,
)
from self_rewarding_lm.runs.atomic import ledger
from self_rewarding_lm.runs.lines import Picked, read_lines
from self_rewarding_lm.runs.stage_files import DONE, EVENTS, StageFiles, check_ours, read_json
from self_rewarding_lm.text import amount, html_table

logger = logging.getLogger(__name__)


INITIAL = "initial"  # weights before the first stage


REPORT = "report.html"


NUMBERS = ("pairs", "steps")  # that a notebook shows of each stage


COUNTS = ("steps", "next_prompt")
"""Of done.json, those with which later stages go on."""


_AGAIN = (
    "Put the right file back; or delete the stage's folder (and those of later stages) to have "
    "all of it made again."
)


def of_another_run(which: str) -> bool:
    """Whether a name is that of a stage in another run: FOLDER:STAGE."""
    return ":" in which


class Run:
    """Reads a run directory. A stage is named by its name, its folder or its place (0, 1, ...).

    Records are sequences that read a record from disk when it is accessed; `list(...)` reads all
    into memory. They are those that were on disk when the sequence was made. `Run.open(folder)`
    raises StoreError if the folder holds no run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = read_json(folder / "run.json")
        check_ours(folder, self.info)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """The run in a folder. Raises StoreError if the folder holds none."""
        if not (Path(folder) / "run.json").exists():
            raise StoreError(f"{folder} holds no run: there is no run.json in it.")
        return cls(Path(folder))

    def __repr__(self) -> str:
        done = sum(self.is_done(name) for name in self.stages)
        return f"Run({str(self.folder)!r}, {done} of {amount(len(self.stages), 'stage')} done)"

    def _repr_html_(self) -> str:
        """The stages as a table."""
        rows = [
            [name, "done" if self.is_done(name) else "not done"]
            + [self.summary(name).get(number) for number in NUMBERS]
            for name in self.stages
        ]
        return html_table(["stage", "", *NUMBERS], rows, str(self.folder))

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in order."""
        return [name.split("-", 1)[1] for name in self.info["stages"]]

    @property
    def format(self) -> int:
        """The version of the rules by which records are made: 1 if 0.1.0 began the run, else 2."""
        return self.info["format"]

    @property
    def begun(self) -> datetime:
        """When the run began; templates that ask for the date get this one, also when resumed."""
        return datetime.strptime(self.info["created"], "%Y-%m-%dT%H:%M:%S%z")

    def is_done(self, stage: str | int) -> bool:
        """Whether the stage is finished."""
        return self.stage(stage).is_done

    def prompts(self, stage: str | int) -> Sequence[Prompt]:
        """The prompts that the stage has used."""
        return self.stage(stage).stored(Prompt)

    def candidates(self, stage: str | int) -> Sequence[Candidate]:
        """The responses that the stage sampled, or took from another stage."""
        return self.stage(stage).stored(Candidate)

    def judgements(self, stage: str | int) -> Sequence[Judgement]:
        """The judgements of the stage's candidates."""
        return self.stage(stage).stored(Judgement)

    def meta_judgements(self, stage: str | int) -> Sequence[MetaJudgement]:
        """The comparisons of two judgements (MetaRewardDPOConfig)."""
        return self.stage(stage).stored(MetaJudgement)

    def pairs(self, stage: str | int) -> Sequence[PreferencePair]:
        """The pairs that the stage trained on, without those of its valid_dataset."""
        return self.stage(stage).stored(PreferencePair, is_trained)

    def advantages(self, stage: str | int) -> Sequence[Advantage]:
        """The responses that the stage trained on without pairs, each with its advantage."""
        return self.stage(stage).stored(Advantage)

    def demonstrations(self, stage: str | int) -> Sequence[Demonstration]:
        """The responses that the stage made for supervised training (EFT, SelfRewardSFTConfig)."""
        return self.stage(stage).stored(Demonstration)

    def training_data(self, stage: str | int) -> Sequence[Demonstration | PreferencePair]:
        """What `from_stage` reads: the stage's demonstrations, or its pairs if it has none."""
        return self.demonstrations(stage) or self.pairs(stage)

    def reference(self, stage: str | int) -> Sequence[ReferenceLogprobs]:
        """The log-probs of the stage's pairs under its reference."""
        return self.stage(stage).stored(ReferenceLogprobs)

    def rows(self, stage: str | int) -> Sequence[TrainingRow]:
        """The rows that a supervised stage trained on, as token ids."""
        return self.stage(stage).stored(TrainingRow)

    def preference_rows(self, stage: str | int) -> Sequence[dict[str, Any]]:
        """The stage's pairs in the columns that TRL trains on: prompt, chosen, rejected.

        Message lists if a chat template rendered the prompts, else texts if the pairs have them,
        else token ids.
        """
        return Picked(self.pairs(stage), change=columns_of)

    def metrics(self, stage: str | int) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return list(read_lines(self.stage(stage).path / "metrics.jsonl"))

    def events(self, stage: str | int) -> list[dict[str, Any]]:
        """The lines of events.jsonl: when the stage began, trained and ended; its warnings."""
        return list(read_lines(self.stage(stage).path / EVENTS))

    def settings(self, stage: str | int) -> dict[str, Any]:
        """What config.json holds; empty before the stage began."""
        path = self.stage(stage).path / "config.json"
        return read_json(path) if path.exists() else {}

    def summary(self, stage: str | int) -> dict[str, Any]:
        """What done.json holds; empty before the stage is done. StoreError if it was changed."""
        files = self.stage(stage)
        if not files.is_done:
            return {}
        path = files.path / DONE
        summary = read_json(path)
        for name in COUNTS:
            count = summary.get(name, 0)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise StoreError(f"{path}: {name} counts from 0 on; got {count!r}. {_AGAIN}")
        return summary

    def next_prompt(self, stage: str | int, rows: int, *, skips: bool) -> int:
        """Where a stage stopped in its prompts, counted over all passes.

        rows: of the prompt dataset. skips: whether bad rows are left out, also at the end. Version
        0.1.0 wrote no digest of done.json; what it says is then compared with the stage's prompts.
        """
        files, place = self.stage(stage), self.summary(stage).get("next_prompt", 0)
        if DONE in ledger(files.path):
            return place
        ids = (record_id.split("/")[1:] for record_id in files.stored(Prompt).ids())
        worked = (int(parts[1]) * rows + int(parts[0]) for parts in ids if len(parts) == 2)
        least = max(worked, default=-1) + 1
        if place < least or (place > least and not skips):
            raise StoreError(
                f"{files.path / DONE}: next_prompt is {place}, and the stage's prompts end before "
                f"{least}. {_AGAIN}"
            )
        return place

    def weights(self, stage: str | int) -> Path:
        """The file of the stage's trained weights (`initial`: those before the first stage).

        Raises StoreError if it is not there, or was changed after it was written.
        """
        initial = stage == INITIAL
        files = StageFiles(self.folder) if initial else self.stage(stage)
        path = files.weights(INITIAL if initial else "model")
        if path is None:
            why = "it is not done, or keep_stages deleted them"
            raise StoreError(f"the weights of stage {stage!r} are not in {self.folder}: {why}.")
        return path

    def load_weights(self, model: Any, stage: str | int) -> None:
        """Load a stage's trained weights into a model (a torch module) of the same shape, in place.

        All else that a run is asked for needs no torch, which takes seconds to import.
        """
        from self_rewarding_lm.runs.pretrained import load_into

        load_into(model, self.weights(stage))

    def stage(self, stage: str | int) -> StageFiles:
        """The stage's folder."""
        folders = self.info["stages"]
        if isinstance(stage, int):
            folder = folders[stage] if -len(folders) <= stage < len(folders) else None
        else:
            folder = next((f for f in folders if stage in (f, f.split("-", 1)[1])), None)
        if folder is None:
            raise StoreError(f"the run has no stage {stage!r}; it has: {', '.join(self.stages)}.")
        return StageFiles(self.folder / folder)
