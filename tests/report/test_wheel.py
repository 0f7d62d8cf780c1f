"""The library as it is shipped: built, installed where no checkout is, and used."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.report.test_report import Page, two_rounds

ROOT = Path(__file__).parents[2]


def run(*command, folder: Path) -> str:
    """What a command prints; the checkout is not on its path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return told.stdout.strip()


@pytest.mark.slow
def test_a_wheel_that_is_installed_elsewhere_writes_a_report(tmp_path):
    """Its dependencies are those of this environment, which a .pth file names."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "self_rewarding_lm"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), ".", folder=source)
    [wheel] = tmp_path.glob("*.whl")
    shutil.rmtree(source)
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"), folder=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel), folder=tmp_path)  # fmt: skip
    [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    code = "import self_rewarding_lm; print(self_rewarding_lm.__file__)"
    where = Path(run(str(python), "-c", code, folder=tmp_path))
    assert where == packages / "self_rewarding_lm" / "__init__.py"
    made = two_rounds(tmp_path / "run")
    command = str(tmp_path / "venv" / "bin" / "self-rewarding-lm")
    page = Path(run(command, "report", str(made.folder), folder=tmp_path))
    found = Page(page)
    assert len(found.examples) == 4 and "The loop as run" in found.text
    for kind in ("css", "js"):
        assert (ROOT / "self_rewarding_lm" / "report" / f"report.{kind}").read_text() in page.read_text()  # fmt: skip
    assert (packages / "self_rewarding_lm" / "py.typed").exists()
