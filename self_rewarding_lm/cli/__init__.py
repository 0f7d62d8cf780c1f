"""The command `self-rewarding-lm`: write, check, plan or run a recipe; show, measure or use a run.

A command is a file of its own (SUMMARY, DESCRIPTION, `add_flags` and `run`) and a row of
`COMMANDS`. It reads flags, calls the library and prints. Knows nothing of how anything is done: the
library is imported when a command runs, so that `--help` is there at once. Begin with `main` below.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from self_rewarding_lm.cli import (
    chat,
    check,
    compare,
    export,
    init,
    judge,
    merge,
    plan,
    preview,
    push,
    report,
    run,
    schema,
    show,
)
from self_rewarding_lm.errors import SelfRewardingError, at_the_command, did_you_mean
from self_rewarding_lm.text import printable

COMMANDS = {
    "init": init,
    "preview": preview,
    "run": run,
    "check": check,
    "plan": plan,
    "show": show,
    "report": report,
    "export": export,
    "chat": chat,
    "judge": judge,
    "compare": compare,
    "merge": merge,
    "push": push,
    "schema": schema,
}
"""In the order of the help."""


DESCRIPTION = """\
Train a language model on rewards that it gives itself (arXiv:2401.10020).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 1 for an error, 130 if it was stopped.

    Wrong usage ends with SystemExit(2), as argparse does it.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser()
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        hint = did_you_mean(given[0], COMMANDS)
        parser.error(f"{given[0]!r} is not a command{hint} There are: {', '.join(COMMANDS)}.")
    options, unknown = parser.parse_known_args(given)
    if unknown:
        options.parser.error(_no_flag(options.parser, unknown))
    try:
        with at_the_command():
            return options.command.run(options)
    except SelfRewardingError as error:
        print(f"self-rewarding-lm: error: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        words = "stopped."
        if options.command is run:
            without = " (without --overwrite)" if options.overwrite else ""
            words = f"stopped; the same command{without} resumes this run."
        print(f"\nself-rewarding-lm: {words}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `show ... | head`; what is left to flush goes to a pipe of our own
        os.dup2(os.pipe()[1], sys.stdout.fileno())
        return 0


def _no_flag(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """Words for arguments that a command does not know."""
    first = next((word for word in unknown if word.startswith("-")), unknown[0])
    flags = [flag for action in parser._actions for flag in action.option_strings]
    if not first.startswith("-"):
        return f"{first!r} is one argument too many. {parser.prog} --help says which there are."
    name = first.partition("=")[0]
    return f"there is no flag {name}{did_you_mean(name, flags)} {parser.prog} --help lists all."


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
