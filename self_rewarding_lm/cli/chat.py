"""`self-rewarding-lm chat`: talk to a stage, or to two side by side."""

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from self_rewarding_lm.cli.judging_flags import Flags, loaded_tokenizer
from self_rewarding_lm.cli.stages import STAGE_HELP, named_model
from self_rewarding_lm.text import amount, printable

if TYPE_CHECKING:
    from self_rewarding_lm.records import Candidate

SUMMARY = "talk to a stage in the terminal, or to two side by side"


DESCRIPTION = """\
Talk to a stage of a run, or put the same questions to two stages:

  self-rewarding-lm chat runs/first:m2
  self-rewarding-lm chat runs/first:m1 runs/first:m2 --sampling '{max_new_tokens: 512}'

What was said is kept and shown to the model again if the tokenizer has a chat template. /new begins
another conversation; /quit, Ctrl-D and Ctrl-C end. Piped lines are questions too. A folder, a GGUF
file or a name on the hub can take the place of a stage.
"""


NEW, QUIT = "/new", "/quit"


BETWEEN = " | "
"""Stands between two answers."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="RUN[:STAGE]", help=STAGE_HELP)
    parser.add_argument("--sampling", metavar="YAML", help="as '{temperature: 0}'")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--tokenizer", metavar="T", help="default: the model's own")
    parser.add_argument("--chat-template", metavar="NAME", help="default: the tokenizer's own")
    parser.add_argument("--torch-dtype", metavar="TYPE", help="of the models (default: float32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (0)")


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.config import SamplingConfig
    from self_rewarding_lm.errors import DataError
    from self_rewarding_lm.evaluation.contexts import Opening, checkpoint, open_context
    from self_rewarding_lm.evaluation.talking import Talk
    from self_rewarding_lm.generation.local import LocalEngine

    if len(options.models) > 2:
        options.parser.error(f"one or two models are asked; got {len(options.models)}.")
    flags = Flags(options)
    opening = Opening(
        tokenizer=loaded_tokenizer(flags.read("--tokenizer", "tokenizer")),
        chat_template=options.chat_template,
        eos_id=None,
        seed=options.seed,
        engine=LocalEngine(),
        quiet=True,
        stage="chat",
        torch_dtype=options.torch_dtype,
    )
    sampling = flags.settings("--sampling", SamplingConfig) or SamplingConfig()
    names = [named_model(name) for name in options.models]
    talks = [
        Talk(open_context(checkpoint(name), opening), sampling, options.system) for name in names
    ]
    if not all(talk.keeps for talk in talks):
        print("There is no chat template: earlier turns are not kept.", file=sys.stderr)
    try:
        for question in _questions():
            if question == NEW:
                for talk in talks:
                    talk.forget()
                continue
            try:
                answers = [talk.answer(question) for talk in talks]
            except DataError as error:
                print(f"{printable(str(error))} {NEW} begins another conversation.")
                continue
            print(_shown(names, answers), flush=True)
    except KeyboardInterrupt:
        print()
    return 0


def _questions() -> Iterator[str]:
    """Lines of the terminal or of a pipe that say something, up to its end or to /quit."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{QUIT} or Ctrl-D ends, {NEW} begins another conversation.")
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  # lets `input` edit a line
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print()
            return
        if line == QUIT:
            return
        if line:
            yield line


def _shown(names: Sequence[str], answers: "Sequence[Candidate]") -> str:
    """The answers: one as it is, two in columns on a terminal, one below the other elsewhere."""
    texts = [
        printable((answer.text or "").strip())
        + (
            f" (cut off at {amount(answer.max_new_tokens, 'token')})"
            if answer.finished is False
            else ""
        )
        for answer in answers
    ]
    if len(texts) == 1:
        return f"{texts[0]}\n"
    if not sys.stdout.isatty():
        return "".join(f"{name}:\n{text}\n\n" for name, text in zip(names, texts, strict=True))[:-1]
    return columns(names, texts, get_terminal_size((100, 24)).columns)


def columns(names: Sequence[str], texts: Sequence[str], width: int) -> str:
    """Two texts side by side under their names, in lines of at most `width` characters."""
    each = max(1, (width - len(BETWEEN)) // 2)
    sides = [
        [
            part
            for line in (name, "", *text.split("\n"))
            for part in textwrap.wrap(line, each) or [""]
        ]
        for name, text in zip(names, texts, strict=True)
    ]
    rows = zip_longest(*sides, fillvalue="")
    return "\n".join(f"{a:<{each}}{BETWEEN}{b}".rstrip() for a, b in rows) + "\n"
