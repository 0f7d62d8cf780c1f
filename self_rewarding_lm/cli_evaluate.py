"""The commands that measure: `judge`, a judge against people, and `compare`, two models.

Reads flags, calls the library and prints tables.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from self_rewarding_lm.errors import ConfigError

if TYPE_CHECKING:
    from self_rewarding_lm.evaluate import JudgeEvaluation
    from self_rewarding_lm.head_to_head import Comparison, Side
    from self_rewarding_lm.quality import Interval, Rate

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
        from self_rewarding_lm.recipe_file import RecipeReader

        self.options, self.reader = options, RecipeReader()

    def of(self, flag: str, kind: str) -> Any:
        """What a flag's value is: a model, tokenizer, object or dataset; None where not given."""
        from self_rewarding_lm.recipe_yaml import Node

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
        from self_rewarding_lm.recipe_yaml import parse_yaml

        text = getattr(self.options, flag.lstrip("-"))
        if text is None:
            return None
        found = self.reader.settings(cls, parse_yaml(text, flag, Path.cwd(), lines=False), ())
        self._refuse()
        return found

    def reward(self) -> Any:
        """The reward prompt of --reward, or None."""
        from self_rewarding_lm.recipe_reader import OBJECT_NAME
        from self_rewarding_lm.recipe_settings import RUBRICS
        from self_rewarding_lm.recipe_yaml import read_yaml

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
    from self_rewarding_lm.evaluate import evaluate_judge

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
    from self_rewarding_lm.head_to_head import compare

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
    from self_rewarding_lm.verifying import reasoning_task

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
    from self_rewarding_lm.adapters.named import load_tokenizer

    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


def judge_table(found: "JudgeEvaluation") -> str:
    """A judge's measures in lines."""
    own, pairs, at = found.agreement, found.agreement.pairs, found.intervals
    rows = [
        ("pairwise accuracy", pairs.accuracy, at["accuracy"], _of(pairs.agree + pairs.disagree)),
        ("  ties as a half", pairs.accuracy_ties_half, at["accuracy_ties_half"], ""),
        ("  tie rate", pairs.tie_rate, at["tie_rate"], f"{pairs.tied} tied"),
        ("5-best", own.best_precision, at["best_precision"], f"of {own.best_count} top scores"),
        ("exact match", own.exact_match, at["exact_match"], f"of {own.ordered} instructions"),
        ("Spearman", own.spearman, at["spearman"], f"{own.uncorrelated} undefined, left out"),
        ("Kendall tau-b", own.kendall, at["kendall"], f"{own.uncorrelated} undefined, left out"),
        ("parse rate", found.parse_rate, None, f"of {len(found.judgements)} judgements"),
        ("self-agreement", found.self_agreement, None, "same score, not corrected for chance"),
    ]
    if found.position is not None:
        seen = found.position
        words = f"of {seen.first + seen.second} verdicts, {seen.ties} ties"
        rows.append(("for the first shown", seen.first_share, None, words))
        rows.append(("both orders agree", seen.consistency, None, f"of {seen.compared} pairs"))
    if found.calibration is not None:
        words = f"bins of 0.1, {found.calibration.pairs} pairs"
        rows.append(("calibration error", found.calibration.error, None, words))
    head = f"{own.replies} replies to {own.instructions} prompts in {own.groups} groups"
    lines = [head, "", *_aligned(rows)]
    if found.calibration is not None:
        lines += ["", "how sure   people agree   pairs"]
        for b in found.calibration.bins:
            lines.append(f"{b.predicted:8.2f}   {b.agreed:12.2f}   {b.count:5d}")
    if found.histogram:
        lines += ["", "score   judgements"]
        lines += [f"{score:5.1f}   {count}" for score, count in found.histogram.items()]
    return "\n".join(lines)


def comparison_table(found: "Comparison", names: Sequence[str]) -> str:
    """A comparison in lines; `names` of both models."""
    rates = found.rates
    shown: list[tuple[str, Rate, str]] = [
        ("won", rates.won, f"{rates.wins}"),
        ("tied", rates.tied, f"{rates.ties}"),
        ("lost", rates.lost, f"{rates.losses}"),
        ("win rate", rates.win_rate, "ties as a half"),
        ("  length-controlled", rates.length_controlled, "had both been as long"),
    ]
    rows = [(label, rate.value, rate.interval, words) for label, rate, words in shown]
    if found.position is not None:
        rows.append(("for the first shown", found.position.first_share, None, "of verdicts"))
        rows.append(("both orders agree", found.position.consistency, None, "of pairs"))
    first, second = _measures(found.first), _measures(found.second)
    unknown = f", {rates.unknown} without a verdict" if rates.unknown else ""
    lines = [f"{names[0]} against {names[1]}: {rates.prompts} prompts{unknown}", ""]
    lines += [*_aligned(rows), "", f"{'':20}{'first':>12}{'second':>12}"]
    for label, value in first.items():
        lines.append(f"{label:20}{_number(value):>12}{_number(second[label]):>12}")
    return "\n".join(lines)


def _measures(side: "Side") -> dict[str, float | None]:
    seen = side.responses
    return {
        **({} if side.reward is None else {"held-out reward": side.reward.value}),
        **({} if side.accuracy is None else {"accuracy": side.accuracy.value}),
        **{f"pass@{k}": value for k, value in side.pass_at.items() if k > 1},
        "characters": seen.characters,
        "tokens": side.tokens,
        "cut off": side.clipped,
        **{f"distinct-{n}": value for n, value in seen.distinct.items()},
        "repeated 3-grams": seen.repetition,
    }


def _of(count: int) -> str:
    return f"of {count} untied pairs"


def _aligned(rows: Sequence[tuple[str, float | None, "Interval", str]]) -> list[str]:
    lines = []
    for label, value, interval, words in rows:
        between = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        lines.append(f"{label:20}{_number(value):>9}   {between:17}{words}".rstrip())
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
