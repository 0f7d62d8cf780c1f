"""The quickstart's task: words under five constraints, and a program that checks them.

An instruction names five constraints, and many words meet them:

    len 6 b..k with m no e  ->  bmpapk

six letters, the first is b, the last is k, there is an m in it, there is no e. A point for each
constraint that holds makes the additive rubric of 0 to 5. A judge's review states per constraint
what is asked for, what is there and a mark, then the sum: `66+bb+kk+mm+e.+ Score: 5`.

The training loop never sees `points` and `review`: they make the supervised judge rows before it
starts and measure the models after it. No torch here: texts and lists of token ids.
"""

import random
import string
from dataclasses import dataclass

JUDGE_PROMPT = "judge {{ prompt }}={{ response }}:"
"""The judge's prompt template; the answer is `review`, which ends in `Score: k`."""

LENGTHS = range(4, 9)
LETTERS = string.ascii_lowercase[:16]
"""Of which instructions and words are made; fewer letters, fewer pairs to learn to compare."""
_CHARACTERS = string.ascii_lowercase + string.digits + " .+-=:>S"
_IDS = {character: i for i, character in enumerate(_CHARACTERS, start=1)}
EOS_ID = 0
VOCAB_SIZE = len(_CHARACTERS) + 1


def encode(text: str) -> list[int]:
    """A token a character; one that the vocabulary lacks raises KeyError."""
    return [_IDS[character] for character in text]


def decode(ids: list[int]) -> str:
    """The text of `ids`; end tokens are left out."""
    return "".join(_CHARACTERS[i - 1] for i in ids if i != EOS_ID)


class Characters:
    """The alphabet as a tokenizer."""

    eos_token_id = EOS_ID
    encode = staticmethod(encode)
    decode = staticmethod(decode)


@dataclass(frozen=True)
class Instruction:
    """Five constraints on a word."""

    length: int
    first: str
    last: str
    wanted: str
    forbidden: str

    @property
    def text(self) -> str:
        """What the model is asked, e.g. `len 6 b..k with m no e`."""
        return f"len {self.length} {self.first}..{self.last} with {self.wanted} no {self.forbidden}"

    @classmethod
    def parse(cls, text: str) -> "Instruction":
        """The instruction whose text this is."""
        _, length, ends, _, wanted, _, forbidden = text.split(" ")
        return cls(int(length), ends[0], ends[-1], wanted, forbidden)

    def holds(self, response: str) -> tuple[bool, bool, bool, bool, bool]:
        """Which constraints `response` meets: length, first, last, wanted, forbidden letter.

        An empty response meets none: there is nothing in it that could earn a point.
        """
        return (
            len(response) == self.length,
            response[:1] == self.first,
            response[-1:] == self.last,
            self.wanted in response,
            self.forbidden not in response and response != "",
        )


def points(prompt: str, response: str) -> int:
    """The checker: how many of the five constraints hold. 5 is perfect."""
    return sum(Instruction.parse(prompt).holds(response))


def review(prompt: str, response: str) -> str:
    """The correct review: what is asked, what is there (`.` for nothing) and a mark, then the sum.

    The length of a response of ten characters and more is written `>`.
    """
    it = Instruction.parse(prompt)
    facts = (
        (str(it.length), str(len(response)) if len(response) < 10 else ">"),
        (it.first, response[:1] or "."),
        (it.last, response[-1:] or "."),
        (it.wanted, it.wanted if it.wanted in response else "."),
        (it.forbidden, it.forbidden if it.forbidden in response else "."),
    )
    marks = it.holds(response)
    words = (f"{a}{b}{'+' if mark else '-'}" for (a, b), mark in zip(facts, marks, strict=True))
    return f"{''.join(words)} Score: {sum(marks)}"


def judge_prompt(prompt: str, response: str) -> str:
    """JUDGE_PROMPT with its fields filled in."""
    filled = JUDGE_PROMPT.replace("{{ prompt }}", prompt)
    return filled.replace("{{ response }}", response)


def random_instruction(rng: random.Random) -> Instruction:
    """Any instruction that can be met; wanted and forbidden letter differ from the ends."""
    first, last = rng.choices(LETTERS, k=2)
    others = [letter for letter in LETTERS if letter not in (first, last)]
    wanted, forbidden = rng.sample(others, 2)
    return Instruction(rng.choice(LENGTHS), first, last, wanted, forbidden)


def perfect_response(it: Instruction, rng: random.Random) -> str:
    """A random word that meets all five constraints."""
    letters = [letter for letter in LETTERS if letter != it.forbidden]
    middle = rng.choices(letters, k=it.length - 2)
    middle[rng.randrange(len(middle))] = it.wanted
    return it.first + "".join(middle) + it.last


def flawed_response(it: Instruction, score: int, rng: random.Random) -> str:
    """A word with exactly `score` points (0 to 4), as a model that is half trained writes it."""
    while True:
        broken = rng.sample(range(5), 5 - score)
        word = _broken(it, broken, rng)
        if sum(it.holds(word)) == score:
            return word


def _broken(it: Instruction, broken: list[int], rng: random.Random) -> str:
    """A perfect word in which the constraints `broken` were tampered with; others may break too."""
    if rng.random() < 0.04:  # what a model at the start of its training writes: any characters
        return "".join(rng.choices(_CHARACTERS, k=rng.choice([0, 1, 2, 3, 5, 8, 12, 16])))
    letters = LETTERS
    word = list(perfect_response(it, rng))
    if 3 in broken:
        word = [c if c != it.wanted else rng.choice(letters) for c in word]
    if 0 in broken:
        near = [it.length + step for step in (-2, -1, -1, 1, 1, 2)] + [rng.randrange(2, 17)]
        middle = word[1:-1]
        size = max(rng.choice(near) - 2, 0)
        while len(middle) > size:
            middle.pop(rng.randrange(len(middle)))
        while len(middle) < size:
            middle.insert(rng.randrange(len(middle) + 1), rng.choice(letters))
        word = [word[0], *middle, word[-1]]
    if 1 in broken:
        word[0] = rng.choice(letters)
    if 2 in broken:
        word[-1] = rng.choice(letters)
    if 4 in broken:
        word[rng.randrange(len(word))] = it.forbidden
    return "".join(word)


Row = dict[str, str]


@dataclass(frozen=True)
class TaskData:
    """All that a run needs. No prompt is in two of these, except in the first two."""

    instruction_rows: list[Row]
    """prompt and a perfect completion: the few rows that show how it is done."""
    judge_rows: list[Row]
    """judge prompt and its review, as many of each score; perfect responses only to the prompts
    of the instruction rows, so that no other solution is in the training data."""
    round_prompts: list[list[str]]
    """New prompts without answers, for each round of the loop."""
    held_out_prompts: list[str]
    """In no training row of any kind."""
    held_out_judge_items: list[tuple[str, str]]
    """(prompt, response), as many of each score, on prompts that are in no training row."""


def make_data(
    seed: int,
    *,
    instructions: int = 70,
    judge_rows: int = 6000,
    rounds: int = 2,
    prompts_per_round: int = 1000,
    held_out: int = 1000,
    held_out_judge: int = 600,
) -> TaskData:
    """The data of one run; the same seed gives the same data."""
    rng = random.Random(seed)
    seen: set[Instruction] = set()

    def new() -> Instruction:
        while (it := random_instruction(rng)) in seen:
            pass
        seen.add(it)
        return it

    def response(it: Instruction, score: int) -> str:
        return perfect_response(it, rng) if score == 5 else flawed_response(it, score, rng)

    known = [new() for _ in range(instructions)]
    examples = [{"prompt": it.text, "completion": perfect_response(it, rng)} for it in known]
    judgements = []
    for i in range(judge_rows):
        score = i % 6
        it = rng.choice(known) if score == 5 or rng.random() < 0.25 else new()
        text = response(it, score)
        prompt = judge_prompt(it.text, text)
        judgements.append({"prompt": prompt, "completion": review(it.text, text)})
    items = [(new(), i % 6) for i in range(held_out_judge)]
    return TaskData(
        instruction_rows=examples,
        judge_rows=judgements,
        round_prompts=[[new().text for _ in range(prompts_per_round)] for _ in range(rounds)],
        held_out_prompts=[new().text for _ in range(held_out)],
        held_out_judge_items=[(it.text, response(it, score)) for it, score in items],
    )
