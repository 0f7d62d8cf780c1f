"""`self-rewarding-lm push`: a stage's weights on the Hugging Face hub."""

import argparse

from self_rewarding_lm.cli.stages import STAGE_HELP, named_stage

SUMMARY = "upload a stage's weights and card to the Hugging Face hub"


DESCRIPTION = """\
Upload a stage's weights, its tokenizer and its card to the Hugging Face hub:

  self-rewarding-lm push runs/first:m2 OWNER/NAME

The repository is made if there is none, and only its owner sees it unless --public is given. The
token is the one of `hf auth login` or of the environment variable HF_TOKEN.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", metavar="RUN[:STAGE]", help=STAGE_HELP)
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository")
    parser.add_argument("--public", action="store_true", help="make a new repository public")


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.report.card import push_to_hub, reach_hub

    opened, stage = named_stage(options.stage)
    reach_hub(options.name)
    print(push_to_hub(opened, stage, options.name, private=not options.public))
    return 0
