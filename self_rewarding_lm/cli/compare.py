"""`self-rewarding-lm compare`: which of two models answers held-out prompts better."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from self_rewarding_lm.cli.judging_flags import Flags, add_judging_flags, loaded_tokenizer
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.text import printable

SUMMARY = "compare two models on held-out prompts"


DESCRIPTION = """\
Which of two models answers held-out prompts better, by a judge that is neither:

  self-rewarding-lm compare run:sft run:self_reward-2 --prompts held_out.jsonl --judge-model J
  self-rewarding-lm compare run:1 run:3 --prompts reasoning-gym:chain_sum --samples 8

A model is RUN:STAGE (a name, or a number from 1), a folder, a GGUF file or a name on the hub; for
models not from Hugging Face, give the module with --module. A judge that compares sees both orders;
if its verdicts disagree, it is a tie. Tasks of reasoning-gym bring a verifier.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "first", metavar="FIRST", help="RUN:STAGE, or a folder, GGUF file or hub name"
    )
    parser.add_argument("second", metavar="SECOND", help="the other model")
    parser.add_argument("--prompts", required=True, metavar="DATA", help="or reasoning-gym:NAME")
    parser.add_argument("--judge-model", metavar="M", help="the judging model, as `judge --model`")
    parser.add_argument("--judge", metavar="OBJECT", help="module:attribute of another judge")
    add_judging_flags(parser)
    parser.add_argument("--module", metavar="OBJECT", help="module:attribute; weights go into it")
    parser.add_argument("--verifier", metavar="OBJECT", help="module:attribute of a function")
    parser.add_argument("--sampling", metavar="YAML", help="as '{max_new_tokens: 512}'")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="for each prompt (1)")
    parser.add_argument("--size", type=int, default=100, metavar="N", help="of a reasoning task")
    parser.add_argument("--out", metavar="FOLDER", help="keep what is sampled and judged")


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.config import SamplingConfig
    from self_rewarding_lm.evaluation.head_to_head import compare
    from self_rewarding_lm.evaluation.tables import comparison_table

    flags = Flags(options)
    prompts, verifier = _prompts(flags, options)
    comparison = compare(
        options.first,
        options.second,
        prompts,
        judge=_chosen_judge(flags, options),
        judge_model=flags.read("--judge-model", "model"),
        judging=flags.settings("--judging", SamplingConfig),
        num_judgements=options.judgements,
        verifier=verifier,
        sampling=flags.settings("--sampling", SamplingConfig),
        num_samples=options.samples,
        module=flags.read("--module", "model"),
        tokenizer=loaded_tokenizer(flags.read("--tokenizer", "tokenizer")),
        chat_template=options.chat_template,
        seed=options.seed,
        out=options.out,
        quiet=options.quiet or options.json,
    )
    if options.json:
        sides = {name: asdict(getattr(comparison, name)) for name in ("first", "second")}
        for side in sides.values():
            del side["candidates"]
        position = None if comparison.position is None else asdict(comparison.position)
        rates = {"rates": asdict(comparison.rates), "position": position}
        print(json.dumps({**sides, **rates}, indent=2))
    else:
        print(printable(comparison_table(comparison, (options.first, options.second))))
    return 0


def _prompts(flags: Flags, options: argparse.Namespace) -> tuple[Any, Any]:
    """The prompts, and the verifier that goes with them."""
    from self_rewarding_lm.evaluation.verifying import reasoning_task

    kind, _, name = options.prompts.partition(":")
    if kind == "reasoning-gym":
        return reasoning_task(name, size=options.size, seed=options.seed)
    return flags.read("--prompts", "dataset"), flags.read("--verifier", "object")


def _chosen_judge(flags: Flags, options: argparse.Namespace) -> Any:
    """The judge that the flags name; None leaves it to `compare`."""
    given = (options.judge, options.reward, options.pairwise or None)
    if sum(value is not None for value in given) > 1:
        raise ConfigError("give one of --judge, --reward and --pairwise.")
    if options.judge is not None:
        if flags.ways:
            raise ConfigError("--score and --at-once say how --judge-model judges; --judge is set.")
        return flags.read("--judge", "object")
    if options.pairwise or (flags.ways and options.reward is None):
        return flags.comparison()
    return flags.reward()
