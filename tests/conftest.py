"""Types are checked while tests run, and `make test` ends with what was skipped, and why."""

from collections import Counter
from pathlib import Path

import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_packages
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).resolve().parents[1] / "self_rewarding_lm"
BEARTYPE = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--untyped", action="store_true", help="check no types while tests run")


def pytest_configure(config: pytest.Config) -> None:
    """Each function of the package checks what it takes and gives.

    jaxtyping's hook checks shapes as well and costs several times as much. So it is for the modules
    that have shapes, and for those with names that only type checkers import: it passes over what
    it cannot resolve, where beartype's own hook raises.
    """
    if config.getoption("--untyped"):
        return
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    with_shapes = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path, text in texts.items()
        if "jaxtyping" in text or "TYPE_CHECKING" in text
    ]
    conf = BeartypeConf(is_pep484_tower=True, claw_is_pep526=False)
    beartype_packages((PACKAGE.name,), conf=conf)
    install_import_hook(with_shapes, BEARTYPE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped, and how many."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
