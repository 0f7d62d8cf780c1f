"""What the tasks of sentences.py share: a request has demands, and each that is met is a point.

A task's own file says what a request asks for and which demands an answer meets. Here is how a
review marks them, and how judge rows are balanced without a leak. No torch here.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

YES, NO = ", yes.", ", no."
"""How a review marks a demand: small judges see and mark well, and add badly."""

Item = tuple[str, str]
"""A request and an answer to it."""


@dataclass(frozen=True)
class TaskData:
    """What the loop and its measurement need; a request is in one part only.

    instruction_rows: requests with an answer that meets them. first_prompts: what the model answers
    before it is trained, for the judge rows. judge_items: held out, as many of each score.
    """

    instruction_rows: list[dict[str, str]]
    first_prompts: list[str]
    round_prompts: tuple[list[str], list[str]]
    held_out_prompts: list[str]
    judge_items: list[Item]


def filled(template: str, prompt: str, answer: str) -> str:
    """A judge's prompt template with a request and an answer in it."""
    return template.replace("{{ prompt }}", prompt).replace("{{ response }}", answer)


def marked(names: Sequence[str], copies: Sequence[str], held: Sequence[bool]) -> str:
    """The review that a perfect judge writes: of each demand its name, what is there, its mark."""
    marks = zip(names, copies, held, strict=True)
    seen = " ".join(f"{name}: {copy}{YES if met else NO}" for name, copy, met in marks)
    return f"{seen} Score: {sum(held)}"


def balanced_items(
    data: TaskData,
    answers: Sequence[str],
    seed: int,
    *,
    points: Callable[[str, str], int],
    altered: Callable[[str, int, random.Random], str],
    meets_held_out: Callable[[str], bool],
    per_score: int,
    top_score: int,
) -> list[Item]:
    """What the judge rows review: as many answers of each score.

    answers: what the model wrote to `data.first_prompts`, which give up to half of a score's items;
    altered ones give the rest. Answers that meet all demands are those of the instruction rows
    alone, and none meets a held-out request, so that no item shows the solution to another request.
    """
    rng = random.Random(seed)
    solved = [(row["prompt"], row["completion"]) for row in data.instruction_rows]
    items = [solved[k % len(solved)] for k in range(per_score)]
    written = list(zip(data.first_prompts, answers, strict=True))
    written = [item for item in written if not meets_held_out(item[1])]
    for score in range(top_score):
        some = [item for item in written if points(*item) == score][: per_score // 2]
        while len(some) < per_score:
            prompt = rng.choice(data.first_prompts)
            text = altered(prompt, score, rng)
            if not meets_held_out(text):
                some.append((prompt, text))
        items += some
    return items
