"""The task of sentences: four demands in plain English, and a program that checks them.

    Write a sentence that starts with "She", contains "milk" and "market", and ends with "home".

A point for each demand that is met makes the additive rubric of 0 to 4. A review copies for each
demand what it finds in its place, adds yes or no, and ends in the sum (one line):

    Starts with She: She, yes. milk: the milk, yes. market: none, no. Ends with home: home, yes.
    Score: 3

The loop never sees `holds`, `points` and `review`: they make the supervised judge rows before it
starts, and measure the models after each stage. No torch here, and nothing of any model.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from demands import TaskData, balanced_items, filled, marked

JUDGE_PROMPT = """\
Review a sentence. For each demand copy what you find, and say yes or no. Then count the yes.

Task: {{ prompt }}
Sentence: {{ response }}"""
"""The judge's prompt template; the answer is `review`."""

DEMANDS = ("first", "noun A", "noun B", "last")
TOP_SCORE = len(DEMANDS)
ANSWER_TOKENS, REVIEW_TOKENS = 24, 80

SENTENCES = """\
She carried the *milk* past the *market* and walked home.
She hid the *letter* under a *pillow* before breakfast.
She painted the *fence* while her *brother* slept outside.
She traded a *coat* for a *basket* of ripe apples.
He dropped his *hammer* beside the *ladder* and laughed.
He read the *map* by the light of a *candle* alone.
He poured *tea* into a *cup* and waited for rain.
He fixed the *clock* on the *wall* with great care.
We followed the *river* until a *bridge* came into view.
We ate *soup* and *bread* at the table together.
We left our *boots* near the *stove* to dry overnight.
We watched the *train* cross the *valley* in silence.
They built a *boat* from an old *door* last summer.
They planted a *tree* behind the *school* every spring.
They sold *honey* and *cheese* at a stall nearby.
They carried the *piano* up the *stairs* very slowly.
I lost my *ring* in the *garden* on a cold Sunday.
I keep a *diary* in the *drawer* of my desk.
I heard a *bird* sing on the *roof* this morning.
I cut the *cake* with a *knife* that was too short.
My *uncle* keeps a *goat* behind the house.
My *sister* wrote a *song* about the snow.
My *neighbour* grows *roses* along the path.
My *grandmother* baked a *pie* for the whole street.
Our *teacher* brought a *skeleton* to the lesson.
Our *cat* sleeps on the *sofa* all winter.
Our *car* stopped near a *farm* late at night.
Our *team* lost the *ball* in the deep mud.
The *doctor* put her *glasses* on the table.
The *farmer* led a *horse* across the field.
The *baker* gave the *child* a warm bun.
The *soldier* sent a *postcard* to his mother.
The *wind* blew the *hat* into the lake.
The *thief* left a *glove* at the window.
A *fox* stole the *chicken* while we were asleep.
A *storm* broke the *mast* of the little ship.
A *spider* made its *web* above my bed.
A *stranger* asked the *guard* for some water.
Every *student* took a *pencil* and began.
Every *evening* the *monk* rings a heavy bell.
Every *child* in the *village* knows this story.
Every *sailor* fears the *fog* more than the dark.
After the *concert* the *singer* signed my ticket.
After *dinner* the *guests* danced in the kitchen.
After the *war* the *castle* became a museum.
After the *race* the *runner* drank some juice.
Before the *exam* the *girl* closed her eyes.
Before *sunrise* the *fisherman* mended his net.
Before the *wedding* the *tailor* finished the dress.
Before the *trip* we filled a *bag* with oranges.
When the *alarm* rang, the *dog* began to bark.
When the *king* fell ill, the *queen* ruled alone.
When the *snow* melts, the *stream* runs fast.
When the *phone* rang, the *lamp* went out.
While the *nurse* slept, the *patient* wrote a poem.
While it rained, the *boy* counted *coins* by the fire.
While the *water* boiled, the *cook* sliced a lemon.
While the *band* played, a *dancer* lost her shoe.
In the *forest* a *hunter* built a small hut.
In the *cellar* we found a *barrel* of wine.
In the *library* an old *professor* fell asleep.
In the *morning* the *gardener* picks fresh mint.
On the *island* the *captain* buried his gold.
On the *shelf* a *doll* sat beside a dusty book.
On *Monday* the *painter* started a new picture.
On the *hill* a *shepherd* played the flute.
At the *airport* the *pilot* bought some chocolate.
At *noon* the *butcher* locked his shop.
At the *station* a *porter* carried our luggage.
At the *hotel* the *waiter* forgot my order.
Under the *bridge* a *beggar* shared his blanket.
Under the *table* the *puppy* chewed a slipper.
Under the *ice* a *fish* moved without a sound.
Under the *bed* she kept a *box* of old photographs.
Behind the *church* the *children* threw stones.
Behind the *curtain* the *actor* took a deep breath.
Behind the *barn* a *tractor* rusts in the grass.
Behind the *counter* a *clerk* stamped each paper.
Near the *harbour* an *artist* sells bright shells.
Near the *window* a *plant* leaned toward the sun.
Near the *border* the *driver* showed his passport.
Near the *fountain* a *musician* played until midnight.
Yesterday the *mayor* opened a *park* for everyone.
Yesterday my *cousin* broke a *plate* by accident.
Yesterday the *postman* brought a *parcel* from abroad.
Yesterday a *bee* flew into the *office* again.
Today the *bus* passed the *hospital* without stopping.
Today our *class* visited a *factory* on foot.
Today the *judge* read the *verdict* out loud.
Today a *monkey* escaped from the *zoo* nearby.
Tomorrow the *plumber* will repair the *sink* for free.
Tomorrow my *father* will cut the *hedge* himself.
Tomorrow the *ship* will leave the *port* early.
Tomorrow a *lawyer* will read us the *contract* slowly.
Last *winter* a *wolf* came close to the village.
Last *night* the *moon* looked strangely red.
Last *week* the *shop* sold its only bicycle.
Last *year* my *aunt* climbed that mountain.
Nobody saw the *mouse* behind the *bread* except me.
Nobody told the *bride* about the *cake* in time.
Nobody opens that *gate* after the *sunset* anymore.
Nobody in the *theatre* heard the *whisper* clearly.
Some *friends* left a *guitar* in our hallway.
Some *birds* build a *nest* inside the chimney.
Some *people* drink *coffee* without any sugar.
Some *tourists* dropped a *camera* into the sea.
Each *guest* received a *spoon* made of silver.
Each *morning* the *rooster* wakes the tired town.
Each *player* hides a *card* under one hand.
Each *summer* the *family* rents a cottage.
Her *daughter* keeps *rabbits* in the yard.
Her *violin* lay on the *bench* for an hour.
Her *secretary* lost the *file* somewhere downstairs.
Her *garden* has a *pond* full of frogs.
His *shirt* hung beside the *towel* in the wind.
His *dream* was to own a *bakery* in Paris.
His *boss* parks the *truck* on the pavement.
His *voice* filled the *hall* from wall to wall.
""".splitlines()
"""Written by hand. The first word, two nouns (between stars) and the last word can be asked for."""


@cache
def words_of(sentence: str) -> list[str]:
    """The words of a sentence, without its signs."""
    return re.findall(r"[A-Za-z']+", sentence)


@dataclass(frozen=True)
class Request:
    """Four demands on a sentence."""

    first: str
    noun_a: str
    noun_b: str
    last: str

    @property
    def text(self) -> str:
        """What the model is asked."""
        return (
            f'Write a sentence that starts with "{self.first}", contains "{self.noun_a}" and '
            f'"{self.noun_b}", and ends with "{self.last}".'
        )

    @classmethod
    def parse(cls, text: str) -> "Request":
        """The request whose text this is."""
        return cls(*re.findall(r'"(\w+)"', text))

    def found(self, sentence: str) -> list[str]:
        """What a sentence has in the place of each demand; "none" if there is nothing.

        A noun is copied with the word before it.
        """
        words = words_of(sentence) or ["none"]
        copies = ["none", "none"]
        for k, noun in enumerate((self.noun_a, self.noun_b)):
            if noun in words:
                place = words.index(noun)
                copies[k] = " ".join(words[max(0, place - 1) : place + 1])
        return [words[0], *copies, words[-1]]

    def holds(self, sentence: str) -> list[bool]:
        """Which demands a sentence meets: first word, nouns, last word."""
        first, *copies, last = self.found(sentence)
        return [first == self.first, *(copy != "none" for copy in copies), last == self.last]


def request_of(line: str) -> Request:
    """The request that one of SENTENCES meets, with the nouns in the sentence's order."""
    words = re.findall(r"\w+", line)
    return Request(words[0], *re.findall(r"\*(\w+)\*", line), words[-1])


WRITTEN = [request_of(line) for line in SENTENCES]
FIRST_WORDS = sorted({it.first for it in WRITTEN})
NOUNS = sorted({noun for it in WRITTEN for noun in (it.noun_a, it.noun_b)})
LAST_WORDS = sorted({it.last for it in WRITTEN})


def holds(prompt: str, sentence: str) -> list[bool]:
    """Which demands of a request a sentence meets, in the order of DEMANDS."""
    return Request.parse(prompt).holds(sentence)


def points(prompt: str, sentence: str) -> int:
    """How many demands a sentence meets, 0 to 4."""
    return sum(holds(prompt, sentence))


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The checker as a judge: only for the control that shows how far a perfect judge comes."""
    return [float(points(*pair)) for pair in zip(prompts, completions, strict=True)]


def review(prompt: str, sentence: str) -> str:
    """The review that a perfect judge would write."""
    request = Request.parse(prompt)
    names = (
        f"Starts with {request.first}",
        request.noun_a,
        request.noun_b,
        f"Ends with {request.last}",
    )
    return marked(names, request.found(sentence), request.holds(sentence))


def judge_prompt(prompt: str, sentence: str) -> str:
    """JUDGE_PROMPT with a request and a sentence in it."""
    return filled(JUDGE_PROMPT, prompt, sentence)


def random_request(rng: random.Random) -> Request:
    """Demands that were drawn apart from each other: no sentence was written for them."""
    noun_a, noun_b = rng.sample(NOUNS, 2)
    return Request(rng.choice(FIRST_WORDS), noun_a, noun_b, rng.choice(LAST_WORDS))


def fresh_requests(count: int, used: set[str], rng: random.Random) -> list[str]:
    """Requests that are not in `used`, which then has them, and that no sentence here meets."""
    requests: list[str] = []
    while len(requests) < count:
        request = random_request(rng)
        is_solved = any(all(request.holds(line)) for line in SENTENCES)
        if request.text not in used and not is_solved:
            used.add(request.text)
            requests.append(request.text)
    return requests


def altered(prompt: str, score: int, rng: random.Random) -> str:
    """A hand-written sentence with words put in its places so that it meets `score` demands."""
    wanted = Request.parse(prompt)
    while True:
        place, met = rng.randrange(len(SENTENCES)), set(rng.sample(range(TOP_SCORE), score))
        own, text = WRITTEN[place], SENTENCES[place]
        if 0 in met:
            text = wanted.first + text.removeprefix(own.first)
        if 1 in met:
            text = text.replace(f"*{own.noun_a}*", wanted.noun_a)
        if 2 in met:
            text = text.replace(f"*{own.noun_b}*", wanted.noun_b)
        if 3 in met:
            text = f"{text.removesuffix(own.last + '.')}{wanted.last}."
        text = text.replace("*", "")
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
    # 1. requests by hindsight: what a hand-written sentence meets, for some in both orders
    lines = [line.replace("*", "") for line in SENTENCES]
    turned = [Request(it.first, it.noun_b, it.noun_a, it.last) for it in WRITTEN]
    solved = list(zip(WRITTEN, lines, strict=True))
    solved += rng.sample(list(zip(turned, lines, strict=True)), 40)
    rows = [{"prompt": it.text, "completion": line} for it, line in solved]
    # 2. requests that nobody has answered
    used = {it.text for it in (*WRITTEN, *turned)}
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
    held_out = [Request.parse(prompt) for prompt in data.held_out_prompts]
    items = balanced_items(
        data,
        answers,
        seed,
        points=points,
        altered=altered,
        meets_held_out=lambda text: any(all(request.holds(text)) for request in held_out),
        per_score=count // (TOP_SCORE + 1),
        top_score=TOP_SCORE,
    )
    return [{"prompt": judge_prompt(*item), "completion": review(*item)} for item in items]
