"""`self-rewarding-lm run`: the whole loop of a recipe."""

import argparse

from self_rewarding_lm.cli.recipe_flags import add_recipe_flags, in_order, recipe_root

SUMMARY = "run the whole loop"


DESCRIPTION = """\
The whole loop, from a recipe, from flags, or from both (flags override the recipe):

  self-rewarding-lm run recipe.yaml
  self-rewarding-lm run --model M0 --ift ift.jsonl --ranked ranked.jsonl --prompts prompts.jsonl

DATA is a .jsonl, .json or .parquet file, module:attribute, or what a recipe may hold there, such
as '{open_assistant: trees.jsonl.gz, part: ift}'. The same command resumes a stopped run. All
settings with their defaults: self-rewarding-lm run --settings
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_recipe_flags(parser)
    parser.add_argument("--settings", action="store_true", help="print all settings as a recipe")
    parser.add_argument("--check", action="store_true", help="check the recipe alone and stop")
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew: delete the earlier run's files first"
    )
    parser.add_argument(
        "--no-rehearsal", action="store_true", help="do not try all stages on a few rows first"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, warnings only")


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.recipes.reader import read_recipe

    if options.settings:
        from self_rewarding_lm.recipes.settings_file import recipe_text
        from self_rewarding_lm.runs.installed import SCHEMA

        print(recipe_text(str(SCHEMA)), end="")
        return 0
    recipe = read_recipe(recipe_root(options))
    if options.check:
        print(in_order(recipe))
        return 0
    trainer = recipe.trainer(quiet=options.quiet)
    finished = trainer(
        overwrite_checkpoints=options.overwrite or None, rehearse=not options.no_rehearsal
    )
    if trainer.runtime.is_main:
        from self_rewarding_lm.report.terminal import show_run

        print(show_run(finished, prompts=0 if options.quiet else 1))
    return 0
