"""`self-rewarding-lm preview`: rows of a recipe as the model will read them."""

import argparse
import sys

from self_rewarding_lm.cli.recipe_flags import add_recipe_flags, recipe_root

SUMMARY = "show some rows of a recipe as the model will read them"


DESCRIPTION = """\
Some rows of each dataset of a recipe as the model will read them, with all special tokens:

  self-rewarding-lm preview recipe.yaml

What is learnt is green on a terminal and between [[ and ]] elsewhere. Each judge prompt is shown
filled in, with what the judge must write for a score to be read. No weights are loaded.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_recipe_flags(parser)
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="of each dataset (2)")


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.recipes.preview import preview
    from self_rewarding_lm.recipes.reader import read_recipe

    recipe = read_recipe(recipe_root(options))
    colours = sys.stdout.isatty()
    for line in preview(recipe, rows=options.rows, mark=_green if colours else _bracketed):
        print(line)
    return 0


def _green(text: str) -> str:
    """A text in green; each of its lines by itself, as they are printed with something between."""
    return "\n".join(f"\x1b[32m{line}\x1b[0m" for line in text.split("\n"))


def _bracketed(text: str) -> str:
    return f"[[{text}]]"
