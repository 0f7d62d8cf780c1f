"""Whether a run may go on in a folder: which settings, weights and files have to be the same."""

import difflib
import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from self_rewarding_lm.errors import RunMismatchError, StoreError
from self_rewarding_lm.runs.fingerprint import FREE_SETTINGS, as_named_now
from self_rewarding_lm.runs.run import INITIAL, REPORT, Run, logger
from self_rewarding_lm.runs.stage_folder import (
    LIBRARY,
    StageFiles,
    check_folders,
    check_ours,
    clear,
    read_json,
    remove_stage,
    write_json,
)
from self_rewarding_lm.runs.weights import (
    Savable,
    remove_weights,
    save_folder,
    weights_file,
    weights_hash,
)
from self_rewarding_lm.runtime import Runtime


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
    in_the_way = [
        stage
        for stage in stages
        if stage not in ours and (folder / stage).exists() and any((folder / stage).iterdir())
    ]
    if (old is None or overwrite) and in_the_way:
        raise StoreError(
            f"{folder / in_the_way[0]} holds files, but no run of this library is recorded in "
            f"{folder}. Nothing was changed; choose another checkpoints_folder or move them."
        )
    if old is not None and overwrite:
        for name in old["stages"]:
            remove_stage(folder / name)
        remove_weights(folder / INITIAL)
        (folder / REPORT).unlink(missing_ok=True)
        old = None
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
