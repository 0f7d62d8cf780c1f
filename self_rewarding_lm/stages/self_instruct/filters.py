"""Decides which instructions are left out, and measures how alike two texts are.

Input: texts. Output: a reason such as `too_short` or `similar`, or None. No model is used.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from rapidfuzz.distance import LCSseq

from self_rewarding_lm.errors import ConfigError

DEFAULT_KEYWORDS = (  # arXiv:2212.10560: tasks that are not text alone
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files"),
    *("map", "maps", "draw", "plot", "go to"),
)


_WORD = re.compile(r"[^\W_]+")


@dataclass
class FilterCounts:
    """How many instructions were kept, and why the others were left out."""

    dropped: Counter[str] = field(default_factory=Counter)
    kept: int = 0

    def count(self, problem: str | None) -> None:
        """Count one instruction: kept if `problem` is None, else dropped for that reason."""
        if problem is None:
            self.kept += 1
        else:
            self.dropped[problem] += 1

    def add(self, other: "FilterCounts") -> None:
        """Add the counts of `other` to these."""
        self.dropped.update(other.dropped)
        self.kept += other.kept

    def metrics(self) -> dict[str, int]:
        """The counts by metric name: `prompts/kept` and `prompts/dropped_<reason>`."""
        dropped = {f"prompts/dropped_{k}": n for k, n in sorted(self.dropped.items()) if n}
        return {"prompts/kept": self.kept, **dropped}

    def in_words(self) -> str:
        """The dropped ones in words: '3 similar, 1 too_short', or 'none'."""
        return ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common() if n) or "none"


def instruction_problem(
    text: str,
    *,
    min_words: int = 4,
    max_words: int = 150,
    keywords: Sequence[str] = DEFAULT_KEYWORDS,
) -> str | None:
    """Why an instruction is left out regardless of other instructions, None if it is not.

    The rules and defaults are those of arXiv:2212.10560. They apply in this order:
    `too_short`, `too_long`: the number of words, divided by white space.
    `keyword`: one of `keywords` stands in the text as a whole word, in upper or lower case.
    `program`: the text starts with "Write a program".
    `first_character`: the first character but white space is punctuation or not ASCII.
    """
    words = text.split()
    if len(words) < min_words:
        return "too_short"
    if len(words) > max_words:
        return "too_long"
    pattern = _keyword_pattern(tuple(keywords))
    if pattern is not None and pattern.search(text):
        return "keyword"
    if re.match(r"\s*write\s+a\s+program\b", text, re.IGNORECASE):
        return "program"
    first = text.lstrip()[:1]
    return "first_character" if first in string.punctuation or not first.isascii() else None


@lru_cache(maxsize=16)
def _keyword_pattern(keywords: tuple[str, ...]) -> re.Pattern[str] | None:
    """What finds one of the keywords as a whole word, None if there is no keyword."""
    wanted = [r"\s+".join(map(re.escape, keyword.split())) for keyword in keywords]
    if not any(wanted):
        return None
    return re.compile(rf"(?<!\w)(?:{'|'.join(filter(None, wanted))})(?!\w)", re.IGNORECASE)


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F1 of two texts: 2 * LCS / (words of a + words of b), 0.0 if a text has no words.

    LCS is the length of the longest common subsequence of words. Words are runs of letters and
    digits of any script, in lower case, without stemming. In a script without spaces, each run is
    one word.
    """
    words_a, words_b = _words(a), _words(b)
    return _f1(LCSseq.similarity(words_a, words_b), len(words_a) + len(words_b))


class InstructionPool:
    """The instructions with which each new one is compared: seeds and those that were kept.

    max_rouge_l: a new instruction is `similar` if its ROUGE-L with any of them is higher
    (arXiv:2212.10560: 0.7). Raises ConfigError if it is not between 0 and 1.
    """

    def __init__(self, seeds: Sequence[str], *, max_rouge_l: float = 0.7) -> None:
        if not 0.0 <= max_rouge_l <= 1.0:
            raise ConfigError(f"max_rouge_l is between 0 and 1; got {max_rouge_l}.")
        self.max_rouge_l = max_rouge_l
        self._folded: set[str] = set()
        self._texts: list[tuple[str, ...]] = []
        self._holders: dict[str, list[int]] = defaultdict(
            list
        )  # word -> places of the texts with it
        for seed in seeds:
            self.add(seed)

    def add(self, text: str) -> None:
        """Compare later instructions with this text too."""
        self._folded.add(_fold(text))
        words = _words(text)
        for word in set(words):
            self._holders[word].append(len(self._texts))
        self._texts.append(words)

    def problem(self, text: str) -> str | None:
        """Why a text is too close to the pool: `duplicate` (equal except for case and white space)
        or `similar`; None if it is not."""
        if _fold(text) in self._folded:
            return "duplicate"
        words = _words(text)
        for i in self._reachable(words):
            other = self._texts[i]
            total = len(words) + len(other)
            if _f1(min(len(words), len(other)), total) <= self.max_rouge_l:
                continue  # even if the longer contained the shorter
            if _f1(LCSseq.similarity(words, other), total) > self.max_rouge_l:
                return "similar"
        return None

    def _reachable(self, words: Sequence[str]) -> set[int]:
        """Places of the texts whose ROUGE-L with `words` can be above `max_rouge_l`.

        To score above it, a text must share at least k of the n words: as many as a text needs that
        consists of shared words alone. A text that shares k words shares at least one of any
        n - k + 1 words. So it is enough to look at texts that have one of the n - k + 1 rarest.
        """
        n = len(words)
        k = next((k for k in range(1, n + 1) if _f1(k, n + k) > self.max_rouge_l), None)
        if k is None:
            return set()
        rarest = sorted(words, key=lambda word: len(self._holders.get(word, ())))[: n - k + 1]
        return {i for word in set(rarest) for i in self._holders.get(word, ())}


def _fold(text: str) -> str:
    """A text without differences in case and white space."""
    return " ".join(text.casefold().split())


def _words(text: str) -> tuple[str, ...]:
    """The words of a text, in lower case."""
    return tuple(_WORD.findall(text.lower()))


def _f1(common: int, total: int) -> float:
    """F1 of two texts that have `total` words in sum, `common` of them in common."""
    return 2 * common / total if total else 0.0
