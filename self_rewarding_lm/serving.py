"""A context's engine while a stage generates and judges: whose weights it holds, and on which rank.

Knows the server engine; the local one needs none of this, it decodes with the weights themselves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from self_rewarding_lm.adapters import TokenModel
from self_rewarding_lm.context import Context
from self_rewarding_lm.engine import Decoding, Engine, LocalEngine
from self_rewarding_lm.errors import SelfRewardingError
from self_rewarding_lm.server.engine import ServerEngine
from self_rewarding_lm.weights import save_folder

Need = tuple[Decoding, bool]
"""How tokens will be chosen, and whether probabilities of scores will be asked for."""


@contextmanager
def served(ctx: Context, needs: Sequence[Need] = ()) -> Iterator[None]:
    """Around all work with the context's present weights; left before they are trained.

    needs: what will be asked; raised as errors before the work begins, by a server that is started
    for it as soon as it answers. Within another `served` it changes nothing. With several processes
    the main one starts the server, all use it, and it ends when all are through.
    """
    engine, runtime = ctx.engine, ctx.runtime
    shares = isinstance(engine, ServerEngine) and runtime.world > 1 and not engine.is_serving

    def save(folder: Path) -> None:
        save_folder(ctx.model, folder, ctx.tokens.save)

    with engine.serving(save, ctx.tokens):
        check_engine(ctx, needs)
        if shares:
            _share(ctx)
        yield
        if shares:
            runtime.barrier()


def check_engine(ctx: Context, needs: Sequence[Need]) -> None:
    """Raise ConfigError for what the context's engine cannot do, as far as that is known."""
    if isinstance(ctx.engine, ServerEngine):
        for decoding, chances in needs:
            ctx.engine.check(decoding, chances=chances)


def check_before(ctx: Context, needs: Sequence[Need]) -> None:
    """The same before a run: a server that is running already is asked."""

    def save(folder: Path) -> None:
        raise AssertionError("nothing is started before a run")

    if isinstance(ctx.engine, ServerEngine):
        with ctx.engine.serving(save, ctx.tokens):
            check_engine(ctx, needs)


def engine_of(ctx: Context, model: TokenModel) -> Engine:
    """The engine for a model: a server holds the context's alone, so others are worked here."""
    return ctx.engine if model is ctx.model else local_engine(ctx)


def local_engine(ctx: Context) -> Engine:
    """The context's engine, or a local one in place of a server."""
    return LocalEngine() if isinstance(ctx.engine, ServerEngine) else ctx.engine


def _share(ctx: Context) -> None:
    """One server for all processes, started by the main one."""
    engine, runtime, found = ctx.engine, ctx.runtime, None
    assert isinstance(engine, ServerEngine)
    if runtime.is_main:
        try:
            found = engine.address()
        except SelfRewardingError as error:
            found = error
    found = runtime.from_main(found)
    if isinstance(found, SelfRewardingError):
        raise found
    if not runtime.is_main:
        assert found is not None
        engine.join(*found)
