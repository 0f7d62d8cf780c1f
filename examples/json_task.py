"""The JSON task: four demands on a JSON object, and a program that checks them.

    Write JSON with the keys "owner", "fruits" and "day". The owner is "Nora". List 4 different
    fruits, the last one "plum".

A point for each demand that is met makes the additive rubric of 0 to 4. A review copies for each
demand what it finds in its place, adds yes or no, and ends in the sum (one line):

    Keys owner, fruits, day: owner, fruits, day, yes. owner Nora: Nora, yes.
    4 fruits: 1 apple 2 fig 3 plum, no. Last plum: plum, yes. Score: 3

The loop never sees `holds`, `points` and `review`: they make the supervised judge rows before it
starts, and measure the models after each stage. No torch here, and nothing of any model.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from demands import TaskData, balanced_items, filled, marked

JUDGE_PROMPT = """\
Review a JSON object. For each demand copy what you find, and say yes or no. Then count the yes.

Task: {{ prompt }}
JSON: {{ response }}"""
"""The judge's prompt template; the answer is `review`."""

DEMANDS = ("keys", "value", "count", "last")
TOP_SCORE = len(DEMANDS)
ANSWER_TOKENS, REVIEW_TOKENS = 72, 120

COUNTS = (3, 4, 5, 6)
"""How many things may be asked for."""

PERSONS = ["owner", "buyer", "sender", "keeper", "guest", "cook", "driver", "teacher"]
"""Keys whose value a request names; it is one of NAMES."""

NAMES = [
    *("Nora", "Adam", "Clara", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo"),
    *("Maria", "Nils", "Olga", "Paul", "Rosa", "Simon", "Tara", "Victor", "Wanda", "Anton"),
    *("Bella", "Carlos", "Diana", "Emil", "Fiona", "Georg", "Hanna", "Ivan", "Julia", "Kurt"),
    *("Lena", "Martin", "Nina", "Oscar", "Petra", "Ralf", "Sonja", "Tom", "Ursula", "Walter"),
]

FREE = {
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "city": ["Lisbon", "Oslo", "Vienna", "Dublin", "Prague", "Athens", "Madrid", "Warsaw"],
    "colour": ["red", "blue", "green", "white", "black", "brown", "grey", "yellow", "pink"],
    "size": ["tiny", "small", "medium", "large", "huge", "narrow", "wide", "flat"],
}
"""Keys whose value the request leaves free, with values for the instruction rows."""

THINGS = {
    "fruits": "apple pear plum cherry grape lemon orange peach banana melon fig mango kiwi",
    "tools": "hammer saw drill wrench pliers chisel file axe rake shovel ladder ruler",
    "animals": "cat dog horse cow goat sheep fox owl bear mouse duck rabbit wolf",
    "clothes": "shirt coat hat scarf glove sock boot skirt belt dress jacket sweater",
    "drinks": "tea coffee milk water juice cocoa cider lemonade soda beer wine",
    "vegetables": "carrot onion potato cabbage pea bean leek radish pumpkin spinach celery",
    "instruments": "piano violin flute drum guitar harp trumpet cello organ banjo oboe",
    "furniture": "table chair bed sofa desk shelf lamp bench stool wardrobe mirror",
    "vehicles": "car bus train tram bicycle truck boat plane ferry van scooter",
    "flowers": "rose tulip lily daisy violet iris poppy orchid lilac sunflower",
}
"""What can be listed under a key, for requests and instruction rows."""

POOLS = {kind: words.split() for kind, words in THINGS.items()}

ASKED = re.compile(
    r'Write JSON with the keys "(\w+)", "(\w+)" and "(\w+)"\. The (\w+) is "(\w+)"\. '
    r'List (\d+) different (\w+), the last one "(\w+)"\.'
)


@dataclass(frozen=True)
class Request:
    """Four demands on a JSON object."""

    keys: tuple[str, str, str]
    person: str
    name: str
    count: int
    kind: str
    last: str

    @property
    def text(self) -> str:
        """What the model is asked."""
        one, two, three = self.keys
        return (
            f'Write JSON with the keys "{one}", "{two}" and "{three}". '
            f'The {self.person} is "{self.name}". '
            f'List {self.count} different {self.kind}, the last one "{self.last}".'
        )

    @classmethod
    def parse(cls, text: str) -> "Request":
        """The request whose text this is."""
        found = ASKED.fullmatch(text)
        if found is None:
            raise ValueError(f"not a request: {text!r}")
        one, two, three, person, name, count, kind, last = found.groups()
        return cls((one, two, three), person, name, int(count), kind, last)

    def holds(self, answer: str) -> list[bool]:
        """Which demands a text meets; none if it is no JSON object."""
        record = record_of(answer)
        things = things_in(record, self.kind)
        return [
            tuple(record) == self.keys,
            record.get(self.person) == self.name,
            len(things) == len(set(things)) == self.count,
            things[-1:] == [self.last],
        ]

    def found(self, answer: str) -> list[str]:
        """What a text has in the place of each demand; "none" if there is nothing.

        Things are numbered as they are listed, and one that was there before is "again".
        """
        record = record_of(answer)
        things = [plain(thing) for thing in things_in(record, self.kind)]
        listed: list[str] = []
        for place, thing in enumerate(things):
            again = thing in things[:place]
            listed.append(f"again {thing}" if again else f"{len(set(things[: place + 1]))} {thing}")
        return [
            ", ".join(map(plain, record)) or "none",
            plain(record.get(self.person)),
            " ".join(listed) or "none",
            things[-1] if things else "none",
        ]


def record_of(answer: str) -> dict[str, Any]:
    """The JSON object that a text is; an empty one if it is none."""
    try:
        record = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def things_in(record: dict[str, Any], kind: str) -> list[str]:
    """The texts that are listed under a key; none unless there is a list of texts."""
    things = record.get(kind)
    is_list = isinstance(things, list) and all(isinstance(thing, str) for thing in things)
    return things if is_list else []


def plain(value: Any) -> str:
    """A text's first words, as a review copies them."""
    return " ".join(re.findall(r"\w+", value)[:3] if isinstance(value, str) else []) or "none"


def requests_met(answer: str) -> set[str]:
    """The texts of all requests that an answer meets in full."""
    record = record_of(answer)
    if len(record) != 3:
        return set()
    texts = [key for key, value in record.items() if isinstance(value, str)]
    lists = [key for key in record if things_in(record, key)]
    return {
        Request(tuple(record), person, record[person], len(things), kind, things[-1]).text
        for person in texts
        for kind in lists
        if len(things := things_in(record, kind)) == len(set(things))
    }


def holds(prompt: str, answer: str) -> list[bool]:
    """Which demands of a request a text meets, in the order of DEMANDS."""
    return Request.parse(prompt).holds(answer)


def points(prompt: str, answer: str) -> int:
    """How many demands a text meets, 0 to 4."""
    return sum(holds(prompt, answer))


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The checker as a judge: only for the control that shows how far a perfect judge comes."""
    return [float(points(*pair)) for pair in zip(prompts, completions, strict=True)]


def review(prompt: str, answer: str) -> str:
    """The review that a perfect judge would write."""
    request = Request.parse(prompt)
    names = (
        f"Keys {', '.join(request.keys)}",
        f"{request.person} {request.name}",
        f"{request.count} {request.kind}",
        f"Last {request.last}",
    )
    return marked(names, request.found(answer), request.holds(answer))


def judge_prompt(prompt: str, answer: str) -> str:
    """JUDGE_PROMPT with a request and an answer in it."""
    return filled(JUDGE_PROMPT, prompt, answer)


def random_request(rng: random.Random) -> Request:
    person, kind = rng.choice(PERSONS), rng.choice(sorted(POOLS))
    one, two, three = rng.sample([person, kind, rng.choice(sorted(FREE))], 3)
    name, count, last = rng.choice(NAMES), rng.choice(COUNTS), rng.choice(POOLS[kind])
    return Request((one, two, three), person, name, count, kind, last)


def solution(request: Request, rng: random.Random) -> str:
    """An object that meets a request."""
    others = [thing for thing in POOLS[request.kind] if thing != request.last]
    record: dict[str, Any] = {key: rng.choice(FREE.get(key, ["none"])) for key in request.keys}
    record[request.person] = request.name
    record[request.kind] = [*rng.sample(others, request.count - 1), request.last]
    return json.dumps(record)


def fresh_requests(count: int, used: set[str], rng: random.Random) -> list[str]:
    """Requests that are not in `used`, which then has them."""
    requests: list[str] = []
    while len(requests) < count:
        text = random_request(rng).text
        if text not in used:
            used.add(text)
            requests.append(text)
    return requests


def altered(prompt: str, score: int, rng: random.Random) -> str:
    """An object that was made wrong in its places so that it meets `score` demands."""
    wanted = Request.parse(prompt)
    while True:
        met = set(rng.sample(range(TOP_SCORE), score))
        record: dict[str, Any] = json.loads(solution(wanted, rng))
        if 1 not in met:
            record[wanted.person] = rng.choice(NAMES)
        things, pool = record[wanted.kind], POOLS[wanted.kind]
        if 3 not in met:
            things[-1] = rng.choice(pool)
        if 2 not in met:  # too few, too many, or one twice
            first = rng.sample(pool, rng.choice((1, 2, *COUNTS, 7)))
            twice = [*things[:-1], rng.choice(things)][1:]
            things[:-1] = rng.choice((first, twice))
        keys = list(record)
        if 0 not in met:  # in another order, or without the free one
            keys = rng.sample(keys, len(keys))
            if rng.random() < 0.5:
                keys = [key for key in keys if key in (wanted.person, wanted.kind)]
        text = json.dumps({key: record[key] for key in keys})
        if score == 0 and rng.random() < 0.2:
            text = text[: rng.randrange(len(text) // 2, len(text))]  # not ended
        if points(prompt, text) == score:
            return text


def make_data(
    seed: int,
    *,
    first_prompts: int = 250,
    prompts_per_round: tuple[int, int] = (220, 160),
    held_out: int = 500,
    judge_items: int = 200,
) -> TaskData:
    """Draw everything by `seed`."""
    rng = random.Random(seed)
    # 1. requests with their solutions; nothing that these also meet is asked again
    used: set[str] = set()
    solved = [(text, solution(Request.parse(text), rng)) for text in fresh_requests(150, used, rng)]
    rows = [{"prompt": text, "completion": answer} for text, answer in solved]
    used |= {text for _, answer in solved for text in requests_met(answer)}
    # 2. requests that nobody has answered
    held_out_prompts = fresh_requests(held_out, used, rng)
    judged = fresh_requests(judge_items, used, rng)
    items = [(prompt, altered(prompt, k % (TOP_SCORE + 1), rng)) for k, prompt in enumerate(judged)]
    one, other = (fresh_requests(count, used, rng) for count in prompts_per_round)
    return TaskData(
        rows, fresh_requests(first_prompts, used, rng), (one, other), held_out_prompts, items
    )


def make_judge_rows(
    data: TaskData, answers: Sequence[str], seed: int, count: int = 500
) -> list[dict[str, str]]:
    """Judge prompts with their reviews; which answers are reviewed says `balanced_items`."""
    held_out = set(data.held_out_prompts)
    items = balanced_items(
        data,
        answers,
        seed,
        points=points,
        altered=altered,
        meets_held_out=lambda answer: bool(requests_met(answer) & held_out),
        per_score=count // (TOP_SCORE + 1),
        top_score=TOP_SCORE,
    )
    return [{"prompt": judge_prompt(*item), "completion": review(*item)} for item in items]
