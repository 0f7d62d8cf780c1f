"""The commands that measure: `judge`, a judge against people, and `compare`, two models.

Reads flags, calls the library and prints tables.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from self_rewarding_lm.errors import ConfigError

JUDGE_DESCRIPTION = """\
How well a model judges replies that people ranked:

  self-rewarding-lm judge --model M --ranked ranked.jsonl
  self-rewarding-lm judge --model M --ranked trees.jsonl.gz --reward paper --judgements 3

Ranked rows are Open Assistant trees, {prompt, chosen, rejected}, {prompt, replies}, {input,
output_1, output_2, label}, or module:attribute. Intervals are 95 %, resampling whole trees or
prompts; they say nothing of models that lie inside them.
"""


COMPARE_DESCRIPTION = """\
Which of two models answers held-out prompts better, by a judge that is neither:

  self-rewarding-lm compare run:sft run:self_reward-2 --prompts held_out.jsonl --judge-model J
  self-rewarding-lm compare run:1 run:3 --prompts reasoning-gym:chain_sum --samples 8

A model is RUN:STAGE (a name, or a number from 1), a folder or a name on the hub; for others than
Hugging Face models give the module with --module. A judge that compares sees both orders; where
these disagree it is a tie. Tasks of reasoning-gym bring a verifier.
"""


REWARD = "RewardConfig: a YAML file of its settings, `paper`, `short` or module:attribute"


def add_evaluating(commands: Any, added: Any) -> None:
    """Add both commands. added: makes a subcommand with its function."""
    words = "measure a judge on replies that people ranked"
    judge = added(commands, "judge", _judge, words, JUDGE_DESCRIPTION)
    judge.add_argument("--model", required=True, metavar="M", help="who judges")
    judge.add_argument("--ranked", required=True, metavar="DATA", help="replies ranked by people")
    _add_judging(judge)
    words = "compare two models on held-out prompts"
    compare = added(commands, "compare", _compare, words, COMPARE_DESCRIPTION)
    compare.add_argument("first", metavar="FIRST", help="RUN:STAGE, a folder or a name on the hub")
    compare.add_argument("second", metavar="SECOND", help="the other model")
    compare.add_argument("--prompts", required=True, metavar="DATA", help="or reasoning-gym:NAME")
    compare.add_argument("--judge-model", metavar="M", help="who judges, as --model of `judge`")
    compare.add_argument("--judge", metavar="OBJECT", help="module:attribute of another judge")
    _add_judging(compare)
    compare.add_argument("--module", metavar="OBJECT", help="module:attribute; takes the weights")
    compare.add_argument("--verifier", metavar="OBJECT", help="module:attribute of a function")
    compare.add_argument("--sampling", metavar="YAML", help="as '{max_new_tokens: 512}'")
    compare.add_argument("--samples", type=int, default=1, metavar="N", help="for each prompt (1)")
    compare.add_argument("--size", type=int, default=100, metavar="N", help="of a reasoning task")
    compare.add_argument("--out", metavar="FOLDER", help="keep what is sampled and judged")


def _add_judging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reward", metavar="PROMPT", help=REWARD)
    parser.add_argument("--pairwise", action="store_true", help="show two, in both orders")
    parser.add_argument("--judgements", type=int, default=1, metavar="N", help="averaged (1)")
    parser.add_argument("--judging", metavar="YAML", help="as '{temperature: 0}'")
    parser.add_argument("--tokenizer", metavar="T", help="default: the model's own")
    parser.add_argument("--chat-template", metavar="NAME", help="default: the tokenizer's own")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (0)")
    parser.add_argument("--json", action="store_true", help="all numbers as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")


class _Flags:
    """Values of flags as what they name; ConfigError where one names nothing."""

    def __init__(self, options: argparse.Namespace) -> None:
        from self_rewarding_lm.recipes.reader import Reader

        self.options, self.reader = options, Reader()

    def of(self, flag: str, kind: str) -> Any:
        """What a flag's value is: a model, tokenizer, object or dataset; None where not given."""
        from self_rewarding_lm.recipes.yaml_nodes import Node

        value = getattr(self.options, flag.lstrip("-").replace("-", "_"))
        if value is None:
            return None
        found = getattr(self.reader, kind)(Node(value, flag, Path.cwd()), ())
        self._refuse()
        if kind == "model" and not isinstance(found, str) and not hasattr(found, "forward"):
            return found()  # type: ignore[operator]
        return found

    def settings(self, flag: str, cls: Any) -> Any:
        """A flag's YAML as settings of a class; None where it is not given."""
        from self_rewarding_lm.recipes.yaml_nodes import parse_yaml

        text = getattr(self.options, flag.lstrip("-"))
        if text is None:
            return None
        found = self.reader.settings(cls, parse_yaml(text, flag, Path.cwd(), lines=False), ())
        self._refuse()
        return found

    def reward(self) -> Any:
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
            return self.of("--reward", "object")
        found = self.reader.reward(read_yaml(Path(name)), ())
        self._refuse()
        return found

    def _refuse(self) -> None:
        if self.reader.problems:
            raise ConfigError("\n".join(self.reader.problems))


def _judge(options: argparse.Namespace) -> int:
    from self_rewarding_lm.config import ComparisonConfig, SamplingConfig
    from self_rewarding_lm.evaluation.judge_quality import evaluate_judge
    from self_rewarding_lm.evaluation.tables import judge_table

    flags = _Flags(options)
    found = evaluate_judge(
        flags.of("--model", "model"),
        flags.of("--ranked", "dataset"),
        tokenizer=_loaded(flags.of("--tokenizer", "tokenizer")),
        reward=flags.reward(),
        comparison=ComparisonConfig() if options.pairwise else None,
        judging=flags.settings("--judging", SamplingConfig),
        num_judgements=options.judgements,
        chat_template=options.chat_template,
        seed=options.seed,
        quiet=options.quiet or options.json,
    )
    if options.json:
        words = {"metrics": found.metrics(), "intervals": dict(found.intervals)}
        calibration = None if found.calibration is None else asdict(found.calibration)
        words |= {"histogram": dict(found.histogram), "calibration": calibration}
        print(json.dumps(words, indent=2))
    else:
        print(judge_table(found))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from self_rewarding_lm.config import SamplingConfig
    from self_rewarding_lm.evaluation.head_to_head import compare
    from self_rewarding_lm.evaluation.tables import comparison_table

    flags = _Flags(options)
    prompts, verifier = _prompts(flags, options)
    found = compare(
        options.first,
        options.second,
        prompts,
        judge=_asked(flags, options),
        judge_model=flags.of("--judge-model", "model"),
        judging=flags.settings("--judging", SamplingConfig),
        num_judgements=options.judgements,
        verifier=verifier,
        sampling=flags.settings("--sampling", SamplingConfig),
        num_samples=options.samples,
        module=flags.of("--module", "model"),
        tokenizer=_loaded(flags.of("--tokenizer", "tokenizer")),
        chat_template=options.chat_template,
        seed=options.seed,
        out=options.out,
        quiet=options.quiet or options.json,
    )
    if options.json:
        sides = {name: asdict(getattr(found, name)) for name in ("first", "second")}
        for side in sides.values():
            del side["candidates"]
        position = None if found.position is None else asdict(found.position)
        rates = {"rates": asdict(found.rates), "position": position}
        print(json.dumps({**sides, **rates}, indent=2))
    else:
        print(comparison_table(found, (options.first, options.second)))
    return 0


def _prompts(flags: _Flags, options: argparse.Namespace) -> tuple[Any, Any]:
    """The prompts, and the verifier that goes with them."""
    from self_rewarding_lm.evaluation.verifying import reasoning_task

    kind, _, name = options.prompts.partition(":")
    if kind == "reasoning-gym":
        return reasoning_task(name, size=options.size, seed=options.seed)
    return flags.of("--prompts", "dataset"), flags.of("--verifier", "object")


def _asked(flags: _Flags, options: argparse.Namespace) -> Any:
    """The judge that the flags name; None leaves it to `compare`."""
    from self_rewarding_lm.config import ComparisonConfig

    given = (options.judge, options.reward, options.pairwise or None)
    if sum(value is not None for value in given) > 1:
        raise ConfigError("give one of --judge, --reward and --pairwise.")
    if options.judge is not None:
        return flags.of("--judge", "object")
    return ComparisonConfig() if options.pairwise else flags.reward()


def _loaded(tokenizer: Any) -> Any:
    from self_rewarding_lm.models.loading import load_tokenizer

    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
