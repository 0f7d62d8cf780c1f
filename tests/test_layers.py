"""Imports point down the list of layers, files stay short, each outside library has one home."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "self_rewarding_lm"
LAYERS = [
    "errors moved",
    "records rubrics closed controls durable stopping",
    "config checks pair_settings",
    "statements",
    "score_trie",
    "logprobs losses sampling judging pairing batching agreement instruct meta",
    "loss_settings quality",
    "chat weights lines tally encoding judge_quality",
    "sharding",
    "events progress",
    "runtime tokens files forms stored",
    "lock",
    "rows ranked contrasts",
    "adapters datasets oasst store fingerprints run optimizers",
    "decoding schedule trie_walk",
    "flight",
    "engine context",
    "server",
    "serving callbacks",
    "rollout expected reference live_reference",
    "asking",
    "judges comparing",
    "server_judge making_judges verifying votes implicit ensemble reward_model",
    "consistency",
    "evaluate held_out",
    "prompts checkpoints anchor answering",
    "head_to_head",
    "objectives watching early_stopping training_state",
    "forwards",
    "fit",
    "rehearsal",
    "stages",
    "recipes settings recipe_yaml show export",
    "reporting",
    "report card",
    "trainer",
    "spin_trainer recipe_settings",
    "recipe_reader recipe_text",
    "recipe_file",
    "planning",
    "cli_evaluate",
    "cli",
    "__main__",
    "__init__",
]
HEIGHT = {name: height for height, row in enumerate(LAYERS) for name in row.split()}
HOMES = {
    "accelerate": {"runtime"},
    "transformers": {"adapters", "tokens", "planning"},
    "peft": {"adapters", "tokens", "planning"},
    "x_transformers": {"adapters"},
    "jinja2": {"judging", "chat"},
    "safetensors": {"weights"},
    "pyarrow": {"files"},
    "openai": {"server"},
    "bitsandbytes": {"optimizers"},
}
WITHIN_LAYER = {
    ("losses", "logprobs"),  # log-probs are the losses' own words
    ("run", "datasets"),  # from_stage is a setting
    ("run", "store"),  # a run is stage folders
    ("run", "fingerprints"),  # by which it is compared
    ("fingerprints", "datasets"),  # from_stage is a setting
    ("fingerprints", "store"),  # the library's name
    ("run", "adapters"),  # weights of adapters
    ("context", "engine"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.Module) -> list[str]:
    """Modules imported at run time, those of `if TYPE_CHECKING` left out."""
    free = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in free:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_layers_above_it(path):
    own = room(path)
    assert own in HEIGHT, f"{own} has no layer; give it one in LAYERS and in docs/decisions.md"
    for name in imports(ast.parse(path.read_text())):
        top, _, rest = name.partition(".")
        if top == "self_rewarding_lm" and rest:
            other = rest.split(".")[0]
            below = HEIGHT[other] < HEIGHT[own] or other == own or (own, other) in WITHIN_LAYER
            assert below, f"{path.name}: {own} may not import {other}"
        elif top in HOMES:
            assert own in HOMES[top], f"{path.name}: {top} is imported in {HOMES[top]} alone"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_has_at_most_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_store_the_run_files_and_recipes_open_files(path):
    if room(path) in {
        "store",
        "stored",
        "lines",
        "durable",
        "lock",
        "run",
        "fingerprints",
        "files",
        "recipe_yaml",
        "report",
        "card",
    }:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) != "Run.open":
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            assert name not in {"open", "read_text", "write_text", "read_bytes", "write_bytes"}


def test_every_public_name_is_there_and_says_what_it_is():
    import self_rewarding_lm

    for name in self_rewarding_lm.__all__:
        assert (getattr(self_rewarding_lm, name).__doc__ or "").strip(), name
