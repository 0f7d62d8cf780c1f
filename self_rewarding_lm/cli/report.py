"""`self-rewarding-lm report`: a run, or several, as one HTML file."""

import argparse

SUMMARY = "write a run, or several side by side, as one HTML file"


DESCRIPTION = "Write a run, or several side by side, as one HTML file."


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders; they may still be going")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the first run")
    parser.add_argument(
        "--examples", type=int, metavar="N", help="prompts that it holds at most (default: 2000)"
    )


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.report.page import EXAMPLES, write_report

    at_most = EXAMPLES if options.examples is None else options.examples
    print(write_report(options.runs, options.out, examples=at_most))
    return 0
