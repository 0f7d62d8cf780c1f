"""The notebooks as pages, with the outputs and plots that they are stored with.

`conf.py` calls `write_notebooks`; `make notebooks` runs them and stores what they put out.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_notebooks(notebooks: Path, folder: Path) -> None:
    """Write each notebook as <name>.md, its plots beside it; what is the same is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(notebooks.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        files = {f"{path.stem}.md": "\n\n".join(_lines(path.stem, cells)).encode() + b"\n"}
        files |= {name: base64.b64decode(data) for name, data in _plots(path.stem, cells)}
        for name, content in files.items():
            page = folder / name
            if not page.exists() or page.read_bytes() != content:
                page.write_bytes(content)


def _lines(stem: str, cells: list[dict[str, Any]]) -> Iterator[str]:
    plots = (name for name, _ in _plots(stem, cells))
    heading = stem
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = source.partition("\n")[0].lstrip("# ")
            yield source
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                yield f"![{heading}]({next(plots)})"
            else:
                text = "".join(output.get("text") or data.get("text/plain", ""))
                yield f"```text\n{text.rstrip()}\n```"


def _plots(stem: str, cells: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Names of files and their content, in base64."""
    outputs = (output for cell in cells for output in cell.get("outputs", ()))
    images = (it["data"]["image/png"] for it in outputs if "image/png" in it.get("data", {}))
    for place, image in enumerate(images, 1):
        yield f"{stem}-{place}.png", image
