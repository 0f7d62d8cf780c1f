"""What a benchmark says: a line for each entry, a table at the end, and a JSON file."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from floors import Floors
from timing import Timed


class Report:
    """The entries so far. A JSON file is written after each; entries of other names that it has
    already are kept, each with the settings and the revision it was measured with."""

    def __init__(
        self, file: Path | None, machine: dict, settings: dict, floors: Floors, started: float
    ) -> None:
        self.file, self.machine, self.settings, self.floors = file, machine, settings, floors
        self.entries: list[dict] = []
        self.earlier: list[dict] = []
        if file is not None and file.exists():
            self.earlier = json.loads(file.read_text(encoding="utf-8"))["results"]
        self.started = started

    def begin(self) -> None:
        """Say what is measured, and on what."""
        machine, rates = self.machine, self.floors.matrix
        bf16 = ", ".join(machine["bf16_instructions"]) or "none"
        print(
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
            f"bf16 instructions: {bf16}; torch {machine['versions']['torch']}, "
            f"revision {machine['revision']}"
        )
        products = ", ".join(f"{r / 1e9:.1f} Gflop/s in {d}" for d, r in rates.items())
        print(f"floors: copy {self.floors.bandwidth / 1e9:.1f} GB/s, products {products}")
        for name, value in self.settings.items():
            print(f"  {name}: {value}")

    def add(self, entry: dict) -> None:
        """Print an entry and write the file."""
        own = {"revision": self.machine["revision"], "settings": self.settings}
        self.entries.append({**entry, **own, "at": time.strftime("%Y-%m-%dT%H:%M:%S")})
        print(line_of(entry))
        if floor := entry.get("floor"):
            print(
                f"  at least {floor['bytes'] / 1e9:.2f} GB ({floor['bytes_seconds']:.2f} s at the "
                f"copy's rate) and {floor['operations'] / 1e9:.0f} Gflop "
                f"({floor['operations_seconds']:.2f} s at the product's); "
                f"taken {floor['taken_seconds']:.2f} s"
            )
        sys.stdout.flush()
        if self.file is None:
            return
        names = {one["name"] for one in self.entries}
        kept = [one for one in self.earlier if one["name"] not in names]
        content = {
            "machine": self.machine,
            "floors": asdict(self.floors),
            "results": [*kept, *self.entries],
        }
        draft = self.file.with_name(f"{self.file.name}.tmp")
        draft.write_text(json.dumps(content, indent=2), encoding="utf-8")
        draft.replace(self.file)

    def end(self) -> None:
        """The table."""
        print(f"\n{(time.perf_counter() - self.started) / 60:.1f} min in all")
        for entry in self.entries:
            print(line_of(entry))


def line_of(entry: dict) -> str:
    """An entry in a line."""
    if entry.get("failure"):
        return f"{entry['name']:32} ours {entry['ours']:8.1f}   peer: {entry['failure']}"
    parts = [
        f"{entry['name']:32} ours {entry['ours']:8.2f}   peer {entry['peer']:8.2f} "
        f"{entry['unit']:12}   ratio {entry['ratio']:6.2f}"
    ]
    if entry.get("bar"):
        parts.append(f"(bar {entry['bar']:g})")
    if runs := entry.get("runs"):
        ratios = [f"{run['ratio']:.2f}" for run in runs]
        parts.append(f"runs {', '.join(ratios)}")
    if "best" in entry:
        parts.append(f"rows: ours {entry['best']['ours']}, peer {entry['best']['peer']}")
    if entry.get("disturbed"):
        parts.append(f"DISTURBED {entry['disturbed']}")
    if "floor" in entry:
        parts.append(f"{entry['floor']['share_reached']:.0%} of the floor")
    if "seconds" in entry:
        parts.append(f"{entry['seconds']:.0f} s")
    return "   ".join(parts)


def told_run(run: int, runs: int, now: dict[str, Timed], left: float, later: float) -> None:
    """Say how a run went, and what remains of this trial and, roughly, of the others."""
    sides = ", ".join(
        f"{name} {one.seconds:.1f} s ({one.rate('tokens/s'):.1f} tokens/s"
        f"{f', others {one.others:.2f} cores: DISTURBED' if one.disturbed else ''})"
        for name, one in now.items()
    )
    print(
        f"  run {run + 1} of {runs}: {sides}; left: {left / 60:.1f} min here, "
        f"roughly {later / 60:.0f} min for what follows",
        flush=True,
    )
