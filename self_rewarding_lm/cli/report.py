"""`self-rewarding-lm report`: a run, or several, as one HTML file."""

import argparse

SUMMARY = "write a run, or several side by side, as one HTML file"


DESCRIPTION = "Write a run, or several side by side, as one HTML file."


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders; runs may be active")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the first run")
    parser.add_argument(
        "--examples", type=int, metavar="N", help="most prompts in it (default: 2000)"
    )
    parser.add_argument(
        "--watch", action="store_true", help="write it every ten seconds during a run"
    )


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.report.page import EXAMPLES, watch_report, write_report

    at_most = EXAMPLES if options.examples is None else options.examples
    if options.watch:
        written = watch_report(options.runs, options.out, at_most)
        print(next(written), flush=True)
        for _ in written:
            continue
        return 0
    print(write_report(options.runs, options.out, examples=at_most))
    return 0
