"""The command `self-rewarding-lm`: run, check or plan a recipe; show, report or export; measure.

A command is a file of its own (SUMMARY, DESCRIPTION, `add_flags` and `run`) and a row of
`COMMANDS`. It reads flags, calls the library and prints. Knows nothing of how anything is done: the
library is imported when a command runs, so that `--help` is there at once. Begin with `main` below.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from self_rewarding_lm.cli import check, compare, export, judge, plan, report, run, show
from self_rewarding_lm.errors import SelfRewardingError
from self_rewarding_lm.text import printable

COMMANDS = {
    "run": run,
    "check": check,
    "plan": plan,
    "show": show,
    "report": report,
    "export": export,
    "judge": judge,
    "compare": compare,
}
"""In the order of the help."""


DESCRIPTION = """\
Train a language model on rewards that it gives itself (arXiv:2401.10020).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 1 for an error, 130 if it was stopped.

    Wrong usage ends with SystemExit(2), as argparse does it.
    """
    options = make_parser().parse_args(arguments)
    try:
        return options.command.run(options)
    except SelfRewardingError as error:
        print(f"self-rewarding-lm: error: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        words = "stopped."
        if options.command is run:
            without = " (without --overwrite)" if options.overwrite else ""
            words = f"stopped; the same command{without} goes on with this run."
        print(f"\nself-rewarding-lm: {words}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `show ... | head`; what is left to flush goes to a pipe of our own
        os.dup2(os.pipe()[1], sys.stdout.fileno())
        return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="self-rewarding-lm", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION
            or f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_flags(subparser)
        subparser.set_defaults(command=command, parser=subparser)
    return parser
