"""`self-rewarding-lm check`: every stage of a recipe on a few rows."""

import argparse

from self_rewarding_lm.cli.recipe_flags import add_recipe_flags, in_order, recipe_root
from self_rewarding_lm.text import printable

SUMMARY = "try every stage of a recipe on a few rows; begin nothing"


DESCRIPTION = """\
Try every stage of a recipe on a few rows, and begin nothing:

  self-rewarding-lm check recipe.yaml

The model is loaded. Each stage reads a few rows, samples two tokens, has them judged and computes
one loss with its gradient, in a temporary folder. `run` does the same before its first stage.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_recipe_flags(parser)


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.recipes.reader import read_recipe
    from self_rewarding_lm.stages.rehearsal import rehearse_stages

    recipe = read_recipe(recipe_root(options))
    trainer = recipe.trainer(quiet=True)
    told = rehearse_stages(trainer)
    if trainer.runtime.is_main:
        print(printable("\n".join(f"  {line}" for line in told)))
        print(in_order(recipe))
        print("\n".join(map(printable, trainer.ways())))
        if (words := trainer.products_unused()) is not None:
            print(words)
    return 0
