"""Control tokens, and which characters of a text come from data.

A control token, such as <|im_end|>, gives a prompt its structure. If a user or a model wrote its
text, it is a text like any other. Knows only texts: no ids, no tokenizer, no template.
"""

import re
from collections.abc import Iterable
from functools import cached_property

FIRST_MARK = 0xF0000  # private characters, which no text in any language has


Span = tuple[int, int]


Piece = tuple[str, bool]
"""A part of a text, and whether control tokens are plain text in it."""


class Filled(str):
    """A text that was put together from parts, and the spans of those that come from data.

    Otherwise it is a str. Strings that are made from it have no spans.
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
    """A text all of which comes from data, such as one that a model wrote."""
    return fill([(text, True)])


class Controls:
    """The texts of a tokenizer's control tokens."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        unique = {text for text in texts if text}
        self.texts = tuple(sorted(unique, key=lambda text: (-len(text), text)))  # longest first
        self._pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")

    def spans(self, text: str) -> list[Span]:
        """Where they stand in a text; of several at one place the longest, as tokenizers do."""
        return [match.span() for match in self._pattern.finditer(text)]

    def mask_for(self, texts: Iterable[str]) -> "Mask | None":
        """A mask that hides them in these texts; None if they hold none."""
        texts = list(texts)
        written = {text[start:end] for text in texts for start, end in self.spans(text)}
        return Mask(self, written, texts) if written else None


class Mask:
    """Private characters in place of control tokens' texts.

    When a template is rendered with masked messages, the control tokens that stand in the rendering
    are the template's own. written: the texts to hide. texts: those to hide them in, none of whose
    characters may serve as a mark.
    """

    def __init__(self, controls: Controls, written: Iterable[str], texts: Iterable[str]) -> None:
        self.controls = controls
        used = {c for text in texts for c in set(text) if ord(c) >= FIRST_MARK}
        free = (chr(i) for i in range(FIRST_MARK, 0x10FFFF) if chr(i) not in used)
        self._marks = dict(zip(sorted(written), free, strict=False))
        self._texts = {mark: text for text, mark in self._marks.items()}

    def hide(self, text: str) -> str:
        """A text with all its control tokens hidden."""
        return self._hide_spans(text, self.controls.spans(text))

    def hide_data(self, text: Filled) -> str:
        """A text with those control tokens hidden that come from data, if only in part."""
        hidden, data_spans = [], iter([*text.spans, (len(text), len(text))])
        data_start, data_end = next(data_spans)
        for start, end in self.controls.spans(text):
            while data_end <= start and data_start < len(text):
                data_start, data_end = next(data_spans)
            if data_start < end and data_end > start:
                hidden.append((start, end))
        return self._hide_spans(text, hidden)

    def pieces(self, masked: str) -> list[Piece]:
        """The text as it was before `hide`, in pieces that are encoded one by one.

        What was hidden is plain. What lies between two such places is plain too, unless it has a
        control token of its own.
        """
        parts = self._mark_pattern.split(masked)  # marks stand at odd places
        pieces: list[tuple[list[str], bool]] = []  # texts to join, and whether they are plain
        for place, part in enumerate(parts):
            is_hidden = place % 2 == 1
            is_between = 0 < place < len(parts) - 1 and not self.controls.spans(part)
            if is_hidden:
                part = "".join(self._texts[mark] for mark in part)
            if pieces and pieces[-1][1] and (is_hidden or is_between):
                pieces[-1][0].append(part)
            elif part:
                pieces.append(([part], is_hidden))
        return [("".join(texts), is_plain) for texts, is_plain in pieces]

    @cached_property
    def _mark_pattern(self) -> re.Pattern[str]:
        return re.compile(f"([{''.join(self._texts)}]+)")

    def _hide_spans(self, text: str, spans: Iterable[Span]) -> str:
        parts, last = [], 0
        for start, end in spans:
            parts += [text[last:start], self._marks[text[start:end]]]
            last = end
        return "".join([*parts, text[last:]])
