"""The prompts that are benchmarked: a file's, or a small set of the repository's own."""

import json
from pathlib import Path

BUILT_IN = (
    "Give me {n} tips for sleeping better when I work night shifts.",
    "My bread never rises. I use {n} g of flour, dry yeast and lukewarm water. What do I do wrong?",
    "Explain in at most {n} sentences why the sky is blue and the evening sky is red.",
    "Write a short poem about an old lighthouse and its {n} steps.",
    "What is the difference between a list and a tuple in Python? Show {n} small examples.",
    "I have {n} euros left this month and friends who want to eat out. How do I say no politely?",
    "Who invented the printing press, and what changed in the {n} years after it?",
    "Translate into French: The train at platform {n} leaves in five minutes, please hurry.",
    "Plan a weekend of {n} hours in Lisbon for two people who like music and dislike museums.",
    "A shop sells pens at 3 for 2 dollars. How much are {n} pens? Show how you get there.",
    "Is it safe to eat rice that stood on the counter for {n} hours?",
    "Write a function that returns the {n} largest numbers of a list without sorting all of it.",
    "Summarise what a mortgage is for somebody who is {n} years old and has never borrowed money.",
    "My neighbour's dog barks at night. I have asked {n} times. Write a friendly but firm letter.",
    "Name {n} birds that can be seen in a city garden in winter, with one line about each.",
    "hello, can you help me think of {n} names for a small blue boat?",
)
FIRST_NUMBER = 5


def read_prompts(file: Path | None, count: int) -> tuple[list[str], str]:
    """`count` prompts, and where they come from in words.

    A file has a text, or an object with a "prompt", in each line; its prompts are taken in order.
    Where it has too few, there are fewer.
    """
    if file is None:
        texts = [built_in(i) for i in range(count)]
        rounds = -(-count // len(BUILT_IN))
        repeated = f", {rounds} times with other numbers in them" if rounds > 1 else ""
        return texts, f"{min(count, len(BUILT_IN))} built-in prompts{repeated}"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    texts = [row if isinstance(row, str) else row.get("prompt") for row in rows[:count]]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise SystemExit(f'{file}: each line must be a text or an object with a text "prompt".')
    fewer = f"; {count} were asked for" if len(texts) < count else ""
    return texts, f"the first {len(texts)} prompts of {file.name}{fewer}"


def built_in(number: int) -> str:
    turn, place = divmod(number, len(BUILT_IN))
    return BUILT_IN[place].format(n=FIRST_NUMBER + turn)
