"""Models by name for a while: a module, a folder, a hub name, or a stage of a run.

Knows nothing of what is done with them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.evaluate import open_context
from self_rewarding_lm.run import Run
from self_rewarding_lm.tokens import Tokenizer
from self_rewarding_lm.weights import weights_file, weights_hash


@contextmanager
def opened(
    source: nn.Module | str | Path,
    module: nn.Module | None,
    tokenizer: Tokenizer | None,
    **options: Any,
) -> Iterator[tuple[Context, str]]:
    """A model's context and the hash of its weights; `module` is afterwards as before."""
    if isinstance(source, nn.Module):
        yield open_context(source, tokenizer, **options), weights_hash(source)
        return
    path = checkpoint(source)
    if module is None:
        ctx = open_context(path, tokenizer, **options)
        yield ctx, weights_hash(ctx.model.module)
        return
    ctx = open_context(module, tokenizer, **options)
    file = weights_file(Path(path)) if Path(path).is_dir() else Path(path)
    if file is None or not file.is_file():
        raise StoreError(f"{str(source)!r} names no weights: no file of them is at {path}.")
    kept = ctx.model.state()
    try:
        ctx.model.load(file)
        yield ctx, weights_hash(module)
    finally:
        module.load_state_dict(kept, strict=False)


def checkpoint(source: str | Path) -> str | Path:
    """The folder of the weights that "RUN:STAGE" names; any other name as it is.

    Raises StoreError where the run has no such stage, or not its weights.
    """
    folder, colon, stage = str(source).rpartition(":")
    if not colon or not (Path(folder) / "run.json").exists():
        return source
    return Run.open(folder).weights(int(stage) - 1 if stage.isdecimal() else stage).parent
