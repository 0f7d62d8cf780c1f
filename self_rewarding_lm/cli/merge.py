"""`self-rewarding-lm merge`: a stage's adapter merged into its model."""

import argparse
from pathlib import Path

from self_rewarding_lm.cli.stages import STAGE_HELP, named_stage

SUMMARY = "merge a stage's adapter into its model, as a folder"


DESCRIPTION = """\
Merge a stage's adapter into the weights of its model:

  self-rewarding-lm merge runs/first:m2 my-model

The folder holds the whole model, its tokenizer and a card, and is read without peft and without
this library. What it gives is compared with what the adapter gives before it is kept.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", metavar="RUN[:STAGE]", help=STAGE_HELP)
    parser.add_argument("folder", metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--torch-dtype",
        metavar="TYPE",
        help="of the weights; auto: as the base model has them (default: float32)",
    )


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.report.merge import merge_stage

    opened, stage = named_stage(options.stage)
    merge_stage(opened, stage, Path(options.folder), torch_dtype=options.torch_dtype)
    print(f"{options.folder}: the model of stage {stage}, with its adapter merged")
    return 0
