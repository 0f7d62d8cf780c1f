"""A context without a trainer, and the checkpoints that an evaluation opens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
from self_rewarding_lm.runs.stage_files import weights_file
from self_rewarding_lm.runs.weights import weights_hash
from self_rewarding_lm.runtime import Runtime, settings_at_work


@dataclass(frozen=True)
class Opening:
    """How models are opened, as the trainer opens its own.

    stage: record ids begin with it. torch_dtype: of models that are loaded; None is float32.
    """

    tokenizer: Tokenizer | None
    chat_template: str | None
    eos_id: int | None
    seed: int
    engine: Engine
    quiet: bool
    stage: str = "evaluate"
    torch_dtype: str | None = None


def open_context(model: nn.Module | str | Path, opening: Opening) -> Context:
    """A model's context; there is no run and no reward prompt in it.

    Device and precision are those of a run that is at work.
    """
    runtime = Runtime(settings_at_work(), quiet=opening.quiet)
    module, own_tokenizer = open_model(model, Loading(opening.torch_dtype))
    if module is not model:  # it was loaded here
        module.to(runtime.device)
    token_model = adapt(module)
    tokens = Tokens(
        opening.tokenizer or own_tokenizer,
        eos_id=opening.eos_id,
        vocab=token_model.vocab,
        chat_template=opening.chat_template,
        end_ids=end_ids_of(module) if opening.eos_id is None else (),
    )
    return Context(
        stage=opening.stage,
        seed=opening.seed,
        model=token_model,
        policy=Policy(token_model),
        engine=opening.engine,
        tokens=tokens,
        runtime=runtime,
        rewards={},
        adapt=adapt,
    )


@contextmanager
def opened(
    source: nn.Module | str | Path, module: nn.Module | None, opening: Opening
) -> Iterator[tuple[Context, str]]:
    """A model's context and the hash of its weights.

    module: takes the weights that `source` names and has its own back afterwards; None if `source`
    is a module or can be loaded by itself. Raises StoreError if `source` names no weights.
    """
    if isinstance(source, nn.Module):
        yield open_context(source, opening), weights_hash(source)
        return
    path = checkpoint(source)
    if module is None:
        ctx = open_context(path, opening)
        yield ctx, weights_hash(ctx.model.module)
        return
    ctx = open_context(module, opening)
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
    """The folder of the weights that "RUN:STAGE" names; any other name is returned unchanged.

    Raises StoreError if the run has no such stage or does not have its weights.
    """
    folder, colon, stage = str(source).rpartition(":")
    if not colon or not (Path(folder) / "run.json").exists():
        return source
    return Run.open(folder).weights(int(stage) - 1 if stage.isdecimal() else stage).parent
