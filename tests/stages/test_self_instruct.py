"""New prompts by self-instruct: what is shown, kept, left out, recorded, and done after a stop.

Lists come from an engine whose texts are known (`Scripted`), so every outcome can be checked by
hand; all else is sampled by the library's own engine on tiny models.
"""

import json
import os
import random
import re
import string
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from self_rewarding_lm import (
    DPOConfig,
    ExternalRewardDPOConfig,
    OptimConfig,
    RewardConfig,
    Run,
    SamplingConfig,
    SelfInstruct,
    SelfRewardDPOConfig,
    SelfRewardingTrainer,
    SFTConfig,
    from_stage,
)
from self_rewarding_lm.context import Round
from self_rewarding_lm.data.chat import TEMPLATES
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import (
    ConfigError,
    DataError,
    RunMismatchError,
    StoreError,
    TokenizerError,
)
from self_rewarding_lm.generation.engine import Completion
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.records import Instruction, stable_hash
from self_rewarding_lm.stages.self_instruct.few_shot import Example, few_shot_prompt
from self_rewarding_lm.stages.self_instruct.filters import DEFAULT_KEYWORDS
from self_rewarding_lm.stages.self_instruct.write import write_prompts
from tests.support.models import Recurrent, context, lively, stage_dir
from tests.support.processes import two

LETTERS = string.printable
END = len(LETTERS)
VOCAB = END + 1
QUICK = OptimConfig(batch_size=4, learning_rate=1e-2)
SHORT = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=6)
LONG = SamplingConfig(temperature=0.6, top_p=0.9, max_new_tokens=2000)
JUDGE = RewardConfig(prompt_template="{{ prompt }}>{{ response }}:", parse_reward=len)
SEEDS = [
    "Name three rivers in Europe",
    "Why is the sky blue at noon?",
    "Give me a recipe for onion soup.",
    "How do I learn to play chess?",
    "Tell a short story about a lighthouse.",
    "What does photosynthesis mean?",
    "List reasons for walking to work.",
    "Compare cats with dogs as pets.",
    "Translate good morning into French.",
]


class Characters:
    """A tokenizer of characters; letters: in the order of their ids."""

    def __init__(self, letters: str = LETTERS, eos_token_id: int | None = None) -> None:
        self.letters = letters
        if eos_token_id is not None:
            self.eos_token_id = eos_token_id

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, ids) -> str:
        return "".join((self.letters + " " * 50)[i] for i in ids)


class StopError(Exception):
    """The process ends here."""


class Scripted(LocalEngine):
    """An engine that writes known lists, told apart by their noise; all else it samples.

    lists: by name, "<stage>/new/<round>/<list>". cut: names of lists that a limit cut off.
    stop_at: the call for lists at which it is stopped. Lists come back last first.
    """

    def __init__(self, lists, *, seed=0, cut=(), stop_at=None, tokenizer=None, end=END) -> None:
        super().__init__()
        self.keys = {stable_hash(seed, f"{name}/0"): name for name in lists}
        self.lists, self.cut, self.stop_at, self.end = lists, cut, stop_at, end
        self.tokenizer = tokenizer or Characters()
        self.calls: list[list[str]] = []
        self.asked: dict[str, str] = {}
        self.decodings, self.models = [], []
        self.weights: dict[str, list[dict]] = {"lists": [], "rest": []}
        self.local = LocalEngine()

    def generate(self, model, requests, decoding):
        names = [self.keys.get(request.key) for request in requests]
        weights = {k: v.clone() for k, v in model.module.state_dict().items()}
        self.weights["rest" if None in names else "lists"].append(weights)
        if None in names:
            assert set(names) == {None}, "lists are asked for apart from responses"
            yield from self.local.generate(model, requests, decoding)
            return
        if len(self.calls) == self.stop_at:
            raise StopError
        self.calls.append(names)
        self.decodings.append(decoding)
        self.models.append(model.module)
        for index in reversed(range(len(requests))):
            name, request = names[index], requests[index]
            self.asked[name] = self.tokenizer.decode(request.ids)
            ids = tuple(self.tokenizer.encode(self.lists[name]))
            assert len(ids) < request.max_new_tokens
            ended = name not in self.cut
            yield index, Completion((*ids, self.end) if ended else ids, ended)


def new_text(i: int) -> str:
    """Two of these have 3 of 6 words in common, in order: ROUGE-L 0.5."""
    return f"Explain topic{i} and theme{i} to reader{i}"


def two_a_list(stage: str = "stage", rounds: int = 12, size: int = 8, first: int = 0):
    """Lists of two good prompts each, all different."""
    names = [f"{stage}/new/{r}/{s}" for r in range(rounds) for s in range(size)]
    return {
        name: f" {new_text(first + 2 * i)}\n10. {new_text(first + 2 * i + 1)}"
        for i, name in enumerate(names)
    }


def tokens_of(tokenizer=None, **options):
    return Tokens(tokenizer or Characters(), eos_id=END, vocab=VOCAB, **options)


def as_seeds(texts, stage="stage"):
    return [Instruction(f"{stage}/seed/{i}", text, ()) for i, text in enumerate(texts)]


def write(path, engine, seeds=SEEDS, *, limit=None, module=None, tokens=None, **settings):
    """What `write_prompts` gives in a stage of its own, and the stage's folder."""
    module = module or Recurrent(VOCAB)
    ctx = context(module, engine=engine, tokens=tokens or tokens_of())
    out = stage_dir(ctx, path)
    chosen = {"num_prompts": 4, "sampling": LONG, "samples_per_round": 2, **settings}
    made = SelfInstruct(seed_dataset=seeds, **chosen)
    return write_prompts(ctx, out, as_seeds(seeds), made, limit=limit), out


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def new_of(records):
    return [record for record in records if record.id.split("/")[1] == "new"]


# ---- what is kept and what is left out


def test_each_filter_leaves_out_what_it_should_and_every_item_has_its_reason(tmp_path):
    items = [
        "Describe how bread is baked at home",  # kept
        "Do it now",  # 3 words
        "Draw me a cat asleep",  # keyword
        "Write a program that sorts whole numbers",
        "Über den Wolken was ist dort?",  # no ASCII at the start
        "NAME three  rivers in EUROPE",  # the first seed
        "Name four rivers in Europe",  # LCS 4 of 5 and 5 words: 0.8
        "Name three long rivers of southern Europe",  # LCS 4 of 5 and 7 words: 8/12, kept
        "Describe how bread is baked at sea",  # LCS 6 of 7 and 7 words: 0.86, with one kept above
        " ".join(["word"] * 151),
        "Ask me a question that",  # cut off
    ]
    first = " " + "\n".join(f"{i}. {item}" for i, item in enumerate(items, 9))[3:]
    lists = {
        "stage/new/0/0": first,
        "stage/new/0/1": " 12 34",  # nothing that is an instruction
        "stage/new/1/0": " Sing a song of sixpence\n10. Count sheep until you sleep\n11. "
        "Paint the fence in green",
        "stage/new/1/1": " Choose a name for a ship",
    }
    letters = LETTERS + "Ü"
    tokens = Tokens(Characters(letters), eos_id=END + 1, vocab=VOCAB + 1)
    engine = Scripted(lists, cut={"stage/new/0/0"}, tokenizer=Characters(letters), end=END + 1)
    kept, out = write(tmp_path, engine, num_prompts=4, module=Recurrent(VOCAB + 1), tokens=tokens)
    assert [record.text for record in kept] == [
        items[0],
        items[7],
        "Sing a song of sixpence",
        "Count sheep until you sleep",
    ]
    reasons = [None, "too_short", "keyword", "program", "first_character", "duplicate", "similar"]
    reasons += [None, "similar", "too_long", "unfinished"]
    expected = [(f"stage/new/0/0/{i}", *r) for i, r in enumerate(zip(items, reasons, strict=True))]
    expected[5] = (expected[5][0], "NAME three rivers in EUROPE", "duplicate")  # as it is read
    expected += [
        ("stage/new/0/1/0", " 12 34", "unparsed"),
        ("stage/new/1/0/0", "Sing a song of sixpence", None),
        ("stage/new/1/0/1", "Count sheep until you sleep", None),
        ("stage/new/1/0/2", "Paint the fence in green", "surplus"),
        ("stage/new/1/1/0", "Choose a name for a ship", "surplus"),
    ]
    written = new_of(out.read(Instruction))
    assert [(record.id, record.text, record.reason) for record in written] == expected
    metrics = {
        "prompts/kept": 4,
        **{f"prompts/dropped_{name}": 1 for name in reasons if name},
        "prompts/dropped_similar": 2,
        "prompts/dropped_surplus": 2,
        "prompts/dropped_unparsed": 1,
    }
    assert lines_of(out.path / "metrics.jsonl") == [{"step": 0, **metrics}]
    assert out.summary["new_prompts"] == metrics


def test_the_settings_of_the_filters_reach_them(tmp_path):
    texts = ["Do it", "Draw me a cat asleep", "Name four rivers in Europe", "Sell it at once"]

    def listed(texts):
        return {"stage/new/0/0": "".join(f"\n{i}. {t}" for i, t in enumerate(texts, 9))[3:]}

    loose = dict(num_prompts=4, max_samples=1, min_words=2, max_rouge_l=0.8, keywords=("sell",))
    with pytest.raises(DataError, match=r"gave 3 new prompts in 1 list, .* out: 1 keyword\."):
        write(tmp_path / "loose", Scripted(listed(texts)), **loose)
    kept = [r.text for r in new_of(stage_records(tmp_path / "loose")) if r.reason is None]
    assert kept == texts[:3]
    texts[3] = "Name three rivers now"  # LCS 3 of 4 and 5 words: 6/9
    strict = dict(num_prompts=4, max_samples=1, min_words=3, max_words=4, max_rouge_l=0.6)
    with pytest.raises(DataError, match=r"gave 0 .* out: 2 too_long, 1 too_short, 1 similar\."):
        write(tmp_path / "strict", Scripted(listed(texts)), **strict)


def lcs(a, b) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            same = table[i][j] + 1 if x == y else 0
            table[i + 1][j + 1] = max(same, table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_on_random_texts_the_reasons_are_those_of_a_naive_second_implementation(tmp_path):
    draw = random.Random(3)
    words = [f"w{i}" for i in range(9)] + ["map"]
    texts = []

    def text() -> str:
        """A new one, an earlier one as it is, or that with another word."""
        own = [draw.choice(words) for _ in range(draw.randint(2, 9))]
        if texts and draw.random() < 0.5:
            own = draw.choice(texts).split()
            if draw.random() < 0.7:
                own[draw.randrange(len(own))] = draw.choice(words)
        texts.append(" ".join(own))
        return texts[-1]

    seeds = [text() for _ in range(10)]
    lists = {
        f"stage/new/{r}/{s}": " " + "\n".join(f"{n}. {text()}" for n in range(9, 13))[3:]
        for r in range(5)
        for s in range(4)
    }
    settings = dict(num_prompts=40, samples_per_round=4, max_samples=20)
    with pytest.raises(DataError):
        write(tmp_path, Scripted(lists), seeds, **settings)
    pool, reasons = [seed.split() for seed in seeds], set()
    records = new_of(stage_records(tmp_path))
    assert [r.text for r in records] == [
        item for listed in lists.values() for item in re.split(r"\n\d+\. ", listed[1:])
    ]
    for record in records:
        own = record.text.split()
        if len(own) < 4:
            expected = "too_short"
        elif "map" in own:
            expected = "keyword"
        elif own in pool:
            expected = "duplicate"
        elif any(2 * lcs(own, other) / (len(own) + len(other)) > 0.7 for other in pool):
            expected = "similar"
        else:
            expected = None
            pool.append(own)
        assert record.reason == expected, record
        reasons.add(expected)
    assert reasons == {"too_short", "keyword", "duplicate", "similar", None}


def stage_records(path: Path) -> list[Instruction]:
    ctx = context(Recurrent(VOCAB))
    return stage_dir(ctx, path).read(Instruction)


def test_a_prompt_that_leaves_no_room_or_that_the_tokenizer_cannot_write_is_left_out(tmp_path):
    """It would be an error of the stage later on, when it is answered."""
    texts = [
        "Say where the moon is",  # 21 characters
        "Paint the big fence green",  # 25: no room for one more in 25
        "Ask if 5 € is much money",  # no token for the euro
        "Name all of the far moon",  # 24
    ]
    other = Characters("\0" + LETTERS + "€", eos_token_id=0)
    module = Recurrent(VOCAB + 1)
    text = " " + "\n".join(f"{i}. {t}" for i, t in enumerate(texts, 9))[3:]
    engine = Scripted({"stage/new/0/0": text}, tokenizer=other, end=0)
    kept, out = write(
        tmp_path,
        engine,
        num_prompts=2,
        samples_per_round=1,
        limit=25,
        model=module,
        tokenizer=other,
    )
    assert [record.text for record in kept] == [texts[0], texts[3]]
    found = [record.reason for record in new_of(out.read(Instruction))]
    assert found == [None, "no_room", "no_tokens", None]


def test_without_an_end_token_the_last_item_of_a_list_is_not_taken_for_whole(tmp_path):
    """Such a list always runs into its limit."""

    class Endless(Scripted):
        def generate(self, model, requests, decoding):
            for index, done in super().generate(model, requests, decoding):
                yield index, Completion(done.ids[:-1], None)

    tokens = Tokens(Characters(), eos_id=None, vocab=VOCAB)
    kept, out = write(
        tmp_path, Endless(two_a_list()), tokens=tokens, num_prompts=2, samples_per_round=2
    )
    assert [record.text for record in kept] == [new_text(0), new_text(2)]
    reasons = {r.text: r.reason for r in new_of(out.read(Instruction))}
    assert reasons[new_text(1)] == reasons[new_text(3)] == "unfinished"


# ---- what is shown


def shown_in(text: str) -> list[str]:
    """The numbered examples of a few-shot text, which ends with the next number."""
    found = re.findall(r"^(\d+)\.(?: (.*))?$", text, re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    assert found[-1][1] == "" and text.endswith(f"\n{len(found)}.")
    return [example for _, example in found[:-1]]


def test_a_list_shows_6_seeds_and_2_generated_prompts_at_temperature_06_and_top_p_09(tmp_path):
    engine = Scripted(two_a_list())
    _, out = write(
        tmp_path,
        engine,
        num_prompts=12,
        sampling=SelfInstruct(seed_dataset=SEEDS, num_prompts=1, sampling=LONG).sampling,
    )
    default = SelfInstruct(seed_dataset=SEEDS, num_prompts=1)
    assert (default.sampling.temperature, default.sampling.top_p) == (0.6, 0.9)
    assert {(d.temperature, d.top_p, d.top_k, d.min_p) for d in engine.decodings} == {
        (0.6, 0.9, None, None)
    }
    assert [len(call) for call in engine.calls] == [2, 2, 2]  # 4 new prompts a round
    texts = {record.id: record.text for record in out.read(Instruction)}
    seeds = {f"stage/seed/{i}": text for i, text in enumerate(SEEDS)}
    for record in out.read(Instruction):
        name, number = record.id.rpartition("/")[0], int(record.id.split("/")[2])
        examples = [{**texts, **seeds}[parent] for parent in record.parents]
        assert shown_in(engine.asked[name]) == examples
        of_seeds = [parent for parent in record.parents if parent in seeds]
        earlier = [p for p in record.parents if p not in seeds]
        assert len(set(record.parents)) == 8
        assert len(of_seeds) == (8 if number == 0 else 6)
        assert all(int(parent.split("/")[2]) < number for parent in earlier)
    assert len({record.parents for record in out.read(Instruction)}) == 6  # a list each


def test_numbers_of_examples_are_settings_and_few_seeds_are_all_shown(tmp_path):
    lists = {name: text.replace("10.", "Task:") for name, text in two_a_list().items()}
    engine = Scripted(lists)
    write(
        tmp_path / "a",
        engine,
        num_prompts=6,
        samples_per_round=1,
        num_seed_examples=2,
        num_generated_examples=1,
    )
    assert [len(shown_in(text)) for text in engine.asked.values()] == [3, 3, 3]
    engine = Scripted(lists)
    write(tmp_path / "b", engine, SEEDS[:3], num_prompts=6, samples_per_round=1)
    assert [len(shown_in(text)) for text in engine.asked.values()] == [3, 5, 5]


def test_other_seeds_of_the_noise_show_other_examples(tmp_path):
    asked = []
    for seed in (0, 0, 1):
        engine = Scripted(two_a_list(), seed=seed)
        ctx = context(Recurrent(VOCAB), engine=engine, tokens=tokens_of(), seed=seed)
        out = stage_dir(ctx, tmp_path / str(len(asked)))
        settings = SelfInstruct(seed_dataset=SEEDS, num_prompts=4, sampling=LONG)
        settings = settings.model_copy(update={"samples_per_round": 2})
        write_prompts(ctx, out, as_seeds(SEEDS), settings, limit=None)
        asked.append(engine.asked)
    assert asked[0] == asked[1] != asked[2]


# ---- how many lists


def test_lists_are_asked_for_in_rounds_up_to_max_samples(tmp_path):
    engine = Scripted(dict.fromkeys(two_a_list(), " no"))
    with pytest.raises(DataError, match="0 new prompts in 5 lists"):
        write(tmp_path, engine, samples_per_round=2, max_samples=5)
    assert [len(call) for call in engine.calls] == [2, 2, 1]
    engine = Scripted(dict.fromkeys(two_a_list(), " no"))
    with pytest.raises(DataError, match="0 new prompts in 12 lists"):  # four for each wanted
        write(tmp_path / "default", engine, samples_per_round=8, num_prompts=3)
    assert [len(call) for call in engine.calls] == [8, 4]


def test_no_list_is_written_once_there_are_enough(tmp_path):
    engine = Scripted(two_a_list())
    kept, out = write(tmp_path, engine, num_prompts=5, samples_per_round=1)
    assert engine.calls == [["stage/new/0/0"], ["stage/new/1/0"], ["stage/new/2/0"]]
    assert [record.text for record in kept] == [new_text(0), new_text(1)] + [
        new_text(i)
        for i in (16, 17, 32)  # 8 lists a round are in the script
    ]
    assert out.summary["new_prompts"] == {"prompts/kept": 5, "prompts/dropped_surplus": 1}


# ---- stopped and gone on


def test_stopped_anywhere_it_goes_on_from_what_is_on_disk_to_the_same_prompts(tmp_path):
    """Cut at every line and within lines; whole lists are never asked for again."""
    settings = dict(num_prompts=15, samples_per_round=3)
    lists = two_a_list()
    lists["stage/new/1/1"] = " nothing"  # no instruction of four words
    kept, out = write(tmp_path / "whole", Scripted(lists), **settings)
    truth = lines_of(out.path / "instructions.jsonl")
    with pytest.raises(StopError):
        write(tmp_path / "stopped", Scripted(lists, stop_at=2), **settings)
    data = (tmp_path / "stopped/instructions.0.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    assert len(ends) == 11  # of two rounds
    for cut in sorted({0, *ends, *(end - 7 for end in ends)}):
        path = tmp_path / f"cut{cut}"
        path.mkdir()
        (path / "config.json").write_text("{}")
        (path / "instructions.0.jsonl").write_bytes(data[:cut])
        engine = Scripted(lists)
        again, _ = write(path, engine, **settings)
        assert again == kept
        assert lines_of(path / "instructions.jsonl") == truth
        assert not (path / "instructions.0.jsonl").exists()
        rows = [json.loads(line) for line in data[:cut].splitlines(True) if line.endswith(b"\n")]
        on_disk = {row["id"].rpartition("/")[0] for row in rows if row["id"].endswith("/0")}
        asked = {name for call in engine.calls for name in call}
        assert not asked & on_disk
        assert asked | on_disk == {row["id"].rpartition("/")[0] for row in truth}


def test_all_that_is_on_disk_needs_no_model(tmp_path):
    kept, _ = write(tmp_path, Scripted(two_a_list()))
    engine = Scripted({})
    assert write(tmp_path, engine)[0] == kept
    assert not any(engine.weights.values())  # asked for nothing at all


def test_what_was_read_is_taken_though_the_model_would_write_something_else_now(tmp_path):
    """As on another machine, where logits are rounded differently."""
    with pytest.raises(StopError):
        write(tmp_path, Scripted(two_a_list(), stop_at=1), num_prompts=8)
    kept, _ = write(tmp_path, Scripted(two_a_list(first=500)), num_prompts=8)
    assert [r.text for r in kept[:4]] == [new_text(i) for i in range(4)]
    assert all("topic5" in r.text for r in kept[4:])


def test_too_few_is_an_error_with_the_report_and_nothing_is_lost(tmp_path):
    lists = {"stage/new/0/0": f" {new_text(0)}\n10. Do it", "stage/new/0/1": " Draw me a cat"}
    for engine in (Scripted(lists), Scripted({})):  # the second time nothing is asked again
        with pytest.raises(DataError) as error:
            write(tmp_path, engine, num_prompts=9, max_samples=2)
        assert "gave 1 new prompt in 2 lists, and 9 wanted" in str(error.value)
        assert "left out: 1 too_short, 1 keyword" in str(error.value)
        assert str(tmp_path / "instructions.jsonl") in str(error.value)
        rows = lines_of(tmp_path / "instructions.jsonl")
        assert [(row["text"], row["reason"]) for row in rows] == [
            (new_text(0), None),
            ("Do it", "too_short"),
            ("Draw me a cat", "keyword"),
        ]
        metrics = lines_of(tmp_path / "metrics.jsonl")[-1]
        assert metrics == {
            "step": 0,
            "prompts/kept": 1,
            "prompts/dropped_keyword": 1,
            "prompts/dropped_too_short": 1,
        }


# ---- examples that are too long


def test_a_list_whose_examples_leave_no_room_is_left_out_and_counted(tmp_path):
    """With two of nine seeds of 300 characters some lists fit, and some do not."""
    seeds = [*SEEDS[:7], "long " * 60, "more " * 60]
    module = Recurrent(VOCAB)
    module.max_seq_len = 900
    engine = Scripted({name: f" {new_text(i)}" for i, name in enumerate(two_a_list())})
    _, out = write(
        tmp_path,
        engine,
        seeds,
        module=module,
        num_prompts=3,
        num_seed_examples=6,
        num_generated_examples=0,
        samples_per_round=8,
        sampling=SamplingConfig(max_new_tokens=100),
    )
    records = {r.id.rpartition("/")[0]: r for r in new_of(out.read(Instruction))}
    left_out = {name for name, r in records.items() if r.reason == "examples_too_long"}
    assert left_out and left_out.isdisjoint(engine.asked)
    assert set(records) == left_out | set(engine.asked)
    for name, record in records.items():
        count = len({"stage/seed/7", "stage/seed/8"} & set(record.parents))
        assert (name in left_out) == (count == 2), "two long ones do not fit, one does"
    assert out.summary["new_prompts"]["prompts/dropped_examples_too_long"] == len(left_out)


def test_sixteen_tokens_must_be_left_to_go_on_with_a_list(tmp_path):
    """Of one seed there is one list, so its length is known."""
    text = few_shot_prompt([Example("", SEEDS[0])], [], key=0).text
    model = Recurrent(VOCAB)
    for room in (15, 16):
        model.max_seq_len = len(text) + room
        one = stage(seed_dataset=SEEDS[:1])
        if room == 16:
            trainer_of(tmp_path, [one], Scripted({}), model=model)
            continue
        words = f"no room for new prompts after 1 example: .* has {len(text)} tokens"
        with pytest.raises(DataError, match=words):
            trainer_of(tmp_path, [one], Scripted({}), model=model)


def test_where_no_list_fits_that_is_an_error_when_the_trainer_is_built(tmp_path):
    model = Recurrent(VOCAB)
    model.max_seq_len = 300
    with pytest.raises(DataError, match=r"no room .* after 8 examples: .* takes 300, of which 16"):
        trainer_of(tmp_path, [stage()], Scripted({}), model=model)


def test_where_seeds_are_known_later_it_is_an_error_before_anything_is_written(tmp_path):
    """Of an earlier stage there are no rows yet when the trainer is built."""
    model = Recurrent(VOCAB)
    model.max_seq_len = 300
    rows = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in SEEDS]
    stages = [
        DPOConfig(train_dataset=rows, optim=QUICK, dropout=0.0),
        stage(seed_dataset=from_stage("dpo")),
    ]
    engine = Scripted({})
    trainer = trainer_of(tmp_path, stages, engine, model=model)
    with pytest.raises(DataError, match="after 8 examples"):
        trainer(rehearse=False)
    assert not any(engine.weights.values())


# ---- whole runs


def model64() -> nn.Module:
    """Its responses end soon."""
    model = lively(Recurrent(VOCAB).double())
    with torch.no_grad():
        model.head.bias[END] += 3.0
    return model


def trainer_of(folder, stages, engine, model=None, **options):
    settings = dict(
        tokenizer=Characters(),
        eos_id=END,
        self_reward_prompt_config=JUDGE,
        checkpoints_folder=folder,
        quiet=True,
        engine=engine,
    )
    return SelfRewardingTrainer(
        model64() if model is None else model,
        finetune_configs=stages,
        **{**settings, **options},
    )


def written(**options) -> SelfInstruct:
    defaults = dict(seed_dataset=SEEDS, num_prompts=6, sampling=LONG, samples_per_round=2)
    return SelfInstruct(**{**defaults, **options})


def stage(kind=ExternalRewardDPOConfig, prompts=None, **options):
    """A stage with new prompts; settings of SelfInstruct and of the stage."""
    own = {name: options.pop(name) for name in list(options) if name in SelfInstruct.model_fields}
    defaults = dict(
        prompt_dataset=prompts or written(**own),
        num_generated_preference_pairs=3,
        prompts_per_block=2,
        generation=SHORT,
        dropout=0.0,
        optim=QUICK,
    )
    if kind is ExternalRewardDPOConfig:
        defaults["reward_model"] = lambda ids: ids.double().sum(dim=-1)
    else:
        defaults |= dict(judging=SHORT, num_sampled_reward_responses=1)
    return kind(**{**defaults, **options})


def sft(**options):
    rows = [{"prompt": f"say {i}", "completion": f"i say {i}"} for i in range(6)]
    return SFTConfig(**{**dict(train_dataset=rows, dropout=0.0, optim=QUICK), **options})


def instructions(run, place=0):
    return run.stage(place).read(Instruction)


@pytest.mark.parametrize("kind", [ExternalRewardDPOConfig, SelfRewardDPOConfig])
def test_every_trained_pair_can_be_followed_to_a_new_prompt_and_to_seeds(tmp_path, kind):
    name = kind.folder_name
    engine = Scripted(two_a_list(name))
    run = trainer_of(tmp_path, [stage(kind, num_prompts=10)], engine)()
    records = {record.id: record for record in instructions(run)}
    prompts = {prompt.id: prompt for prompt in run.prompts(0)}
    seeds = set()

    def follow(record_id, round):
        record = records[record_id]
        if record_id.startswith(f"{name}/seed/"):
            row = int(record_id.rsplit("/", 1)[1])
            assert record.text == SEEDS[row] and record.parents == ()
            seeds.add(row)
            return
        assert record.reason is None and int(record_id.split("/")[2]) < round
        assert record.parents
        for parent in record.parents:
            follow(parent, int(record_id.split("/")[2]))

    assert len(run.pairs(0)) == 3
    for pair in run.pairs(0):
        prompt = prompts[pair.id]
        origin = prompt.columns["instruction_id"]
        assert records[origin].text == prompt.text == pair.prompt
        follow(origin, 99)
    last = max(records, key=lambda i: (i.split("/")[1] == "new", i.split("/")[2]))
    assert any("/new/" in parent for parent in records[last].parents)
    assert seeds <= set(range(len(SEEDS))) and len(seeds) > 5
    kept = [r for r in new_of(instructions(run)) if r.reason is None]
    assert [r.text for r in kept] == [new_text(i) for i in (0, 1, 2, 3, 16, 17, 18, 19, 32, 33)]
    counts = {"prompts/kept": 10, "prompts/dropped_surplus": 2}
    assert run.summary(0)["new_prompts"] == counts
    logged = [m for m in run.metrics(0) if "prompts/kept" in m]
    assert logged == [{"step": 0, **counts}]


@pytest.mark.parametrize("who", ["current", "initial", "sft"])
def test_the_writer_has_the_weights_that_are_asked_for_and_the_policy_keeps_its_own(tmp_path, who):
    engine = Scripted(two_a_list("external_reward"))
    start = model64()
    before = {k: v.clone() for k, v in start.state_dict().items()}
    again = SFTConfig(
        train_dataset=[{"prompt": "a", "completion": "b"}], optim=QUICK, dropout=0.0, name="more"
    )
    trainer = trainer_of(tmp_path, [sft(), again, stage(model=who)], engine, model=start)
    run = trainer(rehearse=False)
    after = {}
    for name in ("sft", "more"):
        loaded = model64()
        run.load_weights(loaded, name)
        after[name] = loaded.state_dict()
    wanted = {"current": after["more"], "initial": before, "sft": after["sft"]}[who]
    assert not same(after["sft"], before) and not same(after["more"], after["sft"])
    assert len(engine.weights["lists"]) == 2 and engine.weights["rest"]
    assert all(same(found, wanted) for found in engine.weights["lists"])
    assert same(engine.weights["rest"][0], after["more"])  # candidates are the policy's
    assert (tmp_path / "initial").exists() == (who == "initial")


def test_the_prompts_of_a_later_round_are_those_of_the_stages_start_or_none(tmp_path):
    rows = {"seed_dataset": Rows(SEEDS, "seed_dataset")}
    engine = Scripted(two_a_list())
    ctx = context(Recurrent(VOCAB), engine=engine, tokens=tokens_of(), rows=rows)
    later = replace(ctx, round=Round(1))
    with pytest.raises(StoreError, match="the weights that made them are gone"):
        stage(num_prompts=4).with_prompts(later, stage_dir(ctx, tmp_path / "lost"))
    out = stage_dir(ctx, tmp_path / "there")
    first = stage(num_prompts=4).with_prompts(ctx, out).rows["prompt_dataset"]
    asked = len(engine.calls)
    again = stage(num_prompts=4).with_prompts(later, out).rows["prompt_dataset"]
    assert [again.read(i) for i in range(4)] == [first.read(i) for i in range(4)]
    assert len(engine.calls) == asked > 0
    # other weights can be loaded again
    other, gone = stage(num_prompts=4, model="initial"), Round(1, weights_gone=True)
    other.with_prompts(replace(ctx, round=gone), stage_dir(ctx, tmp_path / "initial"))
    assert len(engine.calls) == 2 * asked


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("who", ["current", "initial"])
def test_the_weights_are_back_where_the_writing_was_stopped(tmp_path, who):
    engine = Scripted(two_a_list("external_reward"), stop_at=1)
    model = model64()
    trainer = trainer_of(tmp_path, [sft(), stage(model=who)], engine, model=model)
    with pytest.raises(StopError) as stopped:
        trainer()
    trained = model64()
    Run.open(tmp_path).load_weights(trained, "sft")
    assert stopped.traceback  # while the frames live, so nothing was cleaned up with them
    assert same(model.state_dict(), trained.state_dict())
    assert len(engine.weights["lists"]) == 2


class Reciter(nn.Module):
    """Says a known text behind a list, and its end token 0 after it; it has its own letters."""

    def __init__(self, text: str, letters: str, vocab: int) -> None:
        super().__init__()
        self.text, self.letters, self.vocab = text, letters, vocab
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        out = torch.zeros(*ids.shape, self.vocab)
        for row, sequence in zip(out, ids.tolist(), strict=True):
            letters = "".join(self.letters[i] for i in sequence)
            for t in range(len(letters)):
                place = t - letters.rfind("\n9.", 0, t + 1) - 2
                going = letters.rfind("\n9.", 0, t + 1) >= 0 and 0 <= place < len(self.text)
                said = self.letters.index(self.text[place]) if going else 0
                row[t, said] = 100.0
        return out + 0 * self.weight


def test_another_model_writes_with_its_own_tokenizer_and_vocabulary(tmp_path):
    """Through the library's own engine; the policy's letters have other ids."""
    letters = "\0" + "".join(reversed(LETTERS)) + "äö"
    tokenizer = Characters(letters, eos_token_id=0)
    said = " Ask the baker for two loaves\n10. Sing a song of sixpence"
    writer = Reciter(said, letters, vocab=len(letters))
    policy = model64()
    prompts = dict(model=writer, tokenizer=tokenizer, num_prompts=2, samples_per_round=2)
    run = trainer_of(tmp_path, [stage(**prompts)], LocalEngine(), model=policy)()
    found = [(r.id, r.text, r.reason) for r in new_of(instructions(run))]
    name = "external_reward/new/0"
    assert found == [
        (f"{name}/0/0", "Ask the baker for two loaves", None),
        (f"{name}/0/1", "Sing a song of sixpence", None),
        (f"{name}/1/0", "Ask the baker for two loaves", "duplicate"),
        (f"{name}/1/1", "Sing a song of sixpence", "duplicate"),
    ]
    for prompt in run.prompts(0):  # in the policy's own ids
        assert Characters().decode(prompt.ids) == prompt.text
    assert writer.weight.item() == 0.0


def test_a_hugging_face_chat_model_reads_the_list_in_its_own_template(tmp_path):
    """And stops at its own end of turn."""
    pytest.importorskip("transformers")
    from tests.support.hf_models import VOCAB as ITS_VOCAB
    from tests.support.hf_models import tiny, word_tokenizer

    tokenizer = word_tokenizer(TEMPLATES["chatml"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    writer = tiny("llama", ITS_VOCAB, max_position_embeddings=4096)
    engine = Scripted(two_a_list("external_reward"), tokenizer=Whole(tokenizer), end=end)
    prompts = dict(model=writer, tokenizer=tokenizer, num_prompts=4)
    run = trainer_of(tmp_path, [stage(**prompts)], engine)()
    assert {id(module) for module in engine.models} == {id(writer)}
    assert all(end in decoding.end_ids for decoding in engine.decodings)
    for text in engine.asked.values():
        assert text.startswith("<|im_start|>user\nBelow is a numbered list")
        assert text.endswith("\n9.<|im_end|>\n<|im_start|>assistant\n")
    kept = [r.text for r in new_of(instructions(run)) if r.reason is None]
    assert kept == [new_text(i) for i in range(4)]  # without the end of turn


class Whole:
    """A Hugging Face tokenizer that shows special tokens too."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def test_another_model_with_the_trainers_tokens_needs_no_tokenizer(tmp_path):
    other = lively(Recurrent(VOCAB), seed=7)
    engine = Scripted(two_a_list("external_reward"))
    trainer_of(tmp_path, [stage(model=other)], engine)()
    assert {id(module) for module in engine.models} == {id(other)}


def test_a_run_stopped_while_it_writes_goes_on_in_a_new_trainer(tmp_path):
    """Also with a torn last line, and with prompts written but not answered."""

    def stages():
        return [sft(), stage(num_prompts=8, model="initial")]

    lists = two_a_list("external_reward")
    truth = trainer_of(tmp_path / "whole", stages(), Scripted(lists))()
    for stop, torn in ((0, False), (1, False), (1, True)):
        folder = tmp_path / f"{stop}{torn}"
        with pytest.raises(StopError):
            trainer_of(folder, stages(), Scripted(lists, stop_at=stop))()
        if torn:
            file = folder / "02-external_reward/instructions.0.jsonl"
            file.write_bytes(file.read_bytes()[:-9])
        engine = Scripted(lists)
        run = trainer_of(folder, stages(), engine)()
        assert instructions(run, 1) == instructions(truth, 1)
        for records in ("prompts", "candidates", "pairs"):
            assert getattr(run, records)(1) == getattr(truth, records)(1)
        assert run.summary(1) == truth.summary(1)
        assert same(weights_file(run), weights_file(truth))
        assert len(engine.calls) == 2 - stop + torn


def weights_file(run):
    model = model64()
    run.load_weights(model, 1)
    return model.state_dict()


def test_with_all_prompts_on_disk_a_resumed_stage_asks_for_no_list(tmp_path):
    class StopsLater(Scripted):
        def generate(self, model, requests, decoding):
            for item in super().generate(model, requests, decoding):
                if self.weights["rest"]:
                    raise StopError
                yield item

    lists = two_a_list("external_reward")
    with pytest.raises(StopError):
        trainer_of(tmp_path, [stage()], StopsLater(lists))(rehearse=False)
    assert (tmp_path / "01-external_reward/instructions.jsonl").exists()
    engine = Scripted(lists)
    run = trainer_of(tmp_path, [stage()], engine)()
    assert engine.calls == [] and len(run.pairs(0)) == 3


def test_a_resumed_run_may_have_new_objects_but_no_other_settings(tmp_path):
    """`model` and `tokenizer` are objects that each process builds anew."""

    def stages(**options):
        own = dict(model=lively(Recurrent(VOCAB), seed=7), tokenizer=Characters(eos_token_id=END))
        return [stage(**{**own, **options})]

    lists = two_a_list("external_reward")
    with pytest.raises(StopError):
        trainer_of(tmp_path, stages(), Scripted(lists, stop_at=1))()
    with pytest.raises(RunMismatchError, match="num_prompts"):
        trainer_of(tmp_path, stages(num_prompts=7), Scripted(lists))()
    with pytest.raises(RunMismatchError, match="temperature"):
        hot = LONG.model_copy(update={"temperature": 0.9})
        trainer_of(tmp_path, stages(sampling=hot), Scripted(lists))()
    assert trainer_of(tmp_path, stages(), Scripted(lists))().is_done(0)


def test_two_stages_with_one_self_instruct_have_their_own_new_prompts(tmp_path):
    shared = written(num_prompts=4)
    lists = {**two_a_list("first"), **two_a_list("second", first=500)}
    stages = [stage(prompts=shared, name="first"), stage(prompts=shared, name="second")]
    engine = Scripted(lists)
    run = trainer_of(tmp_path, stages, engine)()
    for place, (name, first) in enumerate((("first", 0), ("second", 500))):
        kept = [r for r in new_of(instructions(run, place)) if r.reason is None]
        assert [r.text for r in kept] == [new_text(first + i) for i in range(4)]
        assert run.prompts(place)[0].text == new_text(first)
        assert run.prompts(place)[0].row == 0
        assert {r.id.split("/")[0] for r in instructions(run, place)} == {name}
    assert not same(engine.weights["lists"][0], engine.weights["lists"][-1])  # M1, then M2


def test_a_later_stage_begins_at_the_first_new_prompt_though_one_used_the_seeds(tmp_path):
    """Seeds that an earlier stage answered are no reason to go on after them."""
    engine = Scripted(two_a_list("second"))
    stages = [stage(prompts=SEEDS, name="first"), stage(name="second")]
    run = trainer_of(tmp_path, stages, engine)()
    assert run.prompts("first")[0].text == SEEDS[0]
    assert run.prompts("second")[0].text == new_text(0)


TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_model_is_given_the_list_as_a_users_message(tmp_path):
    engine = Scripted(two_a_list("external_reward"))
    run = trainer_of(tmp_path, [stage()], engine, chat_template=TEMPLATE)()
    for text in engine.asked.values():
        assert text.startswith("<user>Below is a numbered list")
        assert text.endswith("\n9.\n<assistant>")
        assert len(shown_in(text.removeprefix("<user>").removesuffix("\n<assistant>"))) == 8
    for prompt in run.prompts(0):
        assert prompt.messages == ({"role": "user", "content": prompt.text},)
        assert Characters().decode(prompt.ids) == f"<user>{prompt.text}\n<assistant>"


# ---- seeds


FORMS = {
    "alpaca": lambda t: {"instruction": t, "input": "", "output": "Well."},
    "messages": lambda t: [{"role": "user", "content": t}, {"role": "assistant", "content": "Y"}],
    "rows": lambda t: {"messages": [{"role": "user", "content": t}]},
    "sharegpt": lambda t: {"conversations": [{"from": "human", "value": t}]},
    "prompts": lambda t: {"prompt": t, "source": "people"},
    "preferences": lambda t: {"prompt": t, "chosen": "a", "rejected": "b"},
    "ids": lambda t: Characters().encode(t),
}


@pytest.mark.parametrize("form", FORMS)
def test_seeds_may_be_rows_of_any_form_with_a_prompt(tmp_path, form):
    run = trainer_of(
        tmp_path,
        [stage(seed_dataset=[FORMS[form](text) for text in SEEDS])],
        Scripted(two_a_list("external_reward")),
    )()
    seeds = [r for r in instructions(run) if "/seed/" in r.id]
    assert [r.text for r in seeds] == SEEDS
    assert [r.id for r in seeds] == [f"external_reward/seed/{i}" for i in range(len(SEEDS))]


def test_seeds_may_be_files_or_an_iterable_that_can_be_read_once(tmp_path):
    lists = two_a_list("external_reward")
    file = tmp_path / "seeds.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in SEEDS))
    (tmp_path / "more.json").write_text(json.dumps(SEEDS))
    for kind, seeds in {
        "file": str(file),
        "path": tmp_path / "more.json",
        "once": (text for text in SEEDS),
        "parts": [str(file), SEEDS[:2]],
    }.items():
        run = trainer_of(tmp_path / kind, [stage(seed_dataset=seeds)], Scripted(lists))()
        found = [r.text for r in instructions(run) if "/seed/" in r.id]
        assert found == SEEDS + (SEEDS[:2] if kind == "parts" else [])


def test_seeds_that_were_read_are_those_of_a_resumed_run(tmp_path):
    """An iterable may give others the second time."""
    lists = two_a_list("external_reward")
    with pytest.raises(StopError):
        seeds = (text for text in SEEDS)
        trainer_of(tmp_path, [stage(seed_dataset=seeds)], Scripted(lists, stop_at=1))()
    seeds = (text for text in reversed(SEEDS))
    engine = Scripted(lists)
    run = trainer_of(tmp_path, [stage(seed_dataset=seeds)], engine)()
    assert [r.text for r in instructions(run) if "/seed/" in r.id] == SEEDS
    texts = {r.id: r.text for r in instructions(run)}
    for record in new_of(instructions(run)):
        name = record.id.rpartition("/")[0]
        if name in engine.asked:
            assert shown_in(engine.asked[name]) == [texts[p] for p in record.parents]


@pytest.mark.parametrize("bad", ["  \n", {"prompt": 3.5}], ids=["blank", "no text"])
def test_a_bad_seed_is_named_or_left_out_and_the_others_keep_their_numbers(tmp_path, bad):
    seeds = [*SEEDS[:2], bad, *SEEDS[2:]]
    with pytest.raises((DataError, TokenizerError), match="seed_dataset, row 2"):
        trainer_of(tmp_path, [stage(seed_dataset=seeds)], Scripted({}))
    engine = Scripted(two_a_list("external_reward"))
    skipping = stage(seed_dataset=seeds, on_bad_row="skip")
    run = trainer_of(tmp_path, [skipping], engine)()
    found = {r.id: r.text for r in instructions(run) if "/seed/" in r.id}
    assert found == {f"external_reward/seed/{i}": t for i, t in enumerate(seeds) if i != 2}
    assert {"step": 0, "rows/skipped": 1} in run.metrics(0)


def test_seeds_need_no_room_for_an_answer_and_new_prompts_do(tmp_path):
    """Seeds are only shown to the writer; max_seq_len is for what the policy answers."""
    texts = ["Ask me why it is", "Paint the whole fence green", "Sing me a song now"]
    assert min(map(len, SEEDS)) >= 27 == len(texts[1])
    listed = f" {texts[0]}\n10. {texts[1]}\n11. {texts[2]}"
    engine = Scripted({"external_reward/new/0/0": listed})
    short = stage(num_prompts=2, samples_per_round=1, max_seq_len=27)
    run = trainer_of(tmp_path, [short], engine)()
    assert {p.text for p in run.prompts(0)} == {texts[0], texts[2]}
    assert [r.reason for r in new_of(instructions(run))] == [None, "no_room", None]


# ---- what is refused when the trainer is built


def test_what_cannot_write_is_refused_before_the_run(tmp_path):
    def refused(words, *, error=ConfigError, options=None, **settings):
        with pytest.raises(error, match=words):
            trainer_of(tmp_path, [stage(**settings)], Scripted({}), **(options or {}))

    ids = [Characters().encode(text) for text in SEEDS]
    refused(
        "Give tokenizer=",
        seed_dataset=ids,
        options=dict(tokenizer=None),
    )
    refused("'current', 'initial', the name of an earlier stage or a module", model=3)
    refused("has 40 tokens and the trained one 101", model=Recurrent(40))
    refused("methods encode and decode", model=Recurrent(40), tokenizer="letters")
    refused(
        "must be ids of the model",
        error=TokenizerError,
        model=Recurrent(40),
        tokenizer=Characters(),
    )
    refused("seed_dataset is empty", error=DataError, seed_dataset=[])
    with pytest.raises(ConfigError, match=r"min_words \(9\) is more than max_words \(5\)"):
        written(min_words=9, max_words=5)
    with pytest.raises(ConfigError, match="tokenizer is for a module of its own"):
        written(tokenizer=Characters())
    assert not os.listdir(tmp_path)


def test_a_name_of_no_weights_is_refused_before_a_list_is_written(tmp_path):
    engine = Scripted({})
    with pytest.raises(ConfigError, match="'sfft'"):
        trainer_of(tmp_path, [sft(), stage(model="sfft")], engine)()
    assert engine.calls == []


def test_the_defaults_are_the_papers_and_self_instructs():
    found = SelfInstruct(seed_dataset=SEEDS, num_prompts=1)
    assert (found.num_seed_examples, found.num_generated_examples) == (6, 2)
    assert (found.min_words, found.max_words, found.max_rouge_l) == (4, 150, 0.7)
    assert found.model == "current" and found.keywords is None
    for word in ("image", "graphs", "picture", "file", "map", "draw", "plot", "go to"):
        assert word in DEFAULT_KEYWORDS


# ---- two processes


def run_stages(folder: str) -> None:
    """What each of two processes runs, and one alone: three rounds of lists, pairs, training."""
    engine = Scripted({**two_a_list("external_reward"), **two_a_list("few")})
    stages = [sft(), stage(model="initial", num_prompts=16, samples_per_round=3)]
    stages.append(stage(name="few", num_prompts=9, samples_per_round=1, max_samples=2))
    trainer = trainer_of(folder, stages, engine, accelerate_kwargs=dict(cpu=True))
    with pytest.raises(DataError, match="4 new prompts in 2 lists"):  # on every process
        trainer()
    Path(folder, f"asked.{trainer.runtime.rank}.json").write_text(json.dumps(engine.calls))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    two("-m", "tests.stages.test_self_instruct", tmp_path / "two")
    run_stages(str(tmp_path / "one"))
    alone, together = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for place in (1, 2):
        assert instructions(together, place) == instructions(alone, place)
    for records in ("prompts", "candidates", "pairs"):
        assert getattr(together, records)(1) == getattr(alone, records)(1)
    assert together.summary(1)["new_prompts"] == alone.summary(1)["new_prompts"]
    asked = [json.loads((tmp_path / f"two/asked.{rank}.json").read_text()) for rank in (0, 1)]
    names = [{name for call in calls for name in call} for calls in asked]
    assert names[0].isdisjoint(names[1])  # each list is written once
    assert names[0] and names[1]
    assert not list((tmp_path / "two").glob("*/*.[0-9]*.jsonl"))


if __name__ == "__main__":
    run_stages(sys.argv[1])
