"""The flags that say how a model judges, shared by `judge` and `compare`, as what they name."""

import argparse
from pathlib import Path
from typing import Any

from self_rewarding_lm.cli.stages import named_model
from self_rewarding_lm.errors import ConfigError

REWARD = "RewardConfig: a YAML file of its settings, `paper`, `short` or module:attribute"


def add_judging_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the judge, of sampling and of what is printed."""
    parser.add_argument("--reward", metavar="PROMPT", help=REWARD)
    parser.add_argument("--pairwise", action="store_true", help="show two, in both orders")
    parser.add_argument(
        "--score",
        choices=("sampled", "expected"),
        help="read what the judge wrote, or average all scores by their probabilities",
    )
    parser.add_argument(
        "--at-once", action="store_true", help="ask for the score alone, without a review"
    )
    parser.add_argument("--judgements", type=int, default=1, metavar="N", help="averaged (1)")
    parser.add_argument("--judging", metavar="YAML", help="as '{temperature: 0}'")
    parser.add_argument("--tokenizer", metavar="T", help="default: the model's own")
    parser.add_argument("--chat-template", metavar="NAME", help="default: the tokenizer's own")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (0)")
    parser.add_argument("--json", action="store_true", help="all numbers as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")


class Flags:
    """Values of flags as what they name; raises ConfigError if one names nothing."""

    def __init__(self, options: argparse.Namespace) -> None:
        from self_rewarding_lm.recipes.reader import Reader

        self.options, self.reader = options, Reader()

    def read(self, flag: str, kind: str) -> Any:
        """The model, tokenizer, object or dataset that a flag names; None if it is not given.

        A model may be RUN[:STAGE] as well.
        """
        from self_rewarding_lm.evaluation.contexts import checkpoint
        from self_rewarding_lm.recipes.yaml_nodes import Node, parse_yaml

        value = getattr(self.options, flag.lstrip("-").replace("-", "_"))
        if value is None:
            return None
        if kind == "model":
            value = str(checkpoint(named_model(value)))
        node = Node(value, flag, Path.cwd())
        if kind == "dataset" and value[:1] in ("{", "["):
            node = parse_yaml(value, flag, Path.cwd(), lines=False)
        named = getattr(self.reader, kind)(node, ())
        self._raise_problems()
        if kind == "model" and not isinstance(named, str) and not hasattr(named, "forward"):
            return named()  # type: ignore[operator]
        return named

    def settings(self, flag: str, cls: Any) -> Any:
        """A flag's YAML as settings of a class; None if it is not given."""
        from self_rewarding_lm.recipes.yaml_nodes import parse_yaml

        text = getattr(self.options, flag.lstrip("-"))
        if text is None:
            return None
        settings = self.reader.settings(cls, parse_yaml(text, flag, Path.cwd(), lines=False), ())
        self._raise_problems()
        return settings

    @property
    def ways(self) -> dict[str, Any]:
        """The settings of --score and --at-once; empty if neither is given."""
        ways: dict[str, Any] = {}
        if self.options.score is not None:
            ways["score_mode"] = self.options.score
        if self.options.at_once:
            ways["forced_ending"] = "at_once"
        return ways

    def comparison(self) -> Any:
        """The prompt of --pairwise."""
        from self_rewarding_lm.config import ComparisonConfig

        return ComparisonConfig(**self.ways)

    def reward(self) -> Any:
        """The reward prompt of --reward, scored as --score and --at-once say; None if no flag says
        anything of it."""
        from self_rewarding_lm.config import DEFAULT_REWARD_CONFIG

        named = self._named_reward()
        if not self.ways:
            return named
        return (named or DEFAULT_REWARD_CONFIG).model_copy(update=self.ways)

    def _named_reward(self) -> Any:
        """The reward prompt of --reward, or None."""
        from self_rewarding_lm.recipes.reader import OBJECT_NAME
        from self_rewarding_lm.recipes.settings import RUBRICS
        from self_rewarding_lm.recipes.yaml_nodes import read_yaml

        name = self.options.reward
        if name is None:
            return None
        if name in RUBRICS:
            return RUBRICS[name]
        if OBJECT_NAME.fullmatch(name) and not Path(name).exists():
            return self.read("--reward", "object")
        reward = self.reader.reward(read_yaml(Path(name)), ())
        self._raise_problems()
        return reward

    def _raise_problems(self) -> None:
        if self.reader.problems:
            raise ConfigError("\n".join(self.reader.problems))


def loaded_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer that a name stands for is loaded."""
    from self_rewarding_lm.models.loading import load_tokenizer

    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
