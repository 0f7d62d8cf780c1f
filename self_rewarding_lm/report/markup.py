"""HTML in pieces: text made safe and visible, elements, tables, numbers as people read them.

Knows nothing of runs.
"""

import html
import math
import re
from collections.abc import Sequence

STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
"""Characters that nobody sees or that turn the order of others: shown by their number."""


class Safe(str):
    """A text that is HTML already."""


def safe(text: object) -> Safe:
    """A text as HTML; characters that would steer the page are shown by their number."""
    if isinstance(text, Safe):
        return text
    shown = STEERING.sub(lambda found: f"[U+{ord(found[0]):04X}]", str(text))
    return Safe(html.escape(shown))


def tag(name: str, *inner: object, **attributes: object) -> Safe:
    """An element. In names of attributes a last `_` is left out, others are `-`; None: absent."""
    found = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{safe(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Safe(f"<{name}{found}>{''.join(map(safe, inner))}</{name}>")


def table(caption: str, head: Sequence[object], rows: Sequence[Sequence[object]]) -> Safe:
    """A table with a caption; the first cell of a row is its header. Wide ones scroll."""
    if not rows:
        return Safe("")
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    made = tag("table", tag("caption", caption), tag("thead", top), tag("tbody", *body))
    return tag("div", made, class_="wide", tabindex="0", role="region", aria_label=caption)


def details(title: str, *inner: object, open_: bool = False) -> Safe:
    """Something that is shown when it is asked for."""
    return tag("details", tag("summary", title), *inner, open="" if open_ else None)


def number(value: float | None) -> str:
    """A number in four digits, a count in full; "unknown" for None."""
    if value is None:
        return "unknown"
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """A time in its two largest units."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
