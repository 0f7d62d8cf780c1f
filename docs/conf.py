"""How Sphinx builds these pages: `make docs` writes them to docs/_build.

Nothing is fetched, neither when they are built nor when they are read: formulas are MathML.
"""

import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import notebook_pages  # noqa: E402
import reference_pages  # noqa: E402

import self_rewarding_lm  # noqa: E402

project = "self_rewarding_lm"
release = version = self_rewarding_lm.__version__
extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
smartquotes = False  # "warn" is a value
html_theme = "furo"
html_title = "self_rewarding_lm"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True}
copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"  # code, and no output
copybutton_prompt_text = r"\$ |>>> "  # prompts, which are not copied
copybutton_prompt_is_regexp = True


def mathml(node: Any, as_block: bool) -> str:
    """A formula as MathML; an error names its page."""
    try:
        return tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        place = f"{node.document['source']}, in {node.astext()!r}"
        raise ExtensionError(f"{place}: {error}") from error


def inline(translator: Any, node: Any) -> None:
    translator.body.append(mathml(node, as_block=False))
    raise SkipNode


def block(translator: Any, node: Any) -> None:
    formula = mathml(node, as_block=True)
    translator.body.append(f'<div style="overflow-x: auto">{formula}</div>')
    raise SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("builder-inited", write_pages)


def write_pages(_: Any) -> None:
    reference_pages.write_pages(HERE / "reference")
    notebook_pages.write_notebooks(HERE / "notebooks", HERE / "reference" / "notebooks")
