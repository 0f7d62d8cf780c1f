"""The pairs that are trained on, as token ids: Open Assistant's, or prompts with replies from here.

Knows the chat template by the library's own rows; knows nothing of trainers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from prompts import read_prompts
from workloads import Chat

from self_rewarding_lm.data.oasst import open_assistant
from self_rewarding_lm.data.rows import preference_row

SENTENCES = (
    "It depends on what you already have at home and on how much time you want to spend on it.",
    "Start with the simplest version, look at the result, and change one thing at a time.",
    "Most people notice a difference after about two weeks, some of them earlier.",
    "If that does not help, ask somebody who has done it before.",
    "There are three common reasons: too little water, too much heat, or a mixture that is old.",
    "For example, a room of twenty square metres needs roughly five litres of paint for two coats.",
    "I would not worry about that.",
    "The name goes back to a word that meant a narrow passage between two higher places.",
    "First write down what you expect, then measure it, and only then draw a conclusion.",
    "In Python you would use a dictionary for this, because looking up a key takes constant time.",
    "Light of short wavelengths is scattered more strongly, so the sky looks blue by day.",
    "Keep the receipts, note the dates, and send the letter by registered mail.",
    "That said, nobody can promise you a result, and both ways have been tried with success.",
    "You can find the exact numbers in the manual, usually on the last pages.",
    "Let it rest for half an hour under a cloth before you go on.",
    "A good rule is to plan for two thirds of the time and to leave the rest free.",
    "The city has grown since then, and the old harbour is now a park with a small museum.",
    "Say clearly what you would like, thank them, and leave room for an answer.",
)
MOST_SENTENCES = 15  # of a reply from here
LEAST_ROOM = 8  # tokens that the longest length must leave behind a prompt


@dataclass(frozen=True)
class Pair:
    """Ids of a prompt and of two responses to it, cut to a length already."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def read_pairs(
    chat: Chat, count: int, *, trees: Path | None, prompts: Path | None, max_length: int
) -> tuple[list[Pair], str]:
    """`count` pairs and where they come from in words; an error where there are too few.

    First those of the trees, best reply against worst; then prompts with replies from here.
    """
    sources = [] if trees is None else [(_ranked(trees), trees.name)]
    if trees is None or prompts is not None:
        texts, where = read_prompts(prompts, count)
        sources.append((_answered(texts), f"{where}, with replies of the script"))
    pairs: list[Pair] = []
    words = []
    for texts, where in sources:
        before = len(pairs)
        for row in texts:
            pair = _cut(chat, row, where, max_length) if len(pairs) < count else None
            pairs += [] if pair is None else [pair]
        if len(pairs) > before:
            words.append(f"{len(pairs) - before} of {where}")
    if len(pairs) < count:
        raise SystemExit(f"--pairs {count}: there are only {len(pairs)}; give fewer, or more texts")
    return pairs, ", ".join(words)


def save_pairs(file: Path, pairs: Sequence[Pair]) -> None:
    file.write_text(json.dumps([asdict(pair) for pair in pairs]), encoding="utf-8")


def load_pairs(file: Path) -> list[Pair]:
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [Pair(*(tuple(row[name]) for name in ("prompt", "chosen", "rejected"))) for row in rows]


def built_in_reply(number: int) -> str:
    """From one sentence to MOST_SENTENCES of them; neighbours in number differ in length."""
    count = 1 + 7 * number % MOST_SENTENCES
    return " ".join(SENTENCES[(5 * number + i) % len(SENTENCES)] for i in range(count))


def _ranked(trees: Path) -> Iterator[dict]:
    for found in open_assistant(trees, shares=(0.0, 1.0, 0.0), depth="any").eft_train:
        turns = [{"role": "user", "content": found.prompt}]
        prompt = turns if isinstance(found.prompt, str) else list(found.prompt)
        best, worst = (
            [{"role": "assistant", "content": reply}]
            for reply in (found.replies[0], found.replies[-1])
        )
        yield {"prompt": prompt, "chosen": best, "rejected": worst}


def _answered(texts: Sequence[str]) -> Iterator[dict]:
    for i, text in enumerate(texts):
        replies = built_in_reply(2 * i), built_in_reply(2 * i + 1)
        yield {"prompt": text, "chosen": replies[0], "rejected": replies[1]}


def _cut(chat: Chat, row: dict, where: str, max_length: int) -> Pair | None:
    """A row's ids; None where its prompt is too long, or nothing is left to prefer."""
    found = preference_row(row, where, chat.tokens)
    room = max_length - len(found.prompt_ids)
    chosen, rejected = found.chosen_ids[: max(room, 0)], found.rejected_ids[: max(room, 0)]
    if room < LEAST_ROOM or chosen == rejected:
        return None
    return Pair(found.prompt_ids, chosen, rejected)
