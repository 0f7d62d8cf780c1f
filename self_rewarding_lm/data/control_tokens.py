"""Control tokens, and which characters of a text come from data.

A control token gives a prompt its structure, such as <|im_end|>. Where a user or a model wrote its
text, it is a text like any other. Knows texts alone: no ids, no tokenizer, no template.
"""

import re
from collections.abc import Iterable
from functools import cached_property

FIRST_MARK = 0xF0000  # private characters, which no text in any language has


Span = tuple[int, int]


Piece = tuple[str, bool]
"""A part of a text, and whether control tokens count as plain text in it."""


class Filled(str):
    """A text that was put together, which knows the spans that come from data.

    It is a str in all else. Strings that are made of it know no spans.
    """

    spans: tuple[Span, ...] = ()


def fill(parts: Iterable[Piece]) -> Filled:
    """The parts as one text. A part is (text, whether it comes from data)."""
    texts, spans, length = [], [], 0
    for text, is_data in parts:
        if is_data and text:
            spans.append((length, length + len(text)))
        texts.append(text)
        length += len(text)
    filled = Filled("".join(texts))
    filled.spans = tuple(spans)
    return filled


def from_data(text: str) -> Filled:
    """A text that comes from data as a whole, such as one that a model wrote."""
    return fill([(text, True)])


class Controls:
    """The texts of a tokenizer's control tokens."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        known = sorted({text for text in texts if text}, key=lambda text: (-len(text), text))
        self.texts = tuple(known)
        self._pattern = re.compile("|".join(map(re.escape, known)) or r"(?!)")

    def spans(self, text: str) -> list[Span]:
        """Where they stand in a text; of several at one place the longest, as tokenizers do."""
        return [found.span() for found in self._pattern.finditer(text)]

    def masks(self, texts: Iterable[str]) -> "Mask | None":
        """What hides them in these texts; None where there are none to hide."""
        texts = list(texts)
        found = {t[start:end] for t in texts for start, end in self.spans(t)}
        return Mask(self, found, texts) if found else None


class Mask:
    """Private characters in place of control tokens' texts.

    A template that is rendered with hidden texts tells which of the control tokens in its rendering
    are its own. found: the texts to be hidden. texts: those in which no such character may stand.
    """

    def __init__(self, controls: Controls, found: Iterable[str], texts: Iterable[str]) -> None:
        self.controls = controls
        taken = {c for text in texts for c in set(text) if ord(c) >= FIRST_MARK}
        free = (chr(i) for i in range(FIRST_MARK, 0x10FFFF) if chr(i) not in taken)
        self._marks = dict(zip(sorted(found), free, strict=False))
        self._texts = {mark: text for text, mark in self._marks.items()}

    def hide(self, text: str) -> str:
        """A text with all its control tokens hidden."""
        return self._hidden(text, self.controls.spans(text))

    def hide_data(self, text: Filled) -> str:
        """A text with those hidden of which a character comes from data."""
        hidden, spans = [], iter([*text.spans, (len(text), len(text))])
        span = next(spans)
        for start, end in self.controls.spans(text):
            while span[1] <= start and span[0] < len(text):
                span = next(spans)
            if span[0] < end and span[1] > start:
                hidden.append((start, end))
        return self._hidden(text, hidden)

    def pieces(self, masked: str) -> list[Piece]:
        """The text again, in pieces that are encoded one by one.

        What was hidden is plain, and so is what lies between two such places without a control
        token of its own.
        """
        parts = self._split.split(masked)
        found: list[tuple[list[str], bool]] = []
        for place, part in enumerate(parts):
            is_hidden = place % 2 == 1
            between = 0 < place < len(parts) - 1 and not self.controls.spans(part)
            if is_hidden:
                part = "".join(self._texts[mark] for mark in part)
            if found and found[-1][1] and (is_hidden or between):
                found[-1][0].append(part)
            elif part:
                found.append(([part], is_hidden))
        return [("".join(texts), plain) for texts, plain in found]

    @cached_property
    def _split(self) -> re.Pattern[str]:
        return re.compile(f"([{''.join(self._texts)}]+)")

    def _hidden(self, text: str, spans: Iterable[Span]) -> str:
        parts, last = [], 0
        for start, end in spans:
            parts += [text[last:start], self._marks[text[start:end]]]
            last = end
        return "".join([*parts, text[last:]])
