"""What a model wrote after a numbered list, read as instructions.

The rules would rather lose an instruction than keep one with its answer in it. They look at lines;
this file knows nothing of models and tokens. Begin with `parse_instructions`.
"""

import re
from collections.abc import Sequence

from self_rewarding_lm.stages.self_instruct.filters import FilterCounts

PARSED_CHARACTERS = 20_000  # of the start of a model's text; bounds the work of a parse


SKIPPED_NUMBERS = 2  # a model that counts 9, 10, 13 still goes on with its list


_MARKUP, _BOLD = r"[\s*_#>(\[`]{0,8}", r"[*_]{0,3}"


_LABELS = r"(?:task|instruction|question|prompt|item|example)"


_ANSWERS = r"(?:answer|response|output|input|solution|explanation)s?"


_NUMBERED = re.compile(  # "9.", "9)", "**9.**", "- 9.", "### Task 9:", "Task 9" with nothing after
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


_ANSWER_INLINE = re.compile(  # "Add 2 and 3. Answer: 5": after a sentence, with a capital
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
    `Task:` or `Instruction:`, with a bullet if the text is a list of bullets, or at the start of
    the text, because a base model goes on after "9.". A chat model may begin at 1; numbers may
    repeat, or skip two.

    To an item belong the next line, if the line before ends no sentence; a list, code or an
    indented line below it; after an empty line only what it announced with a colon. All else is
    taken for an answer and left out up to the next item: what `Answer:`, `Response:`, `Output:` or
    `Input:` opens, a separator (---, ###, ***) or heading, another paragraph. A list that starts at
    1, below an item or in an answer, is part of it as long as it counts on. Preambles ("Sure! Here
    are more tasks:"), bold markup, and quotes and labels around an item are taken off. An item
    without a letter is left out.

    finished: False if a limit cut the text off. The item that was being written there is dropped,
    even if it is the only one, and counted in `counts` as `unfinished`; an item that its answer
    follows is whole. Only the first 20,000 characters are read; a longer text counts as cut off.
    """
    reader = _ListReader(text[:PARSED_CHARACTERS], first_number)
    whole = len(reader.instructions)
    reader.close_item()
    was_cut = not finished or len(text) > PARSED_CHARACTERS
    if not was_cut or len(reader.instructions) == whole:
        return reader.instructions
    if counts is not None:
        counts.count("unfinished")
    return reader.instructions[:whole]


class _ListReader:
    """Reads a list line by line and collects its instructions.

    An item is a list of lines; between an item that is whole and the next one `item` is None, and
    what is read there is an answer.
    """

    def __init__(self, text: str, first_number: int) -> None:
        self.instructions: list[str] = []
        self.item: list[str] | None = None
        """Lines of the instruction that is being written."""
        self.item_indent = 0
        self.number = first_number - 1
        """Of the last item."""
        self.began_unnumbered = False
        """The item is the text's beginning, without a number or a bullet."""
        self.has_begun = False
        """An item or an answer was seen."""
        self.inner_list: tuple[int, int] | None = None
        """Number and indent of the next line of a list within the item or an answer."""
        self.bullet_indent: int | None = None
        """Of bullets that are items themselves."""
        self.after_blank = False
        self.in_code = False
        self.list_in_code = False
        """The whole list stands in a block of code."""
        lines = text.splitlines()
        numbers = {_number(marker) for marker in map(_NUMBERED.match, lines) if marker}
        # a base model goes on after "9.": its own first number is then 10
        self.beginning_is_item = first_number + 1 in numbers and first_number not in numbers
        for line in lines:
            self._read_line(line)

    def close_item(self) -> None:
        """Take the item as whole; the lines that follow belong to none until another begins."""
        if self._is_preamble():  # as if it had not been there
            self.has_begun, self.number = False, self.number - 1
        elif text := _cleaned(self.item or []):
            self.instructions.append(text)
        self.item, self.inner_list, self.began_unnumbered = None, None, False

    def _read_line(self, line: str) -> None:
        """Decide what kind of line this is, and read it as such."""
        indent = len(line) - len(line.lstrip())
        fence, numbered = _FENCE.match(line), _NUMBERED.match(line)
        is_below = self._announces_more() or indent > self.item_indent + 1
        # 1. code: the end of a block around the list, or a block within an item
        if self.list_in_code and not self.in_code and line.strip() in ("```", "~~~"):
            self.close_item()
        elif self.in_code or (fence and self.has_begun and not self._is_preamble()):
            starts_answer = not self.in_code and self.after_blank and not is_below
            self._add_line(line, closes_item=starts_answer)
            self.in_code ^= fence is not None
        # 2. an empty line, or the begin of a block around the list
        elif fence or not line.strip():
            self.after_blank, self.list_in_code = True, self.list_in_code or fence is not None
            return
        # 3. what opens an answer, an item or a section
        elif _ANSWER.match(line):
            self.close_item()
            self.has_begun = True
        elif numbered:
            self._read_number(line, numbered, indent=indent, is_below=is_below)
        elif _NEW_ITEM.match(line):
            self._begin_item(line, self.number + 1, indent=indent)
        elif _BREAK.match(line):
            self.close_item()
        elif bullet := _BULLET.match(line):
            self._read_bullet(line, bullet, indent=indent, is_below=is_below)
        # 4. any other line
        else:
            self._read_plain(line, is_below=is_below)
        self.after_blank = False

    def _read_number(
        self, line: str, marker: re.Match[str], *, indent: int, is_below: bool
    ) -> None:
        """A line with a number: the next item, or a line of a list within an item or an answer."""
        number, rest = _number(marker), line[marker.end() :]
        # "More tasks:", and here they come: what was read so far is no item
        if self.began_unnumbered and not self.beginning_is_item:
            if self._announces_more() or self._is_preamble():
                self.item, self.has_begun = None, False
        # an inner list goes on
        if self.inner_list and number == self.inner_list[0] and self._is_at_inner_list(indent):
            self._add_line(line)
            self.inner_list = (number + 1, indent)
        # "1. do this 2. do that": numbers within the first item
        elif not self.has_begun and number == 1 <= self.number and _counts_on(rest, 1):
            self._read_plain(line, is_below=False)
        elif self._is_next_item(number, is_below=is_below):
            self._begin_item(rest, number, indent=indent)
        # an inner list begins, or an answer goes on
        elif number == 1 or self.item is None:
            self._add_line(line, closes_item=self.after_blank and not is_below)
            self.inner_list = (number + 1, indent)
        else:
            self._read_plain(line, is_below=is_below)

    def _is_at_inner_list(self, indent: int) -> bool:
        return self.inner_list is not None and abs(indent - self.inner_list[1]) <= 1

    def _is_next_item(self, number: int, *, is_below: bool) -> bool:
        """Whether a line with this number begins an item."""
        follows = self.number < number <= self.number + 1 + SKIPPED_NUMBERS
        if not self.has_begun or self._is_empty():
            return True
        if self.item is None:
            return follows
        return (follows or number == self.number) and not (number == 1 and is_below)

    def _read_bullet(
        self, line: str, bullet: re.Match[str], *, indent: int, is_below: bool
    ) -> None:
        """A line with a bullet: an item of a list of bullets, or a line of a list within one."""
        is_item = (
            self.item is not None
            and self.bullet_indent is not None
            and indent <= self.bullet_indent + 1
        )
        if bullet["letter"] and not self.has_begun:
            self._read_plain(line, is_below=is_below)
        elif is_item or not self.has_begun or self._is_preamble():
            self.bullet_indent = indent
            self._begin_item(line[bullet.end() :], self.number + 1, indent=indent)
        else:
            starts_answer = self.after_blank and not is_below and self.inner_list is None
            self._add_line(line, closes_item=starts_answer)
            self.inner_list = self.inner_list or (0, indent)

    def _read_plain(self, line: str, *, is_below: bool) -> None:
        """Any other line: the text's beginning, the rest of a sentence, or an answer."""
        if not self.has_begun:
            self._begin_item(line, self.number + 1, indent=0)
            self.began_unnumbered = self.item is not None
        elif self.item:
            ends_sentence = _SENTENCE_END.search(self.item[-1]) is not None
            continues = is_below or not (self.after_blank or ends_sentence) or self._is_empty()
            self._add_line(line, closes_item=not continues)

    def _begin_item(self, text: str, number: int, *, indent: int) -> None:
        """The item before is whole; one with this number begins. text: after its number."""
        self.close_item()
        self.has_begun, self.number, self.item_indent, self.item = True, number, indent, []
        for _ in range(3):  # "1. 1. Name a fruit."
            inner = _NUMBERED.match(text)
            if inner and not _counts_on(text, _number(inner)):
                text = text[inner.end() :]
        self._add_line(text, closes_item=_ANSWER.match(text) is not None)

    def _add_line(self, line: str, *, closes_item: bool = False) -> None:
        """Add a line to the item; if it closes the item, it belongs to an answer and is left out.

        The item ends where an answer begins within the line.
        """
        if closes_item:
            self.close_item()
        if self.item is not None:
            answer = None if self.in_code else _ANSWER_INLINE.search(line)
            self.item.append(line[: answer.start()] if answer else line)
            if answer:
                self.close_item()

    def _is_empty(self) -> bool:
        """Whether an item has begun and has no text yet."""
        return self.item is not None and not any(line.strip() for line in self.item)

    def _announces_more(self) -> bool:
        """Whether the item ends with a colon, so that what follows belongs to it."""
        return bool(self.item) and self.item[-1].rstrip(" *_").endswith((":", "："))

    def _is_preamble(self) -> bool:
        """Whether the item is words before the list, such as "Sure! Here are more tasks:"."""
        text = "\n".join(self.item or []).rstrip()
        may_be = self.began_unnumbered and not self.beginning_is_item
        return may_be and _PREAMBLE.match(text) is not None


def _number(marker: re.Match[str]) -> int:
    return int(marker["named"] or marker["bare"])


def _counts_on(text: str, number: int) -> bool:
    """Whether the number after this one stands in the text, as in "do this 2. do that"."""
    return re.search(rf"(?<!\d){number + 1}[.)]\s", text) is not None


def _cleaned(lines: Sequence[str]) -> str:
    """The text of an item, or "" if it has no letter. White space is folded outside of code."""
    kept, in_code = [], False
    for line in lines:
        fence = _FENCE.match(line) is not None
        kept.append(line.rstrip() if in_code or fence else " ".join(line.split()))
        in_code ^= fence
    if in_code and _FENCE.match(kept[-1]):
        kept.pop()  # nothing stands after it
    text = _LABEL.sub("", "\n".join(kept).strip(), count=1)
    # bold markup; of "**9. Name a fruit.**" one mark went with the number
    text = re.sub(r"(?<!\w)\*\*(?=\S)([^*\n]+)(?<=\S)\*\*(?!\w)", r"\1", text)
    if text.count("**") % 2:
        text = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", text, count=1)
    text = text.strip()
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text if any(character.isalpha() for character in text) else ""
