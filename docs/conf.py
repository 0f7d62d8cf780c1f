"""How Sphinx builds these pages: `make docs` writes them to docs/_build.

Nothing is fetched, neither when they are built nor when they are read: formulas are MathML.
"""

import re
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference_pages  # noqa: E402

import self_rewarding_lm  # noqa: E402

project = "self_rewarding_lm"
release = version = self_rewarding_lm.__version__
extensions = ["myst_parser"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
smartquotes = False  # "warn" is a value
html_theme = "furo"
html_title = "self_rewarding_lm"
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True}


def inline(translator: Any, node: Any) -> None:
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise SkipNode


def block(translator: Any, node: Any) -> None:
    formula = tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div style="overflow-x: auto">{formula}</div>')
    raise SkipNode


def only_pages_that_are_there(_: Any, page: str, source: list[str]) -> None:
    """Leave lines of the index that name no page out, so that a guide may be listed before it is
    written."""
    if page == "index":
        lines = source[0].splitlines()
        named = [HERE / f"{line}.md" for line in lines if re.fullmatch(r"\w+", line)]
        gone = {it.stem for it in named if not it.exists()}
        source[0] = "\n".join(line for line in lines if line not in gone)


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("source-read", only_pages_that_are_there)
    app.connect("builder-inited", lambda _: reference_pages.write_pages(HERE / "reference"))
