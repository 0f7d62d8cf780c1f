"""Self-consistency: the answer that most of a prompt's candidates give (ScPO, arXiv:2411.04109).

Knows how answers are written at the end of a text; nothing of models and tokens.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.records import Candidate, Judgement, Prompt

READ_CHARACTERS = 20_000  # of the end of a text


MOST_DIGITS = 400  # of a number; a longer one is no answer


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

    The last \\boxed{...} counts, else the line behind the last ####, else the last number of the
    text. Commas stand between thousands; 1/2 and \\frac{1}{2} are fractions. Of longer texts the
    last 20,000 characters are read.
    """
    text = text[-READ_CHARACTERS:]
    boxes = _BOX.findall(text)
    if boxes:
        text = boxes[-1]
    elif "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace("\\$", "")
    found = None
    for match in _NUMBER.finditer(_FRACTION.sub(r"\1/\2", text)):
        found = match
    return None if found is None else _value(found)


def last_choice(text: str) -> str | None:
    """The letter A to J that a text chooses, as a capital.

    The last \\boxed{B} counts, else the last "answer is B" or "Answer: B", else the last "(B)",
    else the last line that is nothing but a letter, else the last line that begins with "B.".
    """
    text = text[-READ_CHARACTERS:]
    boxes = _BOX.findall(text)
    if boxes:
        letters = re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z])", boxes[-1])
        return letters[-1] if letters else None
    for pattern in _CHOICES:
        found = [match["letter"] for match in pattern.finditer(text)]
        if found:
            return found[-1].upper()
    return None


EXTRACTORS: dict[str, Callable[[str], Hashable | None]] = {
    "number": last_number,
    "choice": last_choice,
}


class VoteJudge(Judge):
    """The share of a prompt's candidates that give a candidate's answer is its score.

    extract: "number" (`last_number`), "choice" (`last_choice`), or a function of a response's text
    that gives its answer (anything that can be compared and hashed) or None. The shares are of all
    the prompt's candidates (k of arXiv:2411.04109, section 2), those without an answer included;
    these have no score (`no_answer`). A judgement's text is the answer. No model is asked.
    """

    reads_weights = False

    def __init__(self, extract: str | Callable[[str], Hashable | None] = "number") -> None:
        found = EXTRACTORS.get(extract) if isinstance(extract, str) else extract
        if not callable(found):
            raise JudgeError(
                f"VoteJudge: extract must be {', '.join(map(repr, EXTRACTORS))} or a function of a "
                f"text that gives its answer or None; got {extract!r:.200}."
            )
        self.extract = found
        named = extract if isinstance(extract, str) else getattr(extract, "__name__", "own")
        self.name = f"votes:{named}"

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> list[Judgement]:
        found = []
        for candidates in candidates_PG:
            answers = [self._answer(candidate) for candidate in candidates]
            votes = Counter(answer for answer in answers if answer is not None)
            for candidate, answer in zip(candidates, answers, strict=True):
                score = None if answer is None else votes[answer] / len(candidates)
                reason = "no_answer" if answer is None else None
                text = None if answer is None else str(answer)
                found.append(
                    Judgement(f"{candidate.id}/j0", (candidate.id,), self.name, score, reason, text)
                )
        return found

    def _answer(self, candidate: Candidate) -> Hashable | None:
        if candidate.text is None:
            raise JudgeError(
                "a VoteJudge reads texts, so the trainer needs tokenizer_encode and "
                "tokenizer_decode, or tokenizer."
            )
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
    parts = [match["top"], match["bottom"] or "1"]
    if max(map(len, parts)) > MOST_DIGITS:
        return None
    top, bottom = (Fraction(part.replace(",", "")) for part in parts)
    if bottom == 0:
        return None
    sign = -1 if (match["sign"] or "+")[0] in "-\u2212" else 1
    return sign * top / bottom
