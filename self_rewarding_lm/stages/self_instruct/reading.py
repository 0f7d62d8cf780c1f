"""What a model wrote behind a numbered list, read as instructions.

The rules would rather lose an instruction than keep one with its answer in it. They look at lines
and know nothing of models and tokens.
"""

import re
from collections.abc import Sequence

from self_rewarding_lm.stages.self_instruct.filters import FilterCounts

PARSED_CHARACTERS = 20_000  # of the start of a model's text; bounds the work of a parse


SKIPPED_NUMBERS = 2  # a model that counts 9, 10, 13 still goes on with its list


_MARKUP, _BOLD = r"[\s*_#>(\[`]{0,8}", r"[*_]{0,3}"


_LABELS = r"(?:task|instruction|question|prompt|item|example)"


_ANSWERS = r"(?:answer|response|output|input|solution|explanation)s?"


_NUMBERED = re.compile(  # "9.", "9)", "**9.**", "- 9.", "### Task 9:", "Task 9" with nothing behind
    rf"(?i){_MARKUP}(?:[-+•–]\s{{1,3}})?{_MARKUP}(?:"
    rf"{_LABELS}[\s*_]{{0,3}}\#?(?P<named>\d{{1,3}})[*_)\]]{{0,3}}(?:\s{{0,2}}[-–—:：.]|\s*$)"
    rf"|(?P<bare>\d{{1,3}}){_BOLD}[.):：．）、\]](?!\d)){_BOLD}\s*"
)


_BULLET = re.compile(r"\s*(?:[-*+•‣◦–·]|(?P<letter>[a-hA-H])[.)])\s+(?=\S)")


_LABEL = re.compile(rf"(?i)\A[ *_#>]{{0,8}}(?:{_LABELS}|Q|User|Human){_BOLD}[:：]{_BOLD}\s*")


_NEW_ITEM = re.compile(rf"(?i){_MARKUP}(?:task|instruction){_BOLD}[:：]")


_ANSWER = re.compile(  # "Answer:", "**Expected output:**", "### Response"
    rf"(?i){_MARKUP}(?:(?:your|example|sample|expected|possible|suggested|correct|model)\s{{1,3}})?"
    rf"(?:{_ANSWERS}(?:\s{{0,2}}\d{{1,3}})?|assistant|A){_BOLD}[:：]"
    rf"|\s*[*#]{{1,6}}\s{{0,3}}{_ANSWERS}\s{{0,2}}\d{{0,3}}\W*$"
)


_ANSWER_INLINE = re.compile(  # "Add 2 and 3. Answer: 5": behind a sentence, with a capital
    r"(?<=[.?!:;…\"'”’)\]])[\s*_]{1,8}(?:Answer|Response|Output|Input|Solution)s?[*_]{0,3}[:：]"
)


_BREAK = re.compile(r"\s*(?:(?:[-*_=#~—]\s{0,2}+){3,}+$|#{1,6}\s+\S)")  # a separator or a heading


_FENCE = re.compile(r"\s*(?:```|~~~)")


_SENTENCE_END = re.compile(r"[.?!…。？！][\"'”’)*_\]]{0,3}$")


_PREAMBLE = re.compile(
    r"(?i)\s*(?:(?:sure|certainly|of course|absolutely|okay|ok|great|understood)\s{0,2}[,.!:]"
    r"|i(?:['’]m|\sam)\ssorry,?\sbut\b|as\san\sai\b"
    r"|(?:here|below|these|the following|following|further|more|additional|new)\b[^\n]{0,200}"
    r"\b(?:task|instruction|question|prompt|item|example|list|continu)[^\n]{0,200}:$)"
)


_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»"}


def parse_instructions(
    text: str, *, first_number: int, finished: bool = True, counts: FilterCounts | None = None
) -> list[str]:
    """The instructions in a model's continuation of a list that ended with `first_number`.

    An item starts with a number at the start of a line ("10.", "10)", "**10.**", "Task 10:"), with
    `Task:` or `Instruction:`, with a bullet where the text is a list of bullets, or with the text
    itself, as a base model goes on behind "9.". A chat model may begin at 1; numbers may repeat, or
    skip two.

    To an item belong the next line, where the one before is no whole sentence; a list, code or an
    indented line below it; behind an empty line only what it announced with a colon. The rest is
    taken for an answer and left out up to the next item: what `Answer:`, `Response:`, `Output:` or
    `Input:` opens, a separator (---, ###, ***) or heading, another paragraph. A list from 1 on,
    below an item or in an answer, is part of it as long as it counts on. Preambles ("Sure! Here are
    more tasks:"), bold markup, and quotes and labels around an item are taken off. Items without a
    letter are none.

    finished: False where a limit cut the text off. The item that was being written there is
    dropped, even if it is the only one, and counted in `counts` as `unfinished`; one that its
    answer follows is whole. Only the first 20,000 characters are read; a longer text counts as cut
    off there.
    """
    reader = _Reader(text[:PARSED_CHARACTERS], first_number)
    whole = len(reader.found)
    reader.close()
    if (finished and len(text) <= PARSED_CHARACTERS) or len(reader.found) == whole:
        return reader.found
    if counts is not None:
        counts.count("unfinished")
    return reader.found[:whole]


class _Reader:
    """Reads line by line; `item` has the lines of the instruction that is being written.

    number: of the last item. indent: of its line. inner: number and indent of the next line of a
    list in the item or in an answer. bullets: the indent of bullets that are items. lead: the item
    began without a number. started: an item or an answer was seen. blank: the line before is empty.
    fenced: within a block of code. wrapped: the whole list stands in one.
    """

    def __init__(self, text: str, first_number: int) -> None:
        self.found: list[str] = []
        self.item: list[str] | None = None
        self.number, self.indent = first_number - 1, 0
        self.inner: tuple[int, int] | None = None
        self.bullets: int | None = None
        self.lead = self.started = self.blank = self.fenced = self.wrapped = False
        lines = text.splitlines()
        numbers = {_number(marker) for marker in map(_NUMBERED.match, lines) if marker}
        self.lead_is_item = first_number + 1 in numbers and first_number not in numbers
        for line in lines:
            self._read(line)

    def close(self) -> None:
        """The item is whole; what follows belongs to none until another begins."""
        if self._is_preamble():  # as if it had not been there
            self.started, self.number = False, self.number - 1
        elif text := _cleaned(self.item or []):
            self.found.append(text)
        self.item, self.inner, self.lead = None, None, False

    def _read(self, line: str) -> None:
        indent = len(line) - len(line.lstrip())
        fence, numbered = _FENCE.match(line), _NUMBERED.match(line)
        below = self._announced() or indent > self.indent + 1
        if self.wrapped and not self.fenced and line.strip() in ("```", "~~~"):
            self.close()
        elif self.fenced or (fence and self.started and not self._is_preamble()):
            self._go_on(line, whole=not self.fenced and self.blank and not below)
            self.fenced ^= fence is not None
        elif fence or not line.strip():
            self.blank, self.wrapped = True, self.wrapped or fence is not None
            return
        elif _ANSWER.match(line):
            self.close()
            self.started = True
        elif numbered:
            self._read_number(line, numbered, indent=indent, below=below)
        elif _NEW_ITEM.match(line):
            self._begin(line, self.number + 1, indent=indent)
        elif _BREAK.match(line):
            self.close()
        elif bullet := _BULLET.match(line):
            self._read_bullet(line, bullet, indent=indent, below=below)
        else:
            self._read_plain(line, below=below)
        self.blank = False

    def _read_number(self, line: str, marker: re.Match[str], *, indent: int, below: bool) -> None:
        number, rest = _number(marker), line[marker.end() :]
        if self.lead and not self.lead_is_item and (self._announced() or self._is_preamble()):
            self.item, self.started = None, False  # "More tasks:", and here they come
        if self.inner and number == self.inner[0] and abs(indent - self.inner[1]) <= 1:
            self._go_on(line)
            self.inner = (number + 1, indent)
        elif not self.started and number == 1 <= self.number and _counts_on(rest, 1):
            self._read_plain(line, below=False)  # "1. do this 2. do that": one item's own numbers
        elif self._is_next(number, below=below):
            self._begin(rest, number, indent=indent)
        elif number == 1 or self.item is None:
            self._go_on(line, whole=self.blank and not below)
            self.inner = (number + 1, indent)
        else:
            self._read_plain(line, below=below)

    def _is_next(self, number: int, *, below: bool) -> bool:
        follows = self.number < number <= self.number + 1 + SKIPPED_NUMBERS
        if not self.started or self._is_empty():
            return True
        if self.item is None:
            return follows
        return (follows or number == self.number) and not (number == 1 and below)

    def _read_bullet(self, line: str, bullet: re.Match[str], *, indent: int, below: bool) -> None:
        top = self.bullets is not None and self.item is not None and indent <= self.bullets + 1
        if bullet["letter"] and not self.started:
            self._read_plain(line, below=below)
        elif top or not self.started or self._is_preamble():
            self.bullets = indent
            self._begin(line[bullet.end() :], self.number + 1, indent=indent)
        else:
            self._go_on(line, whole=self.blank and not below and self.inner is None)
            self.inner = self.inner or (0, indent)

    def _read_plain(self, line: str, *, below: bool) -> None:
        if not self.started:
            self._begin(line, self.number + 1, indent=0)
            self.lead = self.item is not None
        elif self.item:
            broken = not self.blank and not _SENTENCE_END.search(self.item[-1])
            self._go_on(line, whole=not (below or broken or self._is_empty()))

    def _begin(self, rest: str, number: int, *, indent: int) -> None:
        self.close()
        self.started, self.number, self.indent, self.item = True, number, indent, []
        for _ in range(3):  # "1. 1. Name a fruit."
            inner = _NUMBERED.match(rest)
            if inner and not _counts_on(rest, _number(inner)):
                rest = rest[inner.end() :]
        self._go_on(rest, whole=_ANSWER.match(rest) is not None)

    def _go_on(self, line: str, *, whole: bool = False) -> None:
        """The line belongs to the item, if there is one that was not whole before."""
        if whole:
            self.close()
        if self.item is not None:
            answer = None if self.fenced else _ANSWER_INLINE.search(line)
            self.item.append(line[: answer.start()] if answer else line)
            if answer:
                self.close()

    def _is_empty(self) -> bool:
        return self.item is not None and not any(line.strip() for line in self.item)

    def _announced(self) -> bool:
        return bool(self.item) and self.item[-1].rstrip(" *_").endswith((":", "："))

    def _is_preamble(self) -> bool:
        text = "\n".join(self.item or []).rstrip()
        return self.lead and not self.lead_is_item and _PREAMBLE.match(text) is not None


def _number(marker: re.Match[str]) -> int:
    return int(marker["named"] or marker["bare"])


def _counts_on(rest: str, number: int) -> bool:
    return re.search(rf"(?<!\d){number + 1}[.)]\s", rest) is not None


def _cleaned(lines: Sequence[str]) -> str:
    """The text of an item, white space folded outside of code; "" where it has no letter."""
    kept, fenced = [], False
    for line in lines:
        fence = _FENCE.match(line) is not None
        kept.append(line.rstrip() if fenced or fence else " ".join(line.split()))
        fenced ^= fence
    if fenced and _FENCE.match(kept[-1]):
        kept.pop()  # nothing stands behind it
    text = _LABEL.sub("", "\n".join(kept).strip(), count=1)
    text = re.sub(r"(?<!\w)\*\*(?=\S)([^*\n]+)(?<=\S)\*\*(?!\w)", r"\1", text)
    if text.count("**") % 2:  # the other one of the two went with the number
        text = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", text, count=1)
    text = text.strip()
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text if any(character.isalpha() for character in text) else ""
