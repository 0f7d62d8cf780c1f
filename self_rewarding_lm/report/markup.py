"""Text made safe and visible in HTML, and elements of it.

Knows nothing of runs.
"""

import html
import re

STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
"""Characters that nobody sees or that turn the order of others: shown by their number."""


class Safe(str):
    """A text that is HTML already."""

    def __html__(self) -> str:
        return self


def visible(value: object) -> object:
    """A text in which characters that would steer the page are shown by their number.

    HTML stays as it is: the template's parts and values that are Safe.
    """
    if hasattr(value, "__html__"):
        return value
    return STEERING.sub(lambda match: f"[U+{ord(match[0]):04X}]", str(value))


def safe(text: object) -> Safe:
    """A text as HTML, made visible and escaped; what is Safe stays as it is."""
    return text if isinstance(text, Safe) else Safe(html.escape(str(visible(text))))


def tag(name: str, *inner: object, **attributes: object) -> Safe:
    """An element. In names of attributes a last `_` is left out, others are `-`; None: absent."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{safe(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Safe(f"<{name}{written}>{''.join(map(safe, inner))}</{name}>")
