"""The notebooks run from their first cell to their last, and are stored with what they put out.

`make notebooks` runs them as they stand and stores that.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest

from tests.docs.test_docs import check_names

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
SMALLER = {
    "loop": {"SFT_STEPS": 80, "PROMPTS": 32, "HELD_OUT": 10},
    "judge": {"SFT_STEPS": 20, "PROMPTS": 24},
}
"""Numbers with which they take seconds."""
PLOTS = {"loop": 3, "judge": 2}
MOST = 200_000  # bytes of a notebook with its outputs


def executed(path: Path, sizes: dict[str, int]):
    """The notebook with its outputs, run with the numbers of `sizes`."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    for name, size in sizes.items():
        [cell] = [it for it in notebook.cells if re.search(rf"^{name} = \d+$", it.source, re.M)]
        cell.source = re.sub(rf"^{name} = \d+$", f"{name} = {size}", cell.source, flags=re.M)
    where = {"metadata": {"path": str(path.parent)}}  # an error in a cell is raised
    options = {"timeout": 900, "kernel_name": "python3", "record_timing": False}
    NotebookClient(notebook, resources=where, **options).execute()
    return notebook


def stored(notebook) -> dict:
    """What is kept of an executed notebook: no warnings of other libraries, no versions."""
    code = code_of(notebook)
    for cell in code:
        texts = ("".join(out.get("text", "")) for out in cell["outputs"])
        kept = zip(cell["outputs"], texts, strict=True)
        cell["outputs"] = [out for out, text in kept if "site-packages" not in text]
    notebook["metadata"] = {
        "kernelspec": notebook["metadata"]["kernelspec"],
        "language_info": {"name": "python"},
        "code": digest(code),
    }
    return notebook


def code_of(notebook) -> list:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def check_plots(name: str, cells) -> None:
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == PLOTS[name]
    assert {out["output_type"] for out in outputs} <= {"stream", "execute_result", "display_data"}


def digest(cells) -> str:
    """Of the code."""
    code = "\0".join("".join(cell["source"]) for cell in cells)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_notebook_is_stored_with_what_its_code_put_out(path):
    """Run `make notebooks` where this fails."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = code_of(notebook)
    check_plots(path.stem, code)
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert notebook["metadata"]["code"] == digest(code)
    assert path.stat().st_size < MOST
    assert "site-packages" not in path.read_text(encoding="utf-8")  # a warning of this machine
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_a_notebook_calls_what_there_is(monkeypatch):
    """loop runs in the slow tests alone; judge is run small in each."""
    monkeypatch.syspath_prepend(str(NOTEBOOKS.parents[1] / "examples"))
    code = code_of(json.loads((NOTEBOOKS / "loop.ipynb").read_text(encoding="utf-8")))
    whole = "\n".join("".join(cell["source"]) for cell in code)
    names = {}
    check_names(whole, names)
    for module, name in re.findall(r"\b(quickstart|task)\.(\w+)", whole):
        assert hasattr(names[module], name), f"{module}.{name}"


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem == "loop")) for p in PATHS],
)
def test_a_notebook_runs_small(path):
    check_plots(path.stem, code_of(executed(path, SMALLER[path.stem])))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_notebook_runs_as_it_stands(path):
    check_plots(path.stem, code_of(executed(path, {})))


if __name__ == "__main__":
    for path in PATHS:
        notebook = stored(executed(path, {}))
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes")
