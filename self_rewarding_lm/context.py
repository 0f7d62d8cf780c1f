"""What a stage may reach, and nothing else: weights by name, sampling, the engine.

While a stage samples and judges, its engine has the weights that the stage asked for. The local
engine decodes with the model's own weights; a server engine reads them from files.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from self_rewarding_lm.config import FinetuneConfig, FromStage, RewardConfig, SamplingConfig
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, SelfRewardingError, StoreError
from self_rewarding_lm.generation.candidates import sample_candidates
from self_rewarding_lm.generation.engine import Decoding, Engine
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.server.engine import ServerEngine
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.records import Candidate, Prompt
from self_rewarding_lm.runs.callbacks import Callbacks
from self_rewarding_lm.runs.run import INITIAL, Run, of_another_run
from self_rewarding_lm.runs.stage_files import FORMAT, weights_file
from self_rewarding_lm.runs.weights import save_folder
from self_rewarding_lm.runtime import Runtime

START = "start"


Need = tuple[Decoding, bool]
"""How tokens will be chosen, and whether probabilities of scores will be asked for."""


@dataclass(frozen=True)
class Round:
    """One of a stage's rounds, each of which makes pairs and trains on them.

    number: from 0 on. first_step: optimiser steps that the rounds before have done. weights_gone:
    if the model has not the weights any more with which the round began, for the stage goes on in
    the training of this round or of a later one; then all records of the round must be on disk.
    """

    number: int = 0
    first_step: int = 0
    weights_gone: bool = False

    def check_weights(self) -> None:
        """Before the present weights are asked for a record: StoreError if they are gone."""
        if self.weights_gone:
            raise StoreError(
                "records of a round that was trained are not there any more, and the weights that "
                "made them are gone. Put the files back, or delete state.safetensors in the "
                "stage's folder to train it again from its start."
            )


@dataclass(frozen=True)
class Context:
    """One stage's view of the trainer.

    stage: the stage's name; record ids begin with it. policy: the prepared module whose
    forward(ids) gives per-token log-probs; it holds `model`. adapt: makes the TokenModel of another
    module, such as a judge's. rows: the stage's opened datasets by field. first_prompt: the place
    of the stage's first prompt, counted over all passes. round: which of the stage's rounds this
    is. run: None in a rehearsal. start: the weights that a stage of several rounds began with, if
    its reference asks for them. earlier: names of the stages before it. callbacks: the run's.
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
    round: Round = Round()
    run: Run | None = None
    start: Mapping[str, Tensor] | None = None
    earlier: Sequence[str] = ()
    callbacks: Callbacks = field(default_factory=Callbacks)

    def told(self, method: str, *what: Any) -> None:
        """Call a method of all callbacks with this context; none in a rehearsal."""
        for call in self.callbacks.of(method) if self.run is not None else ():
            call(self, *what)

    @property
    def format(self) -> int:
        """By which rules records are made: those of the run, or the newest if there is none."""
        return FORMAT if self.run is None else self.run.format

    def limit(self, max_seq_len: int | None) -> int | None:
        """Most tokens of prompt and response together, by the setting and by the model; or None."""
        limits = [n for n in (max_seq_len, self.model.max_len) if n is not None]
        return min(limits) if limits else None

    def rewards_named(self, names: Sequence[str]) -> dict[str, RewardConfig]:
        """Reward prompts by name; ConfigError for a name that the trainer has none of."""
        for name in names:
            if name not in self.rewards:
                raise no_reward_prompt(self.stage, name, self.rewards)
        return {name: self.rewards[name] for name in names}

    @contextmanager
    def weights(self, which: str | Path) -> Iterator[None]:
        """Within, the one model has other weights; afterwards it has its present ones again.

        which: "initial", "start" (those that `start` holds), an earlier stage's name, or a path. In
        a rehearsal, when no other weights are there yet, the model keeps its own.
        """
        if self.run is None:
            yield
            return
        present = self.model.state()
        try:
            self.load(which)
            yield
        finally:
            self.model.module.load_state_dict(present, strict=False)

    def load(self, which: str | Path) -> None:
        """Load weights into the model, in place. which: as for `weights`."""
        if which == START and self.start is not None:
            self.model.module.load_state_dict(dict(self.start), strict=False)
        else:
            self.model.load(self.weights_path(which))

    def weights_path(self, which: str | Path) -> Path:
        """The file of weights: those before stage 1, an earlier stage's, or those at a path.

        Raises StoreError if there are none.
        """
        assert self.run is not None
        if which == INITIAL or which in self.run.stages:
            return self.run.weights(str(which))
        path = Path(which)
        file = weights_file(path) if path.is_dir() else path
        if file is None:
            raise StoreError(f"there are no weights in the folder {str(which)!r}.")
        return file

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        num_samples: int,
        *,
        max_seq_len: int | None = None,
        known: Collection[str] = (),
        logprobs: bool = False,
    ) -> Iterator[Candidate]:
        """`num_samples` candidates of each prompt from the present weights, as they finish.

        known: ids of candidates that are not sampled again. A candidate's noise is a function of
        (seed, its id, position) alone. logprobs: as for `sample_candidates`. If a server refuses a
        request, the candidate has no ids and its `reason` says why. Raises Interrupted after a
        candidate if a signal asked for it.
        """
        with self.serving():
            candidates = sample_candidates(
                self.model,
                prompts,
                sampling,
                num_samples,
                engine=self.engine,
                tokens=self.tokens,
                seed=self.seed,
                limit=self.limit(max_seq_len),
                known=known,
                logprobs=logprobs,
            )
            yield from self.runtime.stopping.between(self.runtime.autocasted(candidates))

    @contextmanager
    def serving(self, needs: Sequence[Need] = ()) -> Iterator[None]:
        """Around all work with the present weights; left before they are trained.

        needs: what the engine will be asked for. Raises ConfigError before the work begins if it
        cannot do one of them; a server that is started for the work is asked as soon as it answers.
        Within another `serving` nothing changes. With several processes the main one starts the
        server, all use it, and it ends when all are through.
        """
        engine, runtime = self.engine, self.runtime
        shares = isinstance(engine, ServerEngine) and runtime.world > 1 and not engine.is_serving

        def save(folder: Path) -> None:
            save_folder(self.model, folder, self.tokens.save)

        with engine.serving(save, self.tokens):
            self._check_engine(needs)
            if shares:
                self._join_main_server()
            yield
            if shares and isinstance(engine, ServerEngine):
                runtime.barrier()  # all are through
                engine.rest()
                runtime.barrier()  # before weights come back to where the server was

    def check_needs(self, needs: Sequence[Need]) -> None:
        """Before a run: raise ConfigError for what a server that is running already cannot do."""

        def save(folder: Path) -> None:
            raise AssertionError("nothing is started before a run")

        if isinstance(self.engine, ServerEngine):
            with self.engine.serving(save, self.tokens):
                self._check_engine(needs)

    def engine_of(self, model: TokenModel) -> Engine:
        """The engine for a model: a server holds the context's own, others run in this process."""
        return self.engine if model is self.model else self.local_engine()

    def local_engine(self) -> Engine:
        """The context's engine, or a local one in place of a server."""
        return LocalEngine() if isinstance(self.engine, ServerEngine) else self.engine

    def _check_engine(self, needs: Sequence[Need]) -> None:
        if isinstance(self.engine, ServerEngine):
            for decoding, chances in needs:
                self.engine.check(decoding, chances=chances)

    def _join_main_server(self) -> None:
        """All processes use the server that the main one starts; all raise its error."""
        engine, runtime, address = self.engine, self.runtime, None
        assert isinstance(engine, ServerEngine)
        if not runtime.is_main:
            engine.make_room(self.model)
        runtime.barrier()
        if runtime.is_main:
            try:
                address = engine.address(self.model)
            except SelfRewardingError as error:
                address = error
        address = runtime.from_main(address)
        if isinstance(address, SelfRewardingError):
            raise address
        if not runtime.is_main:
            assert address is not None
            engine.join(*address)


def wrong_names(stage: FinetuneConfig, name: str, earlier: Sequence[str]) -> Iterator[ConfigError]:
    """An error for each setting that names weights or records which no earlier stage makes.

    name: the stage's name. earlier: the names of the stages before it.
    """
    for used in sorted(stage.weights_used() - {INITIAL, *earlier}):
        if not Path(used).exists():
            fields = ("init_from", "reference", "fit_from", "rejected_from")
            field = next((f for f in fields if str(getattr(stage, f, None)) == used), "weights")
            previous = "'previous', " if field == "init_from" else ""
            yield ConfigError(
                f"{name}: {field} must be {previous}'initial', the name of an earlier stage "
                f"({', '.join(earlier) or 'there is none'}) or a path; got {used!r}.",
                path=(field,),
            )
    source = getattr(stage, "candidates_from", None)
    if source is not None and not of_another_run(source) and source not in earlier:
        yield ConfigError(
            f"{name}: candidates_from must be the name of an earlier stage "
            f"({', '.join(earlier) or 'there is none'}), or FOLDER:STAGE of another run; got "
            f"{source!r}.",
            path=("candidates_from",),
        )
    for field, dataset in stage.datasets().items():
        for place, item in enumerate(dataset if isinstance(dataset, list) else [dataset]):
            if isinstance(item, FromStage) and item.stage not in earlier:
                yield ConfigError(
                    f"{name}: from_stage({item.stage!r}) must name an earlier stage; before it "
                    f"come: {', '.join(earlier) or 'none'}.",
                    path=(field, *((place,) if isinstance(dataset, list) else ()), "from_stage"),
                )


def no_reward_prompt(stage: str, name: str, rewards: Iterable[str]) -> ConfigError:
    """The error of a stage that judges by a reward prompt whose name is none of `rewards`."""
    return ConfigError(
        f"{stage}: self_reward_config_keyname {name!r} is not one of the reward prompts: "
        f"{', '.join(map(repr, rewards))}.",
        path=("self_reward_config_keyname",),
    )
