"""Self-consistency: candidates vote for the answers that they give (ScPO, arXiv:2411.04109).

Knows how answers are written at the end of a text; nothing of models and tokens.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import JudgeError, give_tokenizer
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.records import Candidate, Judgement, Prompt

READ_CHARACTERS = 20_000  # at the end of a text that are read


MOST_DIGITS = 400  # a longer number is no answer


_WHOLE = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2}(?!\w))?"
    r"|\.[0-9]+"
)


_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-+\u2212][$€£]?)?"  # "5-3" holds no -3
    rf"(?P<top>{_WHOLE})(?:\s?/\s?(?P<bottom>{_WHOLE}))?"
)


_FRACTION = re.compile(r"\\[dt]?frac\s?\{\s?([-0-9.,]{1,99})\s?\}\s?\{\s?([0-9.,]{1,99})\s?\}")


_BOX = re.compile(r"\\boxed\s?\{((?:[^{}]|\{[^{}]{0,99}\}){1,199})\}")  # one level of braces within


_LETTER = r"(?P<letter>[A-J])(?![\w'’])"


_CHOICES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?i:answer|choice|option)(?i:\s{1,9}(?:is|would be|should be))?"
        rf"[\s:*_(\[\"'`$]{{1,9}}{_LETTER}",
        r"[(\[](?P<letter>[A-Ja-j])[)\]]",
        rf"(?m)^[\s*_(\[\"'`$]{{0,9}}{_LETTER}[\s*_)\].:,\"'`$]{{0,9}}$",
        rf"(?m)^[\s*_]{{0,9}}{_LETTER}[.):]\s",
    )
)


def last_number(text: str) -> Fraction | None:
    """The number that a text ends with, exact, so that 12, 12.0 and 24/2 are one answer.

    It is looked for in the last \\boxed{...}, else in the line after the last ####, else in the
    whole text. Commas separate thousands; 1/2 and \\frac{1}{2} are fractions. Only the last 20,000
    characters are read.
    """
    text = text[-READ_CHARACTERS:]
    boxes = _BOX.findall(text)
    if boxes:
        text = boxes[-1]
    elif "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace("\\$", "")
    last = None
    for match in _NUMBER.finditer(_FRACTION.sub(r"\1/\2", text)):
        last = match
    return None if last is None else _value(last)


def last_choice(text: str) -> str | None:
    """The letter from A to J that a text chooses, as a capital; None if it chooses none.

    It is read in the last \\boxed{B}, else in the last "answer is B" or "Answer: B", else in the
    last "(B)", else in the last line that is only a letter, else in the last that begins with "B.".
    """
    text = text[-READ_CHARACTERS:]
    boxes = _BOX.findall(text)
    if boxes:
        letters = re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z])", boxes[-1])
        return letters[-1] if letters else None
    for pattern in _CHOICES:
        letters = [match["letter"] for match in pattern.finditer(text)]
        if letters:
            return letters[-1].upper()
    return None


EXTRACTORS: dict[str, Callable[[str], Hashable | None]] = {
    "number": last_number,
    "choice": last_choice,
}


class VoteJudge(Judge):
    """A candidate's score is the share of its prompt's candidates that give the same answer.

    extract: "number" (`last_number`), "choice" (`last_choice`), or a function from a response's
    text to its answer (any value that can be compared and hashed) or None. The share is of all
    candidates of the prompt (k of arXiv:2411.04109, section 2), those without an answer included;
    these have no score (`no_answer`). A judgement's text is the answer. No model is used.
    """

    reads_weights = False
    needs_all = True

    def __init__(self, extract: str | Callable[[str], Hashable | None] = "number") -> None:
        function = EXTRACTORS.get(extract) if isinstance(extract, str) else extract
        if not callable(function):
            raise JudgeError(
                f"VoteJudge: extract must be {', '.join(map(repr, EXTRACTORS))} or a function of a "
                f"text that gives its answer or None; got {extract!r:.200}."
            )
        self.extract = function
        name = extract if isinstance(extract, str) else getattr(extract, "__name__", "own")
        self.name = f"votes:{name}"

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> list[Judgement]:
        judgements = []
        for candidates in candidates_PG:
            answers = [self._answer(candidate) for candidate in candidates]
            votes = Counter(answer for answer in answers if answer is not None)
            for candidate, answer in zip(candidates, answers, strict=True):
                score = None if answer is None else votes[answer] / len(candidates)
                reason = "no_answer" if answer is None else None
                text = None if answer is None else str(answer)
                judgements.append(
                    Judgement(f"{candidate.id}/j0", (candidate.id,), self.name, score, reason, text)
                )
        return judgements

    def _answer(self, candidate: Candidate) -> Hashable | None:
        """A candidate's answer; JudgeError if it has no text or its answer cannot be hashed."""
        if candidate.text is None:
            raise JudgeError(f"a VoteJudge reads texts, which need a tokenizer. {give_tokenizer()}")
        answer = self.extract(candidate.text)
        try:
            hash(answer)
        except TypeError as error:
            raise JudgeError(
                f"{self.name} must give an answer that can be hashed (a number, a text, a tuple) "
                f"or None; got {type(answer).__name__} for {candidate.text[:200]!r}."
            ) from error
        return None if answer != answer else answer  # NaN is no answer


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a number or fraction; None if it is too long or divides by zero."""
    parts = [match["top"], match["bottom"] or "1"]
    if max(map(len, parts)) > MOST_DIGITS:
        return None
    top, bottom = (Fraction(part.replace(",", "")) for part in parts)
    if bottom == 0:
        return None
    sign = -1 if (match["sign"] or "+")[0] in "-\u2212" else 1
    return sign * top / bottom
