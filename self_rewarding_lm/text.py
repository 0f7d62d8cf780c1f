"""Numbers, times and tables as people read them in a text.

Pure: no files, no torch, nothing of runs.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Any


def number(value: float | None, unknown: str = "unknown") -> str:
    """A number in four digits, a count in full; `unknown` for None."""
    if value is None:
        return unknown
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def amount(count: int, noun: str, plural: str | None = None) -> str:
    """A count and what is counted: "1 row", "2,000 rows".

    plural: of the noun, if it is not the noun and an s.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def duration(seconds: float | None) -> str:
    """A time in its two largest units; "unknown" for None."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def printable(text: str, keep: str = "\n\t") -> str:
    """A text without characters that would steer a terminal.

    keep: control characters that stay. Other space becomes a space, all else U+FFFD.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


SHOWN_CHARACTERS = 120  # of a value in a table of a notebook


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """A small table for a notebook; values are shortened, and nothing in them is taken for HTML."""

    def line(cells: Sequence[Any], tag: str) -> str:
        texts = ("" if cell is None else str(cell) for cell in cells)
        short = (t if len(t) <= SHOWN_CHARACTERS else f"{t[:SHOWN_CHARACTERS]}…" for t in texts)
        inner = "".join(f'<{tag} style="text-align:left">{escape(t)}</{tag}>' for t in short)
        return f"<tr>{inner}</tr>"

    lines = [line(head, "th"), *(line(row, "td") for row in rows)]
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}</table>"


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Rows of one length as lines, in columns two spaces apart.

    sides: for each column "<" (to the left) or ">" (to the right, as numbers stand); the last one
    holds for all further columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides.ljust(len(widths), sides[-1])
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown. Its cells are Markdown too: who writes them escapes them."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
