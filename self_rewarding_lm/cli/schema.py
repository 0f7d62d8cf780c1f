"""`self-rewarding-lm schema`: the JSON schema of recipes."""

import argparse

SUMMARY = "print the JSON schema of recipes, for editors"


DESCRIPTION = """\
The JSON schema of recipes, with which editors complete keys and underline mistakes:

  self-rewarding-lm schema > recipe.schema.json

A recipe names it in its first line, for a YAML language server:

  # yaml-language-server: $schema=recipe.schema.json

The recipe that `self-rewarding-lm run --settings` prints names the schema that was installed.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.runs.installed import schema

    print(schema(), end="")
    return 0
