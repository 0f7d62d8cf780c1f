"""Lists of stages: those of the paper, YAML files, and the plan of what a recipe takes.

Knows nothing of how a stage works inside or of what a run looks like afterwards. Begin with
`paper.py` (the paper's stages), then `reader.py` (a file becomes a recipe) and `plan/`.
"""

from self_rewarding_lm.recipes.paper import create_default_paper_config, paper_recipe
from self_rewarding_lm.recipes.reader import Recipe, read_recipe

__all__ = [
    "Recipe",
    "create_default_paper_config",
    "paper_recipe",
    "read_recipe",
]
