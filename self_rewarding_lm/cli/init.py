"""`self-rewarding-lm init`: a first recipe, with data, in a folder."""

import argparse
from pathlib import Path

SUMMARY = "write a first recipe and example data into a folder"


DESCRIPTION = """\
Write a recipe that fits the model, the number of prompts and this machine:

  self-rewarding-lm init first
  self-rewarding-lm init first --model MODEL --prompts prompts.jsonl --ift ift.jsonl

Example data is written in place of any that is not given. Only the model's config.json is read, not
its weights. Existing files are never replaced.
"""


MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="default: here")
    parser.add_argument("--model", default=MODEL, metavar="NAME", help=f"M0 (default: {MODEL})")
    parser.add_argument("--ift", metavar="FILE", help="instruction rows with a human answer")
    parser.add_argument("--ranked", metavar="FILE", help="replies ranked by people")
    parser.add_argument("--prompts", metavar="FILE", help="new prompts to answer")
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="of the GPU that it is for, such as 24GB (default: this machine's, or its CPU)",
    )


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.recipes.first import DATA, RECIPE, write_first_recipe
    from self_rewarding_lm.recipes.plan.table import bytes_of

    memory = None if options.device_memory is None else bytes_of(options.device_memory)
    folder, data = Path(options.folder), {name: getattr(options, name) for name in DATA}
    for line in write_first_recipe(folder, options.model, data, device_memory=memory):
        print(line)
    print(f"Next: self-rewarding-lm check {folder / RECIPE}")
    return 0
