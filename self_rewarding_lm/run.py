"""A run directory as a whole: reading it back, and deciding whether a run may go on in it."""

import difflib
import importlib.metadata
import json
import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from self_rewarding_lm.adapters import load_into
from self_rewarding_lm.errors import RunMismatchError, StoreError
from self_rewarding_lm.events import EVENTS
from self_rewarding_lm.fingerprints import FREE_SETTINGS, as_named_now
from self_rewarding_lm.lines import Picked, read_lines
from self_rewarding_lm.records import (
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
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.store import (
    LIBRARY,
    StageFiles,
    check_folders,
    check_ours,
    clear,
    read_json,
    remove_stage,
    write_json,
)
from self_rewarding_lm.weights import (
    Savable,
    remove_weights,
    save_folder,
    weights_file,
    weights_hash,
)

logger = logging.getLogger(__name__)

INITIAL = "initial"
REPORT = "report.html"


class Run:
    """Reads a run directory. A stage is named by its name, its folder or its place (0, 1, ...).

    Records come as sequences that read a record when it is asked for; `list(...)` takes them all
    into memory. They are those that were on disk when the sequence was made.
    `Run.open(folder)` raises StoreError where the folder holds no run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = read_json(folder / "run.json")
        check_ours(folder, self.info)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        if not (Path(folder) / "run.json").exists():
            raise StoreError(f"{folder} holds no run: there is no run.json in it.")
        return cls(Path(folder))

    def __repr__(self) -> str:
        done = sum(self.is_done(name) for name in self.stages)
        return f"Run({str(self.folder)!r}, {done} of {len(self.stages)} stages done)"

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in order."""
        return [name.split("-", 1)[1] for name in self.info["stages"]]

    def is_done(self, stage: str | int) -> bool:
        return self.stage(stage).is_done

    def prompts(self, stage: str | int) -> Sequence[Prompt]:
        return self.stage(stage).stored(Prompt)

    def candidates(self, stage: str | int) -> Sequence[Candidate]:
        return self.stage(stage).stored(Candidate)

    def judgements(self, stage: str | int) -> Sequence[Judgement]:
        return self.stage(stage).stored(Judgement)

    def meta_judgements(self, stage: str | int) -> Sequence[MetaJudgement]:
        return self.stage(stage).stored(MetaJudgement)

    def pairs(self, stage: str | int) -> Sequence[PreferencePair]:
        """The pairs that the stage trained on; those of its valid_dataset are left out."""
        return self.stage(stage).stored(PreferencePair, is_trained)

    def demonstrations(self, stage: str | int) -> Sequence[Demonstration]:
        return self.stage(stage).stored(Demonstration)

    def training_data(self, stage: str | int) -> Sequence[Demonstration | PreferencePair]:
        """What `from_stage` stands for: the stage's demonstrations, of others their pairs."""
        return self.demonstrations(stage) or self.pairs(stage)

    def reference(self, stage: str | int) -> Sequence[ReferenceLogprobs]:
        return self.stage(stage).stored(ReferenceLogprobs)

    def rows(self, stage: str | int) -> Sequence[TrainingRow]:
        return self.stage(stage).stored(TrainingRow)

    def preference_rows(self, stage: str | int) -> Sequence[dict[str, Any]]:
        """The stage's pairs in the columns that TRL trains on: prompt, chosen, rejected.

        Message lists where a chat template rendered the prompts, else texts where the pairs have
        them, else token ids.
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
        """What done.json holds; empty before the stage is done."""
        stage_dir = self.stage(stage)
        return read_json(stage_dir.path / "done.json") if stage_dir.is_done else {}

    def weights(self, stage: str | int) -> Path:
        """The file of the stage's trained weights (`initial`: those before the first stage).

        StoreError where it is not there, or was changed after it was written.
        """
        initial = stage == INITIAL
        files = StageFiles(self.folder) if initial else self.stage(stage)
        path = files.weights(INITIAL if initial else "model")
        if path is None:
            why = "it is not done, or keep_stages had them deleted"
            raise StoreError(f"the weights of stage {stage!r} are not in {self.folder}: {why}.")
        return path

    def load_weights(self, model: nn.Module, stage: str | int) -> None:
        """Load a stage's trained weights into a model of the same shape, in place."""
        load_into(model, self.weights(stage))

    def stage(self, stage: str | int) -> StageFiles:
        """The stage's folder."""
        folders = self.info["stages"]
        if isinstance(stage, int):
            found = folders[stage] if -len(folders) <= stage < len(folders) else None
        else:
            found = next((f for f in folders if stage in (f, f.split("-", 1)[1])), None)
        if found is None:
            raise StoreError(f"the run has no stage {stage!r}; it has: {', '.join(self.stages)}.")
        return StageFiles(self.folder / found)


def begin_run(
    folder: Path,
    *,
    runtime: Runtime,
    stages: Sequence[str],
    settings: Sequence[dict[str, Any]],
    model: nn.Module,
    seed: int,
    overwrite: bool,
) -> Run:
    """Open `folder` for this run: a new one, or one that goes on.

    Raises RunMismatchError where a started stage had other settings, StoreError where files are in
    the way that this library did not make. `overwrite` removes an earlier run's own files first.
    """
    if runtime.is_main:
        _check_and_write(folder, stages, settings, model, seed, overwrite)
    runtime.barrier()
    return Run(folder)


def save_initial(run: Run, model: Savable, module: nn.Module, runtime: Runtime) -> None:
    """Keep the weights as they are before the first stage, unless they are kept already."""
    if runtime.is_main and weights_file(run.folder / INITIAL) is None:
        if weights_hash(module) != run.info["model"]["hash"]:
            raise StoreError(
                "a stage has init_from='initial', but the weights before the first stage were not "
                "kept and the model has others now. Begin in another checkpoints_folder, or start "
                "anew with overwrite_checkpoints=True."
            )
        save_folder(model, run.folder / INITIAL, listed=True)
    runtime.barrier()


def _check_and_write(
    folder: Path,
    stages: Sequence[str],
    settings: Sequence[dict[str, Any]],
    model: nn.Module,
    seed: int,
    overwrite: bool,
) -> None:
    check_folders(list(stages), folder)
    path = folder / "run.json"
    old = read_json(path) if path.exists() else None
    if old is not None:
        check_ours(folder, old)
    ours = old["stages"] if old is not None else []
    if old is not None and overwrite:
        for name in old["stages"]:
            remove_stage(folder / name)
        remove_weights(folder / INITIAL)
        (folder / REPORT).unlink(missing_ok=True)
        old = None
    in_the_way = [
        stage
        for stage in stages
        if stage not in ours and (folder / stage).exists() and any((folder / stage).iterdir())
    ]
    if old is None and in_the_way:
        raise StoreError(
            f"{folder / in_the_way[0]} holds files, but no run of this library is recorded in "
            f"{folder}. Nothing was changed; choose another checkpoints_folder or move them."
        )
    if old is not None:
        _compare(folder, old, stages, settings)
        for name in (name for name in old["stages"] if StageFiles(folder / name).is_done):
            clear(folder / name)  # a run may have been killed before it did
    folder.mkdir(parents=True, exist_ok=True)
    info = _run_info(stages, model, seed)
    if old is not None:
        info["created"] = old["created"]
        if (folder / stages[0] / "done.json").exists():
            info["model"] = old["model"]  # the weights that count are the last stage's
        else:
            _check_first_weights(folder / stages[0], old["model"], info["model"])
    write_json(path, info)


def _check_first_weights(first: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Responses sampled by other weights than the model's must not be trained on as its own."""
    if before["hash"] == now["hash"] or not (first / "config.json").exists():
        return
    made = [*first.glob("candidates*.jsonl"), *first.glob("reference*.jsonl")]
    words = (
        f"the first stage in {first} was begun with other weights (hash {before['hash']}) than the "
        f"model has now ({now['hash']})"
    )
    if made:
        raise RunMismatchError(
            f"{words}, and holds what those weights gave. Start with the same weights (for a "
            "random model: the same torch.manual_seed; after an interruption: a fresh model), or "
            "call the trainer with overwrite_checkpoints=True."
        )
    logger.warning("%s; it is trained again from those of now.", words)


def _run_info(stages: Sequence[str], model: nn.Module, seed: int) -> dict[str, Any]:
    packages = (
        "self-rewarding-lm",
        "torch",
        "accelerate",
        "x-transformers",
        "numpy",
        "pydantic",
        "safetensors",
    )
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "library": LIBRARY,
        "format": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seed": seed,
        "stages": list(stages),
        "model": {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "hash": weights_hash(model),
        },
        "versions": {"python": platform.python_version(), **versions},
    }


def _compare(
    folder: Path, old: dict[str, Any], stages: Sequence[str], settings: Sequence[dict[str, Any]]
) -> None:
    now = dict(zip(stages, settings, strict=True))
    for name in (n for n in old["stages"] if (folder / n / "config.json").exists()):
        before = as_named_now(_bound(read_json(folder / name / "config.json")))
        after = now.get(name)
        if before == json.loads(json.dumps(after)):
            continue
        difference = (
            f"that stage is not among this run's ({', '.join(stages)})"
            if after is None
            else _difference(before, after)
        )
        raise RunMismatchError(
            f"the run in {folder} has begun stage {name!r} with other settings than now:\n"
            f"{difference}\n"
            "Use the earlier settings to go on; or another checkpoints_folder; or delete the "
            f"folder {folder / name} (and those of later stages) to do it again from there; or "
            "call the trainer with overwrite_checkpoints=True to start anew."
        )


def _bound(value: Any) -> Any:
    """Settings without the free ones, which earlier versions wrote down too."""
    free = FREE_SETTINGS if isinstance(value, dict) else ()
    return {k: _bound(v) for k, v in value.items() if k not in free} if free else value


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    then, now = (json.dumps(v, indent=1, ensure_ascii=False).splitlines() for v in (before, after))
    changed = difflib.unified_diff(then, now, "then", "now", lineterm="", n=0)
    return "\n".join(line for line in changed if not line.startswith("@@"))
