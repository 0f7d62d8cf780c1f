"""`self-rewarding-lm show`: a run's stages, numbers and a few prompts."""

import argparse

SUMMARY = "print a run's stages, numbers and a few prompts"


DESCRIPTION = "Print a run's stages, numbers and a few prompts."


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="the run's folder; it may be active")
    parser.add_argument("--stage", metavar="S", help="one stage, by name or number (from 1)")
    parser.add_argument(
        "--prompts",
        type=int,
        default=3,
        metavar="N",
        help="prompts with their candidates, judgements and pair (default: 3)",
    )


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.report.terminal import show_run
    from self_rewarding_lm.runs.run import Run

    print(show_run(Run.open(options.folder), stage=options.stage, prompts=options.prompts))
    return 0
