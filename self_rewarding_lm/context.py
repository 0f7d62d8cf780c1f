"""What a stage may reach, and nothing else: weights by name, sampling, the engine.

While a stage generates and judges, its engine holds the weights that the stage asked for, on the
rank that has the rows. The local engine decodes with the model's own weights; a server engine is
given them as files.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from self_rewarding_lm.config import FinetuneConfig, RewardConfig, SamplingConfig
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, SelfRewardingError, StoreError
from self_rewarding_lm.generation.candidates import sample_candidates
from self_rewarding_lm.generation.engine import Decoding, Engine
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.server.engine import ServerEngine
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.records import Candidate, Prompt
from self_rewarding_lm.runs.run import INITIAL, Run
from self_rewarding_lm.runs.weights import save_folder, weights_file
from self_rewarding_lm.runtime import Runtime

START = "start"


@dataclass(frozen=True)
class Context:
    """One stage's view of the trainer.

    stage: the stage's name; record ids begin with it. policy: the prepared module whose
    forward(ids) gives per-token log-probs, holding `model`. rows: the stage's opened datasets by
    field. first_prompt: where the stage begins in its prompts, counted over all passes.
    adapt: the TokenModel of another module (a judge of its own). start: the weights that a stage of
    several rounds began with, kept where its reference asks for them. earlier: names of the stages
    before it.
    """

    stage: str
    seed: int
    model: TokenModel
    policy: nn.Module
    engine: Engine
    tokens: Tokens
    runtime: Runtime
    rewards: Mapping[str, RewardConfig]
    adapt: Callable[[nn.Module], TokenModel]
    rows: Mapping[str, Rows] = field(default_factory=dict)
    first_prompt: int = 0
    run: Run | None = None
    start: Mapping[str, Tensor] | None = None
    earlier: Sequence[str] = ()

    def limit(self, max_seq_len: int | None) -> int | None:
        """Tokens of prompt and response together: the setting, or what the model can take."""
        known = [n for n in (max_seq_len, self.model.max_len) if n is not None]
        return min(known) if known else None

    def rewards_named(self, names: Sequence[str]) -> dict[str, RewardConfig]:
        """Reward prompts by name; ConfigError for a name that the trainer has none of."""
        for name in names:
            if name not in self.rewards:
                raise ConfigError(
                    f"{self.stage}: self_reward_config_keyname {name!r} is none of the trainer's "
                    f"reward prompts: {', '.join(map(repr, self.rewards))}."
                )
        return {name: self.rewards[name] for name in names}

    @contextmanager
    def weights(self, which: str | Path) -> Iterator[None]:
        """Other weights in the one model, and the present ones back afterwards.

        which: "initial", "start" (those that `start` holds), an earlier stage's name, or a path. A
        rehearsal, which comes before all others are there, goes on with the present ones.
        """
        if self.run is None:
            yield
            return
        kept = self.model.state()
        try:
            self.load(which)
            yield
        finally:
            self.model.module.load_state_dict(kept, strict=False)

    def load(self, which: str | Path) -> None:
        """Load weights into the model, in place."""
        if which == START and self.start is not None:
            self.model.module.load_state_dict(dict(self.start), strict=False)
        else:
            self.model.load(self.weights_path(which))

    def weights_path(self, which: str | Path) -> Path:
        """The file of weights that `init_from` or `weights` name."""
        assert self.run is not None
        if which == INITIAL or which in self.run.stages:
            return self.run.weights(str(which))
        path = Path(which)
        found = weights_file(path) if path.is_dir() else path
        if found is None:
            raise StoreError(f"there are no weights in the folder {str(which)!r}.")
        return found


def check_weights_named(stage: FinetuneConfig, name: str, earlier: Sequence[str]) -> None:
    """Raise ConfigError where a stage names weights that there will not be."""
    for used in sorted(stage.weights_used() - {INITIAL, *earlier}):
        if not Path(used).exists():
            fields = ("init_from", "reference", "fit_from", "rejected_from")
            given = next((f for f in fields if str(getattr(stage, f, None)) == used), "weights")
            own = "'previous', " if given == "init_from" else ""
            raise ConfigError(
                f"{name}: {given} must be {own}'initial', the name of an earlier stage "
                f"({', '.join(earlier) or 'there is none'}) or a path; got {used!r}."
            )


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


def rollout(
    ctx: Context,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    num_samples: int,
    *,
    max_seq_len: int | None = None,
    known: Collection[str] = (),
) -> Iterator[Candidate]:
    """`num_samples` candidates of each prompt from the present weights, as they finish.

    known: ids of candidates that are there already. A candidate's noise is a function of (seed, its
    id, position) alone. Where a server refuses a request the candidate has no ids and says the
    reason. Raises Interrupted behind a candidate where a signal asked for it.
    """
    with served(ctx):
        found = sample_candidates(
            ctx.model,
            prompts,
            sampling,
            num_samples,
            engine=ctx.engine,
            tokens=ctx.tokens,
            seed=ctx.seed,
            limit=ctx.limit(max_seq_len),
            known=known,
        )
        yield from ctx.runtime.stopping.between(ctx.runtime.autocasted(found))
