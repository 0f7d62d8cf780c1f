"""What an evaluation needs in place of a run: a context of its own, and checkpoints to open."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from self_rewarding_lm.context import Context
from self_rewarding_lm.data.tokenizers import Tokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.generation.engine import Engine
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.loading import Loading, end_ids_of, open_model
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.runs.weights import weights_file, weights_hash
from self_rewarding_lm.runtime import Runtime


def open_context(
    model: nn.Module | str | Path,
    tokenizer: Tokenizer | None,
    *,
    chat_template: str | None,
    eos_id: int | None,
    seed: int,
    engine: Engine,
    quiet: bool,
    stage: str = "evaluate",
) -> Context:
    """What a judge may reach where there is no trainer. stage: ids of its records begin so."""
    runtime = _runtime(quiet)
    module, own = open_model(model, Loading())
    if module is not model:  # it was loaded here
        module.to(runtime.device)
    token_model = adapt(module)
    tokens = Tokens(
        tokenizer or own,
        eos_id=eos_id,
        vocab=token_model.vocab,
        chat_template=chat_template,
        end_ids=end_ids_of(module) if eos_id is None else (),
    )
    return Context(
        stage=stage,
        seed=seed,
        model=token_model,
        policy=Policy(token_model),
        engine=engine,
        tokens=tokens,
        runtime=runtime,
        rewards={},
        adapt=adapt,
    )


def _runtime(quiet: bool) -> Runtime:
    """A runtime of its own; how much a trainer around it logs stays as it was."""
    logger = logging.getLogger("self_rewarding_lm")
    level = logger.level
    runtime = Runtime({}, quiet=quiet)
    logger.setLevel(level)
    return runtime


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
