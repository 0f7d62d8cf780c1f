"""The notebooks run from their first cell to their last, with plots; they are stored without outputs."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
SMALLER = {
    "loop": {"SFT_STEPS": 80, "PROMPTS": 32, "HELD_OUT": 10},
    "judge": {"SFT_STEPS": 20, "PROMPTS": 24},
}
"""Numbers with which they take seconds."""
PLOTS = {"loop": 3, "judge": 2}


def executed(path: Path, sizes: dict[str, int]) -> list[dict]:
    """The cells of code with their outputs, run with the numbers of `sizes`."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    for name, size in sizes.items():
        [cell] = [it for it in notebook.cells if re.search(rf"^{name} = \d+$", it.source, re.M)]
        cell.source = re.sub(rf"^{name} = \d+$", f"{name} = {size}", cell.source, flags=re.M)
    where = {"metadata": {"path": str(path.parent)}}  # an error in a cell is raised
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check(path: Path, sizes: dict[str, int]) -> None:
    outputs = [out for cell in executed(path, sizes) for out in cell.outputs]
    plots = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(plots) == PLOTS[path.stem]


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_notebook_is_stored_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in cells}) == len(cells)


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_notebook_runs_small(path):
    check(path, SMALLER[path.stem])


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_notebook_runs_as_it_stands(path):
    check(path, {})
