"""Charts as inline SVG, each with a title, a description in words and a table of its numbers.

Lines differ by dashes and marks, not by colour alone: class `s0`, `s1`, ... gives both. Knows
nothing of runs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from self_rewarding_lm.report.markup import Safe, tag
from self_rewarding_lm.text import amount, number

WIDTH, HEIGHT = 360, 222


LEFT, RIGHT, TOP, BOTTOM = 52, 16, 24, 44
"""Around the plot: names of the ticks, and of the axes above and below."""


SLANT = 40
COS, SIN = math.cos(math.radians(SLANT)), math.sin(math.radians(SLANT))


LETTER = 6.2
"""Width of a letter of a tick's name, on average."""


STYLES = 6
"""Styles of lines that differ; the seventh is the first again."""


MARKS = 6
"""Marks along a line that others cross."""


EACH = 24
"""Points of a lone line that has a mark on each; a longer one has none."""


ROWS = 12
"""Rows of a chart's table, evenly picked."""


Points = Sequence[tuple[float, float]]


class Table(NamedTuple):
    """A table of texts; the first cell of a row is its header. None is an empty cell.

    texts: so many first columns are texts, the others numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    texts: int = 1


class Chart(NamedTuple):
    """A drawing with its numbers. key: an id that no other chart of the page has. legend: which
    line is what, where the page's own does not say it.
    """

    key: str
    title: str
    svg: Safe
    table: Table
    legend: Safe = Safe("")


def line_chart(
    key: str,
    title: str,
    lines: Sequence[tuple[str, int, Points]],
    *,
    across: str,
    up: str,
    names: Sequence[str] = (),
    share: bool = False,
    has_legend: bool = False,
) -> Chart | None:
    """Lines over numbers, or over names at 0, 1, ....; None if no line has two points.

    lines: (name, style, points). across, up: what the axes are called. share: the axis goes from 0
    to 1.
    """
    lines = [line for line in lines if line[2]]
    if all(len(points) < 2 for _, _, points in lines):
        return None
    every = [point for _, _, points in lines for point in points]
    xs, ys = ([p[i] for p in every] for i in (0, 1))
    up_ticks = ticks(0, 1, 4) if share else ticks(min(ys), max(ys), 4)
    y_of = _scale((*up_ticks, *ys), HEIGHT - BOTTOM, TOP)
    if names:
        x_of = _scale((-0.3, len(names) - 0.7), LEFT, WIDTH - RIGHT)
        labels, room = _named(names, x_of)
    else:
        across_ticks = _whole(ticks(min(xs), max(xs), 4), xs)
        x_of = _scale((across_ticks[0], across_ticks[-1], *xs), LEFT, WIDTH - RIGHT)
        labels, room = [_label(x_of(x), number(x)) for x in across_ticks], 0.0
    parts = [_up_axis(up_ticks, y_of), *labels, *_axis_names(across, up, room)]
    for name, style, points in lines:
        marked = _marked(points, style, is_alone=len(lines) == 1)
        parts.append(_line(name, style, points, marked, x_of, y_of, names))
    words = "; ".join(_in_words(name, points, across, names) for name, _, points in lines)
    head = [across, *(name for name, _, _ in lines)]
    svg = _drawing(key, title, words, parts, room)
    table = Table(title, head, _rows(lines, names), texts=1 if names else 0)
    shown = legend([name for name, _, _ in lines]) if has_legend else Safe("")
    return Chart(key, title, svg, table, shown)


def bar_chart(
    key: str,
    title: str,
    bars: Sequence[tuple[str, float]],
    *,
    across: str,
    up: str,
    edges: Sequence[float] = (),
) -> Chart | None:
    """Bars, each with its name; None if there are not two.

    across, up: what the axes are called. edges: where bars of one width begin and end, if they
    stand over numbers.
    """
    if len(bars) < 2:
        return None
    counts = [count for _, count in bars]
    up_ticks = _whole(ticks(0, max(counts), 4), counts)
    y_of = _scale((0, *up_ticks, *counts), HEIGHT - BOTTOM, TOP)
    width = (WIDTH - LEFT - RIGHT) / len(bars)
    gap = 0.02 if edges else 0.1
    every = math.ceil((max(len(name) for name, _ in bars) + 1) * LETTER / width)
    parts = [_up_axis(up_ticks, y_of), *_axis_names(across, up, 0.0)]
    for place, (name, count) in enumerate(bars):
        x, y = LEFT + place * width, y_of(count)
        hint = tag("title", f"{name}: {number(count)}")
        parts.append(
            tag(
                "rect", hint, class_="bar", x=_at(x + gap * width), y=_at(y),
                width=_at((1 - 2 * gap) * width), height=_at(y_of(0) - y),
            )
        )  # fmt: skip
        if not edges and place % every == 0:
            parts.append(_label(x + width / 2, name))
    if edges:
        x_of = _scale((edges[0], edges[-1]), LEFT, WIDTH - RIGHT)
        inside = [x for x in ticks(edges[0], edges[-1], 4) if edges[0] <= x <= edges[-1]]
        parts += [_label(x_of(x), _tick(x)) for x in inside]
    most = max(bars, key=lambda bar: bar[1])
    words = f"{amount(len(bars), 'bar')}; the highest is {most[0]} with {number(most[1])}"
    rows = [(name, number(count)) for name, count in bars]
    svg = _drawing(key, title, words, parts)
    return Chart(key, title, svg, Table(title, [across, up], rows, texts=0))


def legend(names: Sequence[str]) -> Safe:
    """Which line is whose; empty if there is one."""
    if len(names) < 2:
        return Safe("")
    items = []
    for style, name in enumerate(names):
        style_class = f"s{style % STYLES}"
        line = tag("line", class_=f"line {style_class}", x1=2, y1=8, x2=42, y2=8)
        swatch = tag(
            "svg",
            line,
            _mark(22, 8, style),
            class_="swatch",
            viewBox="0 0 44 16",
            aria_hidden="true",
        )
        items.append(tag("li", swatch, name))
    return tag("ul", *items, class_="legend", aria_label="Lines")


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from below `low` to above `high`, about so many, 1, 2 or 5 apart times ten."""
    if low == high:
        room = abs(low) / 2 or 0.5
        low, high = low - room, high + room
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(f * power for f in (1, 2, 5, 10) if f * power * about >= (high - low) * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _scale(values: Sequence[float], start: float, end: float):
    low, high = min(values), max(values)
    return lambda value: (
        start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)
    )


def _whole(values: Sequence[float], of: Sequence[float]) -> Sequence[float]:
    """Of the ticks the whole numbers, where all values are whole: there is no half step."""
    whole = [value for value in values if value.is_integer()]
    return whole if len(whole) > 1 and all(float(one).is_integer() for one in of) else values


def _named(names: Sequence[str], x_of) -> tuple[list[Safe], float]:
    """Names below the axis, and the height that they need: aslant where one is too long.

    Where they are too many, some stand for all.
    """
    width = x_of(1) - x_of(0)
    if max(map(len, names)) * LETTER < width - 4:
        return [_label(x_of(place), name) for place, name in enumerate(names)], 0.0
    letters = min(18, int((x_of(0) + 12) / (LETTER * COS)))
    every = math.ceil(17 / width)
    y = HEIGHT - BOTTOM + 12
    labels = [
        tag(
            "text", _short(name, letters), x=_at(x_of(place) + 4), y=y, text_anchor="end",
            transform=f"rotate(-{SLANT} {_at(x_of(place) + 4)} {y})", aria_hidden="true",
        )
        for place, name in enumerate(names)
        if place % every == 0
    ]  # fmt: skip
    longest = min(letters, max(map(len, names)))
    return labels, max(0.0, longest * LETTER * SIN - 12)


def _axis_names(across: str, up: str, room: float) -> list[Safe]:
    middle = (LEFT + WIDTH - RIGHT) / 2
    below = tag("text", across, x=_at(middle), y=_at(HEIGHT - 8 + room), text_anchor="middle")
    above = tag("text", up, x=4, y=12)
    return [tag("g", below, above, class_="axis", aria_hidden="true")]


def _drawing(key: str, title: str, words: str, parts: Sequence[Safe], room: float = 0.0) -> Safe:
    """room: height that names below the axis need more."""
    return tag(
        "svg",
        tag("title", title, id=f"{key}-t"),
        tag("desc", words, id=f"{key}-d"),
        *parts,
        role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT + math.ceil(room)}",
        aria_labelledby=f"{key}-t {key}-d",
    )


def _up_axis(values: Sequence[float], y_of) -> Safe:
    parts = []
    for value in values:
        y = y_of(value)
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=_at(y), y2=_at(y)))
        text = tag("text", _tick(value), x=LEFT - 6, y=_at(y + 4), text_anchor="end")
        parts.append(text)
    return tag("g", *parts, aria_hidden="true")


def _label(x: float, text: str) -> Safe:
    return tag(
        "text", text, x=_at(x), y=HEIGHT - BOTTOM + 16, text_anchor="middle", aria_hidden="true"
    )


def _marked(points: Points, style: int, *, is_alone: bool) -> Points:
    """The points of a line that have a mark."""
    if is_alone:
        return points if len(points) <= EACH else ()
    every = math.ceil(len(points) / MARKS)
    return points[style * every // STYLES if len(points) > MARKS else 0 :: every]


def _line(
    name: str, style: int, points: Points, marked: Points, x_of, y_of, names: Sequence[str]
) -> Safe:
    style_class = f"s{style % STYLES}"
    places = " ".join(f"{_at(x_of(x))},{_at(y_of(y))}" for x, y in points)
    parts = [tag("polyline", class_=f"line {style_class}", points=places)]
    for x, y in marked:
        label = names[int(x)] if names else number(x)
        parts.append(_mark(x_of(x), y_of(y), style, f"{name}, {label}: {number(y)}"))
    return tag("g", *parts)


def _mark(x: float, y: float, style: int, hint: str | None = None) -> Safe:
    """A disc, square, triangle, diamond, cross or ring."""
    x, y = round(x, 1), round(y, 1)
    shape = (
        f"M{x - 3},{y}a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z",
        f"M{x - 3},{y - 3}h6v6h-6z",
        f"M{x},{y - 4}l4,7h-8z",
        f"M{x},{y - 4}l4,4l-4,4l-4,-4z",
        f"M{x - 3},{y - 3}l6,6m0,-6l-6,6",
        f"M{x - 3.5},{y}a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z",
    )[style % STYLES]
    title = tag("title", hint) if hint else Safe("")
    return tag("path", title, class_=f"mark s{style % STYLES}", d=shape)


def _in_words(name: str, points: Points, across: str, names: Sequence[str]) -> str:
    """A line in words."""
    ys = [y for _, y in points]
    ends = [
        names[int(x)] if names else f"{across} {number(x)}" for x in (points[0][0], points[-1][0])
    ]
    words = f"{name}: {number(ys[0])} at {ends[0]}"
    if len(points) == 1:
        return words
    words += f", {number(ys[-1])} at {ends[1]}"
    return f"{words}, lowest {number(min(ys))}, highest {number(max(ys))}"


def _rows(lines: Sequence[tuple[str, int, Points]], names: Sequence[str]) -> list[list[str | None]]:
    by_line = [dict(points) for _, _, points in lines]
    every = sorted({x for points in by_line for x in points})
    if len(every) > ROWS:
        every = [every[round(i * (len(every) - 1) / (ROWS - 1))] for i in range(ROWS)]
    return [
        [
            names[int(x)] if names else number(x),
            *(number(p[x]) if x in p else None for p in by_line),
        ]
        for x in every
    ]


def _short(text: str, letters: int) -> str:
    """A name's beginning and end: names of stages often differ in their last letters."""
    if len(text) <= letters:
        return text
    end = letters // 2
    return f"{text[: letters - end - 1]}…{text[len(text) - end :]}"


def _tick(value: float) -> str:
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _at(value: float) -> str:
    return f"{value:.1f}"
