"""Control tokens, and which characters of a text come from data.

A control token, such as <|im_end|>, gives a prompt its structure. If a user or a model wrote its
text, it is a text like any other. Knows only texts: no ids, no tokenizer, no template.
"""

import re
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import chain

from self_rewarding_lm.errors import DataError

MARKS = (range(0xF0000, 0x10FFFE), range(0xE000, 0xF900), range(0x40000, 0xE0000))
"""Characters that may stand for a control token: private ones, which no text in any language has,
and those that belong to no script."""


THOUGHT = re.compile(r"[<\[◁].{0,30}(think|thought|reason).{0,30}[>\]▷]", re.IGNORECASE)
"""The texts of tokens between which a model thinks. They belong to its answer."""


Span = tuple[int, int]


FindSpans = Callable[[str], list[Span]]
"""Where control tokens stand in a text."""


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
    """The texts of a tokenizer's control tokens.

    thoughts: special tokens that are none, since models write them; a text that holds one is
    encoded with it.
    """

    def __init__(self, texts: Iterable[str] = (), thoughts: Iterable[str] = ()) -> None:
        self.texts = _longest_first(texts)
        self._pattern = _any_of(self.texts)
        self._recognised = _any_of(_longest_first([*self.texts, *thoughts]))

    def spans(self, text: str) -> list[Span]:
        """Where they stand in a text; of several at one place the longest, as tokenizers do."""
        return [match.span() for match in self._pattern.finditer(text)]

    def is_plain(self, text: str) -> bool:
        """Whether a text holds none of them, and no token of a thought."""
        return self._recognised.search(text) is None

    def mask_for(self, texts: Iterable[str], find: FindSpans | None = None) -> "Mask | None":
        """A mask that hides them in these texts; None if they hold none.

        find: says where they stand; default `spans`. Raises DataError if the texts use so many
        different characters that none is left to stand for them.
        """
        find = find or self.spans
        texts = list(texts)
        written = {text[start:end] for text in texts for start, end in find(text)}
        return Mask(self, written, texts, find) if written else None


class Mask:
    """Private characters in place of control tokens' texts.

    When a template is rendered with masked messages, the control tokens that stand in the rendering
    are the template's own. written: the texts to hide. texts: those to hide them in, none of whose
    characters may serve as a mark. find: says where the texts to hide stand.
    """

    def __init__(
        self, controls: Controls, written: set[str], texts: Iterable[str], find: FindSpans
    ) -> None:
        self.controls = controls
        self._find = find
        used = {character for text in texts for character in set(text)}
        free = (mark for mark in map(chr, chain(*MARKS)) if mark not in used)
        self._marks = dict(zip(sorted(written), free, strict=False))
        if len(self._marks) < len(written):
            raise DataError(
                f"a text of {len(used)} different characters leaves none that could stand for the "
                "control tokens in it while the chat template is rendered; take control tokens "
                "such as <|im_end|> out of it."
            )
        self._texts = {mark: text for text, mark in self._marks.items()}

    def hide(self, text: str) -> str:
        """A text with all its control tokens hidden."""
        return self._hide_spans(text, self._find(text))

    def hide_data(self, text: Filled) -> str:
        """A text with those control tokens hidden that come from data, if only in part."""
        hidden, data_spans = [], iter([*text.spans, (len(text), len(text))])
        data_start, data_end = next(data_spans)
        for start, end in self._find(text):
            while data_end <= start and data_start < len(text):
                data_start, data_end = next(data_spans)
            if data_start < end and data_end > start:
                hidden.append((start, end))
        return self._hide_spans(text, hidden)

    def pieces(self, masked: str) -> list[Piece]:
        """The text as it was before `hide`, in pieces that are encoded one by one.

        What was hidden is plain. What lies between two such places is plain too, unless it has a
        control token of its own, or a token of a thought.
        """
        parts = self._mark_pattern.split(masked)  # marks stand at odd places
        pieces: list[tuple[list[str], bool]] = []  # texts to join, and whether they are plain
        for place, part in enumerate(parts):
            is_hidden = place % 2 == 1
            is_between = 0 < place < len(parts) - 1 and self.controls.is_plain(part)
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


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({text for text in texts if text}, key=lambda text: (-len(text), text)))


def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
