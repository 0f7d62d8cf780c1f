"""What one round is: the same on all sides, written by the benchmark and read by each side."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

OURS, TRL, ANCESTOR = "ours", "trl", "ancestor"
CHAT, BYTES = "smollm2", "x_transformers"
SIDES = {CHAT: (OURS, TRL), BYTES: (OURS, ANCESTOR)}

JUDGE_PROMPT = """\
Rate the response to the request from 0 to 10. Answer with the number, then one short sentence.

Request: {prompt}

Response: {response}
"""
SHORT_JUDGE_PROMPT = "Rate from 0 to 9: {prompt} / {response} ="  # for a model over bytes


@dataclass(frozen=True)
class Round:
    """prompts: texts, each of which gets `samples` candidates of at most new_tokens, each judged
    `judgements` times in at most judge_tokens. rows: sequences at once in generation. batch: pairs
    a step. model: a folder, empty for a model over bytes. dim, depth: of that one. precision: of
    products, as Accelerate names it.
    """

    side: str
    kind: str
    prompts: list[str]
    samples: int
    judgements: int
    new_tokens: int
    judge_tokens: int
    rows: int
    batch: int
    learning_rate: float
    threads: int
    model: str = ""
    dim: int = 512
    depth: int = 6
    precision: str = "no"
    temperature: float = 0.7
    top_p: float = 0.9
    beta: float = 0.1

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_round(file: Path) -> Round:
    return Round(**json.loads(file.read_text(encoding="utf-8")))


def score_of(text: str) -> float:
    """The first number in a judge's text, 0 without one, and a little for its length.

    The little makes ties rare, so that nearly each prompt gives a pair on all sides: a model of
    this size cannot judge, and what is measured is time.
    """
    found = re.search(r"\d{1,3}", text)
    return (float(found.group()) if found else 0.0) + len(text) / 10_000
