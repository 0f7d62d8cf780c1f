"""`self-rewarding-lm plan`: what a recipe takes."""

import argparse
import json

from self_rewarding_lm.cli.recipe_flags import add_recipe_flags, recipe_root

SUMMARY = "what a recipe takes: memory, tokens, time, disk"


DESCRIPTION = """\
What a recipe takes before it is run, for each process:

  self-rewarding-lm plan recipe.yaml

For each stage: memory by phase (1 GB is 10^9 bytes; a line in brackets is the other way to train),
candidates, judgements and tokens, time at this machine's measured rate, disk. Weights are not
loaded: a folder with the model's config.json is enough. Numbers that only the run will show are
ranges; what cannot be known is "unknown".
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_recipe_flags(parser)
    parser.add_argument("--json", action="store_true", help="exact numbers as JSON")
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="of each process's GPU, such as 24GB or 80GiB: say whether each stage fits",
    )
    parser.add_argument("--no-times", action="store_true", help="do not measure this machine")


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.recipes.plan.plan import plan_recipe
    from self_rewarding_lm.recipes.plan.table import bytes_of, plan_json, plan_text
    from self_rewarding_lm.recipes.reader import read_recipe

    memory = None if options.device_memory is None else bytes_of(options.device_memory)
    recipe = read_recipe(recipe_root(options))
    plan = plan_recipe(recipe, device_memory=memory, timed=not options.no_times)
    print(json.dumps(plan_json(plan), indent=2) if options.json else plan_text(plan))
    return 0
