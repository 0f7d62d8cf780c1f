"""Whether a run may go on in a folder: which settings, weights and files have to be the same."""

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

from self_rewarding_lm.errors import RunMismatchError, StoreError, other_folder, said, setting
from self_rewarding_lm.runs.fingerprint import FREE_SETTINGS, NEW_RULES, as_named_now
from self_rewarding_lm.runs.run import INITIAL, REPORT, Run
from self_rewarding_lm.runs.stage_files import (
    FORMAT,
    LIBRARY,
    StageFiles,
    check_folders,
    check_ours,
    read_json,
    weights_file,
)
from self_rewarding_lm.runs.stage_folder import clear, remove_stage, write_json
from self_rewarding_lm.runs.weights import Savable, remove_weights, save_folder, weights_hash
from self_rewarding_lm.runtime import Runtime

logger = logging.getLogger(__name__)


PACKAGES = (
    "self-rewarding-lm",
    "torch",
    "accelerate",
    "x-transformers",
    "numpy",
    "pydantic",
    "safetensors",
)
"""Whose versions run.json holds."""


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

    stages: their folders' names, such as 01-sft; settings: the fingerprint of each. overwrite: an
    earlier run's own files are removed first. Raises RunMismatchError if a stage that has started
    had other settings or weights, StoreError if files of others are in the way.
    """
    if runtime.is_main:
        _begin(folder, stages, settings, model, seed, overwrite)
    runtime.barrier()
    return Run(folder)


def check_begun(
    folder: Path, *, runtime: Runtime, stages: Sequence[str], settings: Sequence[dict[str, Any]]
) -> None:
    """Raise what `begin_run` would for a stage that had other settings, before any long work."""
    if runtime.is_main and (earlier := _earlier_run(folder)) is not None:
        _check_settings(folder, earlier, stages, settings)
    runtime.barrier()


def save_initial(run: Run, model: Savable, module: nn.Module, runtime: Runtime) -> None:
    """Keep the weights as they are before the first stage, unless they are kept already."""
    if runtime.is_main and weights_file(run.folder / INITIAL) is None:
        if weights_hash(module) != run.info["model"]["hash"]:
            raise StoreError(
                f"a stage has {setting('init_from', 'initial')}, but the weights before the first "
                "stage were not kept and the model has others now. Begin in "
                f"{other_folder()}, or {_anew()}."
            )
        save_folder(model, run.folder / INITIAL, listed=True)
    runtime.barrier()


def _begin(
    folder: Path,
    stages: Sequence[str],
    settings: Sequence[dict[str, Any]],
    model: nn.Module,
    seed: int,
    overwrite: bool,
) -> None:
    """The decisions of `begin_run`, in the main process."""
    # 1. what is in the folder
    check_folders(list(stages), folder)
    earlier = _earlier_run(folder)
    resumed = None if overwrite else earlier
    info = _run_info(stages, model, seed)

    # 2. may this run go on, or begin, in it
    if resumed is not None:
        _check_settings(folder, resumed, stages, settings)
        _check_first_weights(folder / stages[0], resumed["model"], info["model"])
    else:
        _check_nothing_in_the_way(folder, stages, [] if earlier is None else earlier["stages"])

    # 3. what is removed
    if resumed is not None:
        for name in resumed["stages"]:
            if StageFiles(folder / name).is_done:
                clear(folder / name)  # the run may have been killed before it did
    elif earlier is not None:
        _remove_run(folder, earlier["stages"])

    # 4. what is written
    if resumed is not None:
        info |= {"created": resumed["created"], "format": resumed["format"]}
        if StageFiles(folder / stages[0]).is_done:
            info["model"] = resumed["model"]  # the model now has the weights of a later stage
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", info)


def _earlier_run(folder: Path) -> dict[str, Any] | None:
    """What run.json holds, or None if there is none; StoreError if another program wrote it."""
    path = folder / "run.json"
    if not path.exists():
        return None
    info = read_json(path)
    check_ours(folder, info)
    return info


def _check_nothing_in_the_way(folder: Path, stages: Sequence[str], ours: Sequence[str]) -> None:
    """Raise StoreError if the folder of a stage, none of `ours`, holds files."""
    for stage in stages:
        path = folder / stage
        if stage not in ours and path.exists() and any(path.iterdir()):
            raise StoreError(
                f"{path} holds files, but no run of this library is recorded in "
                f"{folder}: there is no run.json. Nothing was changed; choose {other_folder()}, "
                "move the files, or put run.json back."
            )


def _anew() -> str:
    """How a run is started anew in its folder."""
    return "start anew with " + said("trainer(overwrite_checkpoints=True)", "--overwrite")


def _check_settings(
    folder: Path,
    earlier: dict[str, Any],
    stages: Sequence[str],
    settings: Sequence[dict[str, Any]],
) -> None:
    """Raise RunMismatchError if a stage that has begun had other settings than now.

    earlier: what run.json holds.
    """
    left_out = NEW_RULES if earlier["format"] == 1 else ()
    now = {n: _without(left_out, s) for n, s in zip(stages, settings, strict=True)}
    for name in (name for name in earlier["stages"] if (folder / name / "config.json").exists()):
        before = as_named_now(_without(FREE_SETTINGS, read_json(folder / name / "config.json")))
        after = now.get(name)
        if before == json.loads(json.dumps(after)):
            continue
        difference = (
            f"that stage is not among this run's ({', '.join(stages)})"
            if after is None
            else _difference(before, after)
        )
        raise RunMismatchError(
            f"the run in {folder} began stage {name!r} with settings other than the present ones:\n"
            f"{difference}\n"
            f"Use the earlier settings to continue; or {other_folder()}; or delete the "
            f"folder {folder / name} (and those of later stages) to redo it from there; or "
            f"{_anew()}."
        )


def _check_first_weights(first: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise RunMismatchError if the first stage, not done, holds what other weights gave.

    first: its folder. before, now: what run.json holds of the model. Responses that other weights
    sampled must not be trained on as the model's own.
    """
    has_begun = (first / "config.json").exists() and not StageFiles(first).is_done
    if not has_begun or before["hash"] == now["hash"]:
        return
    words = (
        f"the first stage in {first} began with weights (hash {before['hash']}) other than the "
        f"model's present ones ({now['hash']})"
    )
    if any((*first.glob("candidates*.jsonl"), *first.glob("reference*.jsonl"))):
        raise RunMismatchError(
            f"{words}, and its files come from the former. Start with the same weights (for a "
            "random model: the same torch.manual_seed; after an interruption: a fresh model), or "
            f"{_anew()}."
        )
    logger.warning("%s; it is trained again from the present ones.", words)


def _remove_run(folder: Path, stages: Sequence[str]) -> None:
    """Delete what an earlier run wrote; other files stay."""
    for name in stages:
        remove_stage(folder / name)
    remove_weights(folder / INITIAL)
    (folder / REPORT).unlink(missing_ok=True)


def _run_info(stages: Sequence[str], model: nn.Module, seed: int) -> dict[str, Any]:
    """What run.json holds of a run that begins now."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "library": LIBRARY,
        "format": FORMAT,
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


def _without(names: Sequence[str], value: Any) -> Any:
    """Settings without those of some names, within others too."""
    if not isinstance(value, dict):
        return value
    return {k: _without(names, v) for k, v in value.items() if k not in names}


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The lines of two settings that differ, as a diff."""
    then, now = (json.dumps(v, indent=1, ensure_ascii=False).splitlines() for v in (before, after))
    changed = difflib.unified_diff(then, now, "then", "now", lineterm="", n=0)
    return "\n".join(line for line in changed if not line.startswith("@@"))
