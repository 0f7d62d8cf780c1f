"""Writes what is made from the settings: python -m tests.support.recipe_files

That is the JSON schema of recipes, and examples/recipe.yaml.
"""

from pathlib import Path

from self_rewarding_lm.recipes.schema import schema_text
from self_rewarding_lm.recipes.settings_file import recipe_text
from self_rewarding_lm.runs.installed import SCHEMA

EXAMPLE = Path(__file__).parents[2] / "examples" / "recipe.yaml"


def example_text() -> str:
    return recipe_text(schema="../self_rewarding_lm/recipes/recipe.schema.json")


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    EXAMPLE.write_text(example_text(), encoding="utf-8")
