"""The command `self-rewarding-lm`: run, check or plan a recipe; show, report or export; measure.

Reads flags, calls the library and prints. Knows nothing of how anything is done: the library is
imported when a command needs it, so that `--help` is there at once. Begin with `main` below; the
commands that measure are in `measure.py`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from self_rewarding_lm.cli.measure import add_evaluating
from self_rewarding_lm.errors import ConfigError, SelfRewardingError

if TYPE_CHECKING:
    from self_rewarding_lm.recipes.reader import Recipe
    from self_rewarding_lm.recipes.yaml_nodes import Node


FLAGS: tuple[tuple[str, str, str, bool, str], ...] = (
    # flag, place in the recipe, what stands for its value, a text as it is, help
    (
        "--model",
        "model",
        "NAME",
        True,
        "M0: a folder, a hub name, a .gguf or module:attribute",
    ),
    ("--ift", "paper.ift", "DATA", False, "instruction rows with a human answer"),
    ("--ranked", "paper.ranked", "DATA", False, "replies ranked by people, for EFT"),
    ("--prompts", "paper.prompts", "DATA", False, "new prompts to answer"),
    ("--iterations", "paper.iterations", "N", False, "rounds of self-rewarding (default: 2)"),
    ("--out", "out", "FOLDER", True, "the run's folder (default: checkpoints)"),
    ("--seed", "seed", "N", False, "of sampling and of the order of rows (default: 0)"),
    (
        "--judge-mode",
        "reward_prompts.default.score_mode",
        "MODE",
        True,
        "sampled (the score is read in the judge's text) or expected (over the allowed numbers)",
    ),
    ("--torch-dtype", "torch_dtype", "TYPE", True, "of the loaded model (default: float32)"),
    ("--lora-rank", "peft.r", "N", False, "train a LoRA adapter of this rank"),
    (
        "--chat-template",
        "chat_template",
        "NAME",
        True,
        "plain, chatml, llama-3, gemma, zephyr, raw or jinja text (default: the tokenizer's own)",
    ),
)


DESCRIPTION = """\
Train a language model on rewards that it gives itself (arXiv:2401.10020).
"""


RUN_DESCRIPTION = """\
The whole loop, from a recipe, from flags, or from both (flags stand above the recipe):

  self-rewarding-lm run recipe.yaml
  self-rewarding-lm run --model M0 --ift ift.jsonl --ranked ranked.jsonl --prompts prompts.jsonl

DATA is a .jsonl, .json or .parquet file, module:attribute, or what a recipe may hold there, such
as '{open_assistant: trees.jsonl.gz, part: ift}'. A run that was stopped goes on with the same
command. All settings with their defaults: self-rewarding-lm run --settings
"""


CHECK_DESCRIPTION = """\
Try every stage of a recipe in short, and begin nothing:

  self-rewarding-lm check recipe.yaml

The model is loaded. Each stage reads a few rows, samples two tokens, has them judged and computes
one loss with its gradient, in a temporary folder. `run` does the same before its first stage.
"""


PLAN_DESCRIPTION = """\
What a recipe takes before it is run, for each process:

  self-rewarding-lm plan recipe.yaml

Of each stage: memory by phase (1 GB is 10^9 bytes; a line in brackets is the other way to train),
candidates, judgements and tokens, time at this machine's measured rate, disk. Weights are not
loaded: a folder with the model's config.json is enough. Numbers that only the run will show are
ranges; what cannot be known is "unknown".
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 1 for an error, 130 where it was stopped.

    Wrong usage ends with SystemExit(2), as argparse does it.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except SelfRewardingError as error:
        print(f"self-rewarding-lm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        words = "stopped."
        if options.command is _run:
            without = " (without --overwrite)" if options.overwrite else ""
            words = f"stopped; the same command{without} goes on with this run."
        print(f"\nself-rewarding-lm: {words}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `show ... | head`; what is left to flush goes to a pipe of our own
        os.dup2(os.pipe()[1], sys.stdout.fileno())
        return 0


def _run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.recipes.reader import read_recipe

    if options.settings:
        from self_rewarding_lm.recipes.settings_file import recipe_text

        print(recipe_text(), end="")
        return 0
    recipe = read_recipe(_root(options))
    if options.check:
        print(_in_order(recipe))
        return 0
    trainer = recipe.trainer(quiet=options.quiet)
    run = trainer(
        overwrite_checkpoints=options.overwrite or None, rehearse=not options.no_rehearsal
    )
    if trainer.runtime.is_main:
        from self_rewarding_lm.report.terminal import show_run

        print(show_run(run, prompts=0 if options.quiet else 1))
    return 0


def _check(options: argparse.Namespace) -> int:
    from self_rewarding_lm.recipes.reader import read_recipe
    from self_rewarding_lm.stages.rehearsal import rehearse_stages

    recipe = read_recipe(_root(options))
    trainer = recipe.trainer(quiet=True)
    told = rehearse_stages(trainer)
    if trainer.runtime.is_main:
        print("\n".join(f"  {line}" for line in told))
        print(_in_order(recipe))
    return 0


def _plan(options: argparse.Namespace) -> int:
    import json

    from self_rewarding_lm.recipes.plan.plan import plan_recipe
    from self_rewarding_lm.recipes.plan.table import bytes_of, plan_json, plan_text
    from self_rewarding_lm.recipes.reader import read_recipe

    memory = None if options.device_memory is None else bytes_of(options.device_memory)
    recipe = read_recipe(_root(options))
    plan = plan_recipe(recipe, device_memory=memory, timed=not options.no_times)
    print(json.dumps(plan_json(plan), indent=2) if options.json else plan_text(plan))
    return 0


def _show(options: argparse.Namespace) -> int:
    from self_rewarding_lm.report.terminal import show_run
    from self_rewarding_lm.runs.run import Run

    print(show_run(Run.open(options.folder), stage=options.stage, prompts=options.prompts))
    return 0


def _export(options: argparse.Namespace) -> int:
    from self_rewarding_lm.report.export import export_stage
    from self_rewarding_lm.report.terminal import stage_name
    from self_rewarding_lm.runs.run import Run

    run = Run.open(options.folder)
    stage = stage_name(run, options.stage)
    count = export_stage(run, stage, Path(options.to), force=options.force)
    print(f"{options.to}: {count} rows of stage {stage}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from self_rewarding_lm.report.page import EXAMPLES, write_report

    at_most = EXAMPLES if options.examples is None else options.examples
    print(write_report(options.runs, options.out, examples=at_most))
    return 0


def _in_order(recipe: "Recipe") -> str:
    from self_rewarding_lm.stages.base import stage_names

    names = stage_names(recipe.stages)
    return f"The recipe is in order: {len(names)} stages in {recipe.folder}: {', '.join(names)}."


def _root(options: argparse.Namespace) -> "Node":
    """The recipe's nodes: the file's with the flags above them."""
    from self_rewarding_lm.recipes.yaml_nodes import Node, parse_yaml, read_yaml

    here = Path.cwd()
    changes = {}
    for flag, place, _, is_text, _ in FLAGS:
        value = getattr(options, _name(flag))
        if value is not None:
            node = Node(value, flag, here) if is_text else _parsed(value, flag, here)
            changes[tuple(place.split("."))] = node
    for given in options.set:
        key, equals, value = given.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, such as paper.batch_size=8; got {given!r}.")
        changes[tuple(key.split("."))] = parse_yaml(value, f"--set {key}", here, lines=False)
    if options.recipe is None and not changes:
        options.parser.error("give a recipe, or at least --model, --ift and --prompts")
    root = Node({}, "flags", here) if options.recipe is None else read_yaml(Path(options.recipe))
    return root.replaced(changes)


def _parsed(value: str, flag: str, here: Path) -> "Node":
    from self_rewarding_lm.recipes.yaml_nodes import parse_yaml

    return parse_yaml(value, flag, here, lines=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="self-rewarding-lm", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    words = "try every stage of a recipe in short; begin nothing"
    _add_recipe(_added(commands, "check", _check, words, CHECK_DESCRIPTION))
    _add_plan(commands)
    show = _added(commands, "show", _show, "print a run's stages, numbers and a few prompts")
    show.add_argument("folder", metavar="RUN", help="the run's folder; it may still be going")
    show.add_argument("--stage", metavar="S", help="one stage, by name or number (from 1)")
    show.add_argument(
        "--prompts",
        type=int,
        default=3,
        metavar="N",
        help="prompts with their candidates, judgements and pair (default: 3)",
    )
    _add_report(commands)
    export = _added(commands, "export", _export, "write what a stage trained on in TRL's columns")
    export.add_argument("folder", metavar="RUN", help="the run's folder")
    export.add_argument("--stage", required=True, metavar="S", help="name or number (from 1)")
    export.add_argument("--to", required=True, metavar="FILE", help="a .parquet or .jsonl file")
    export.add_argument("--force", action="store_true", help="replace the file if it exists")
    add_evaluating(commands, _added)
    return parser


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = _added(commands, "run", _run, "run the whole loop", RUN_DESCRIPTION)
    _add_recipe(run)
    run.add_argument("--settings", action="store_true", help="print all settings as a recipe")
    run.add_argument("--check", action="store_true", help="check the recipe alone and stop")
    run.add_argument(
        "--overwrite", action="store_true", help="start anew: delete the earlier run's files first"
    )
    run.add_argument(
        "--no-rehearsal", action="store_true", help="begin without trying all stages in short"
    )
    run.add_argument("--quiet", action="store_true", help="no progress, warnings only")


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    words = "what a recipe takes: memory, tokens, time, disk"
    plan = _added(commands, "plan", _plan, words, PLAN_DESCRIPTION)
    _add_recipe(plan)
    plan.add_argument("--json", action="store_true", help="exact numbers as JSON")
    plan.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="of each process's GPU, such as 24GB or 80GiB: say whether each stage fits",
    )
    plan.add_argument("--no-times", action="store_true", help="do not measure this machine")


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    words = "write a run, or several side by side, as one HTML file"
    report = _added(commands, "report", _report, words)
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders; they may still be going")
    report.add_argument("--out", metavar="FILE", help="default: report.html in the first run")
    report.add_argument(
        "--examples", type=int, metavar="N", help="prompts that it holds at most (default: 2000)"
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """What names a recipe."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file")
    for flag, _, value, _, words in FLAGS:
        parser.add_argument(flag, metavar=value, help=words)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting of a recipe, such as paper.batch_size=8; may come several times",
    )


def _added(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Callable[[argparse.Namespace], int],
    words: str,
    description: str | None = None,
) -> argparse.ArgumentParser:
    """A subcommand with its function."""
    parser = commands.add_parser(
        name,
        help=words,
        description=description or f"{words[0].upper()}{words[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command, parser=parser)
    return parser


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
