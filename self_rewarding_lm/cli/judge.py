"""`self-rewarding-lm judge`: a judge measured on replies that people ranked."""

import argparse
import json
from dataclasses import asdict

from self_rewarding_lm.cli.judging_flags import Flags, add_judging_flags, loaded_tokenizer
from self_rewarding_lm.text import printable

SUMMARY = "measure a judge on replies that people ranked"


DESCRIPTION = """\
How well a model judges replies that people ranked:

  self-rewarding-lm judge --model M --ranked ranked.jsonl
  self-rewarding-lm judge --model M --ranked trees.jsonl.gz --reward paper --judgements 3

Ranked rows are Open Assistant trees, {prompt, chosen, rejected}, {prompt, replies}, {input,
output_1, output_2, label}, or module:attribute. Intervals are 95 %, resampling whole trees or
prompts; they say nothing of models that lie inside them.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="who judges")
    parser.add_argument("--ranked", required=True, metavar="DATA", help="replies ranked by people")
    add_judging_flags(parser)


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.config import ComparisonConfig, SamplingConfig
    from self_rewarding_lm.evaluation.judge_quality import evaluate_judge
    from self_rewarding_lm.evaluation.tables import judge_table

    flags = Flags(options)
    evaluation = evaluate_judge(
        flags.read("--model", "model"),
        flags.read("--ranked", "dataset"),
        tokenizer=loaded_tokenizer(flags.read("--tokenizer", "tokenizer")),
        reward=flags.reward(),
        comparison=ComparisonConfig() if options.pairwise else None,
        judging=flags.settings("--judging", SamplingConfig),
        num_judgements=options.judgements,
        chat_template=options.chat_template,
        seed=options.seed,
        quiet=options.quiet or options.json,
    )
    if options.json:
        words = {"metrics": evaluation.metrics(), "intervals": dict(evaluation.intervals)}
        calibration = None if evaluation.calibration is None else asdict(evaluation.calibration)
        words |= {"histogram": dict(evaluation.histogram), "calibration": calibration}
        print(json.dumps(words, indent=2))
    else:
        print(printable(judge_table(evaluation)))
    return 0
