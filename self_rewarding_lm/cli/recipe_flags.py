"""The flags that name a recipe and change it, shared by `run`, `check` and `plan`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.text import amount

if TYPE_CHECKING:
    from self_rewarding_lm.recipes.reader import Recipe
    from self_rewarding_lm.recipes.yaml_nodes import Node


class Flag(NamedTuple):
    """A flag for a place in a recipe. is_text: its value is no YAML, but a text as it is."""

    name: str
    place: str
    value: str
    is_text: bool
    help: str


FLAGS = (
    Flag(
        "--model",
        "model",
        "NAME",
        True,
        "M0: a folder, a hub name, a .gguf or module:attribute",
    ),
    Flag("--ift", "paper.ift", "DATA", False, "instruction rows with a human answer"),
    Flag("--ranked", "paper.ranked", "DATA", False, "replies ranked by people, for EFT"),
    Flag("--prompts", "paper.prompts", "DATA", False, "new prompts to answer"),
    Flag("--iterations", "paper.iterations", "N", False, "rounds of self-rewarding (default: 2)"),
    Flag(
        "--pairs",
        "paper.num_generated_preference_pairs",
        "N",
        False,
        "of each round, or [first, second] (default: the paper's 3,964 and 6,942, or what one "
        "pass over fewer prompts gives)",
    ),
    Flag(
        "--max-new-tokens",
        "paper.max_new_tokens",
        "N",
        False,
        "of a response and of a judgement at most (default: 256)",
    ),
    Flag("--batch-size", "paper.batch_size", "N", False, "rows or pairs a step (default: 16)"),
    Flag("--out", "out", "FOLDER", True, "the run's folder (default: checkpoints)"),
    Flag("--seed", "seed", "N", False, "of sampling and of the order of rows (default: 0)"),
    Flag(
        "--judge-mode",
        "reward_prompts.default.score_mode",
        "MODE",
        True,
        "sampled (the score is read in the judge's text) or expected (over the allowed numbers)",
    ),
    Flag("--torch-dtype", "torch_dtype", "TYPE", True, "of the loaded model (default: float32)"),
    Flag("--lora-rank", "peft.r", "N", False, "train a LoRA adapter of this rank"),
    Flag(
        "--chat-template",
        "chat_template",
        "NAME",
        True,
        "plain, chatml, llama-3, gemma, zephyr, raw or jinja text (default: the tokenizer's own)",
    ),
)


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE, the flags of `FLAGS` and --set."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file")
    for flag in FLAGS:
        parser.add_argument(flag.name, metavar=flag.value, help=flag.help)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting of a recipe, such as paper.batch_size=8; may be repeated",
    )


def recipe_root(options: argparse.Namespace) -> "Node":
    """The nodes of the recipe that the options name, with the flags above them.

    Raises ConfigError if --set has no KEY=VALUE; ends with usage if nothing is named.
    """
    from self_rewarding_lm.recipes.yaml_nodes import Node, parse_yaml, read_yaml

    here = Path.cwd()
    changes = {}
    for flag in FLAGS:
        value = getattr(options, flag.name.removeprefix("--").replace("-", "_"))
        if value is not None:
            node = Node(value, flag.name, here)
            if not flag.is_text:
                node = parse_yaml(value, flag.name, here, lines=False)
            changes[tuple(flag.place.split("."))] = node
    for setting in options.set:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(
                f"--set takes KEY=VALUE, such as paper.batch_size=8; got {setting!r}."
            )
        changes[tuple(key.split("."))] = parse_yaml(value, f"--set {key}", here, lines=False)
    if options.recipe is None and not changes:
        options.parser.error("give a recipe, or at least --model, --ift and --prompts")
    root = Node({}, "flags", here) if options.recipe is None else read_yaml(Path(options.recipe))
    return root.replaced(changes)


def in_order(recipe: "Recipe") -> str:
    """The line that says that a recipe was checked."""
    from self_rewarding_lm.stages.base import stage_names

    names = stage_names(recipe.stages)
    stages = amount(len(names), "stage")
    return f"The recipe is in order: {stages} in {recipe.folder}: {', '.join(names)}."
