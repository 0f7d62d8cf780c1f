"""What a stage may reach, and nothing else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from self_rewarding_lm.adapters import TokenModel
from self_rewarding_lm.config import FinetuneConfig, RewardConfig
from self_rewarding_lm.datasets import Rows
from self_rewarding_lm.engine import Engine
from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.run import INITIAL, Run
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.tokens import Tokens
from self_rewarding_lm.weights import weights_file

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
