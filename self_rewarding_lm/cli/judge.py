"""`self-rewarding-lm judge`: a judge measured on replies that people ranked."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from self_rewarding_lm.cli.judging_flags import Flags, add_judging_flags, loaded_tokenizer
from self_rewarding_lm.errors import ConfigError, JudgeError
from self_rewarding_lm.text import amount, printable

if TYPE_CHECKING:
    from self_rewarding_lm.records import Judgement

SUMMARY = "measure a judge on replies that people ranked"


DESCRIPTION = """\
How well a model judges replies that people ranked:

  self-rewarding-lm judge --model M --ranked ranked.jsonl
  self-rewarding-lm judge --model M --ranked trees.jsonl.gz --reward paper --judgements 3
  self-rewarding-lm judge --model SMALL --ranked ranked.jsonl --score expected --at-once

Ranked rows are Open Assistant trees, {prompt, chosen, rejected}, {prompt, replies}, {input,
output_1, output_2, label}, or module:attribute. Intervals are 95 %, resampling whole trees or
prompts; models within each other's intervals cannot be told apart. If no judgement has a score,
some of the judge's texts are shown and the exit status is 1.
"""


JUDGE = "who judges: a folder, a GGUF file, a name on the hub, RUN[:STAGE] or module:attribute"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help=JUDGE)
    parser.add_argument("--ranked", required=True, metavar="DATA", help="replies ranked by people")
    add_judging_flags(parser)


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.config import SamplingConfig
    from self_rewarding_lm.evaluation.judge_quality import evaluate_judge
    from self_rewarding_lm.evaluation.tables import judge_table

    if options.pairwise and options.reward is not None:
        raise ConfigError("give one of --reward and --pairwise, not both.")
    flags = Flags(options)
    evaluation = evaluate_judge(
        flags.read("--model", "model"),
        flags.read("--ranked", "dataset"),
        tokenizer=loaded_tokenizer(flags.read("--tokenizer", "tokenizer")),
        reward=None if options.pairwise else flags.reward(),
        comparison=flags.comparison() if options.pairwise else None,
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
    elif evaluation.parse_rate:
        print(printable(judge_table(evaluation)))
    if not evaluation.parse_rate:
        raise JudgeError(_nothing_read(evaluation.judgements))
    return 0


def _nothing_read(judgements: "Sequence[Judgement]") -> str:
    """The error of a judge of whose judgements none could be read, with what to do."""
    from self_rewarding_lm.judges.tally import unread_reasons, unread_texts

    return (
        f"none of {amount(len(judgements), 'judgement')} has a score: "
        f"{unread_reasons(judgements)}. What the judge wrote:\n{unread_texts(judgements)}\n"
        "Take the score from the probabilities of the numbers (--score expected), and without a "
        "review before it (--score expected --at-once); or give its texts more room (--judging "
        "'{max_new_tokens: 512}') if they are cut off; or name a --reward whose template says how "
        "it writes a score; a shorter one if the reason is too_long."
    )
