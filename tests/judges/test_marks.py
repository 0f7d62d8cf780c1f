"""Rubrics whose items a judge marks: what is counted, and how probable yes is at each mark.

The oracle of expected scores enumerates both words at each mark by hand and asks the bare model one
whole row at a time.
"""

from functools import cache

import pytest
import torch

from self_rewarding_lm import SelfRewardDPOConfig, SelfRewardingTrainer, SelfRewardSFTConfig
from self_rewarding_lm.config import MarkedRubric, RewardConfig
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, RunMismatchError
from self_rewarding_lm.generation import score_trie
from self_rewarding_lm.generation.engine import Completion
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.score_trie import Expected, build_trie
from self_rewarding_lm.judges.expected import Place, VerdictReader, summed
from self_rewarding_lm.judges.marks import marks_form
from self_rewarding_lm.judges.self_judge import SelfJudge, check_judge_prompt, form_of, score_parser
from self_rewarding_lm.runs.fingerprint import fingerprint_of
from tests.judges.test_expected import MODELS, leaning, pieces, scores_at, tokens_of
from tests.judges.test_judges import JUDGING, Cut, Scripted, asked, judging_context
from tests.support.models import (
    CHARACTERS,
    END,
    TEXT_VOCAB,
    Recurrent,
    decode,
    ids_of,
    last_logits,
    lively,
    transformer,
)

PROMPT = "rate <{{ prompt }}> and <{{ response }}>\nreview:"
COMMAS = MarkedRubric(items=4, yes=", yes.", no=", no.")
REVIEW = (
    "Starts with She: She, yes. milk: the milk, yes. market: none, no. Ends with home: home, yes."
)


def read(marks: MarkedRubric, text: str):
    return score_parser(RewardConfig(prompt_template=PROMPT, marks=marks))(text)


SAID = [
    (f"{REVIEW} Score: 3", 3),
    (f"{REVIEW} Score: 4", 3),  # the sum that the judge states does not count
    (REVIEW, 3),
    ("a: b, no. c: d, no. e: f, no. g: h, no.", 0),
    ("a: b, yes. c: d, yes. e: f, yes. g: h, yes. Score: 1", 4),
    ("a: b,  Yes. c: d,\nYES. e: f, **no**. g: h , yes .", 3),
    ("<think>a, yes. b, no.</think>a: b, yes. c: d, no. e: f, no. g: h, no. Score: 4", 1),
    ("a: b, yes. c: d, yes. e: f, yes. Score: 3", None),  # one too few
    ("a: b, yes. c: d, yes. e: f, yes. g: h, maybe.", None),
    ("a: b, yes. c: d, yes. e: f, yes. g: h, yes. i: j, no.", None),  # one too many
    ("a: b, yes. c: d, yes. e: f, yes. g: h, yes", None),
    ("a: b, yes.c: d,yes.e: f, none. g: h, no.", None),
    ("Score: 4", None),
    ("", None),
]


@pytest.mark.parametrize(("said", "score"), SAID)
def test_the_judges_own_marks_are_counted_and_its_sum_is_not(said, score):
    found = read(COMMAS, said)
    assert (found.score, found.reason) == (score, "no_score" if score is None else None)


def test_words_are_whole_and_the_longer_one_is_taken_where_both_begin():
    bare = MarkedRubric(items=2, yes="yes", no="no")
    assert read(bare, "none: yes; notes: No!").score == 1
    assert read(bare, "yesterday: eyes, no: 1no").score is None
    longer = MarkedRubric(items=2, yes="ok", no="ok not")
    assert read(longer, "a: ok not. b: ok.").score == 1
    assert read(MarkedRubric(items=2, yes="**yes**", no="**no**"), "a **no** b **yes**").score == 1
    signs = MarkedRubric(items=3, yes="[x]", no="[ ]")
    assert read(signs, "- [x] short\n- [ ] right\n- [X] kind").score == 2
    hooks = MarkedRubric(items=2, yes="✓", no="✗")
    assert read(hooks, "kurz✓ richtig✗").score == 1
    assert read(MarkedRubric(items=2, yes="да", no="нет"), "когда: да. куда: нет").score == 1


def test_named_items_stand_before_their_marks_in_their_order():
    named = MarkedRubric(items=("First word", "milk", "Last word"), yes=", yes.", no=", no.")
    good = "first word She: She, yes. MILK: warm milk, no. Last\nword home: home, yes."
    assert read(named, good).score == 2
    swapped = "milk: warm, no. First word She: She, yes. Last word home: home, yes."
    doubled = "First word milk, yes. beach, yes. Last word home: home, yes."
    behind = "First word: She, yes. milkshake: x, yes. Last word home: home, yes."
    unnamed = "First word: She, yes. milk: x, yes. home: home, yes. Last word"
    for text in (swapped, doubled, behind, unnamed, f"{good} Extra: x, yes."):
        assert read(named, text).reason == "no_score"


def test_items_may_count_differently_and_their_sum_is_exact():
    tenths = MarkedRubric(items=3, yes="y", no="n", points=(0.1, 0.2, 0.3))
    assert read(tenths, "a y b y c n").score == read(tenths, "a n b n c y").score == 0.3
    assert tenths.score_range == (0.0, 0.6)
    assert read(tenths, "y y y").score == 0.6


def test_only_the_end_of_a_long_text_is_read():
    assert read(COMMAS, ", no. " * 3 + "x " * 20_000 + REVIEW).score == 3
    assert read(COMMAS, REVIEW + " x" * 20_000).score is None


CUT = [
    (f"{REVIEW} Score: 3", 3),
    (REVIEW, 3),
    (f"{REVIEW} market: the mar", 3),
    (f"{REVIEW} market: none, n", None),  # a fifth mark begins
    (REVIEW[:-2], None),
    (REVIEW[:40], None),
    ("", None),
    ("<think>She, yes. milk, yes. market, yes. home, yes.", None),
]


@pytest.mark.parametrize(("said", "score"), CUT)
def test_a_review_that_was_cut_off_counts_if_all_its_marks_are_there(said, score):
    form = form_of(RewardConfig(prompt_template=PROMPT, marks=COMMAS))
    found = form.read_answer(said, finished=False)
    assert (found.score, found.reason) == (score, "unfinished" if score is None else None)
    bare = form_of(
        RewardConfig(prompt_template=PROMPT, marks=MarkedRubric(items=1, yes="yes", no="no"))
    )
    assert bare.read_answer("milk: no", finished=False).reason == "unfinished"  # none, not, ...
    assert bare.read_answer("milk: no, ", finished=False).score == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MarkedRubric(items=0, yes="y", no="n"), "items must be 1 or more.*got 0"),
        (lambda: MarkedRubric(items=(), yes="y", no="n"), "items must be 1 or more"),
        (lambda: MarkedRubric(items=("a", " *"), yes="y", no="n"), "names of items must have"),
        (lambda: MarkedRubric(items=2, yes="y"), "'no' is required"),
        (lambda: MarkedRubric(items=2, yes="yes", no="*Yes* "), "yes and no must differ"),
        (lambda: MarkedRubric(items=2, yes="yes", no="_"), "yes and no must differ"),
        (lambda: MarkedRubric(items=2, yes="y", no="n", points=(1,)), "points must be 2 numbers"),
        (
            lambda: MarkedRubric(items=1, yes="y", no="n", points=(-1,)),
            "points must be 1 number above 0",
        ),
        (lambda: reward(parse_reward=len), "marks alone make the score.*leave out parse_reward"),
        (lambda: reward(reward_regex_template="{{ reward }}"), "leave out reward_regex_template"),
        (lambda: reward(allowed_scores=(1, 2)), "leave out allowed_scores"),
        (lambda: reward(score_range=(0, 5)), r"score_range is \(0.0, 4.0\); leave it out, got"),
        (lambda: reward(forced_ending=True), "marks stand within a review.*score_mode='expected'"),
        (lambda: reward(forced_ending="at_once", score_mode="expected"), "marks stand within"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_words(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def reward(**settings):
    return RewardConfig(prompt_template=PROMPT, marks=COMMAS, **settings)


def test_the_range_of_scores_is_that_of_the_points():
    assert reward().score_range == reward(score_range=(0, 4)).score_range == (0.0, 4.0)
    again = RewardConfig(**dict(reward()))
    assert again.score_range == (0.0, 4.0) and again.marks is reward().marks


def test_a_copy_is_checked_like_its_original():
    five = MarkedRubric(items=5, yes="y", no="n")
    assert reward().model_copy(update={"marks": five}).score_range == (0.0, 5.0)
    expected = reward().model_copy(update={"score_mode": "expected"})
    assert (expected.score_mode, expected.marks) == ("expected", COMMAS)
    assert expected.as_written().score_mode == "sampled"
    with pytest.raises(ConfigError, match="marks stand within a review"):
        reward().model_copy(update={"forced_ending": "at_once"})


def test_a_run_that_began_before_there_were_marks_has_the_same_settings():
    plain = RewardConfig(prompt_template="x", reward_regex_template="Score: {{ reward }}")
    assert "marks" not in fingerprint_of(plain)
    assert fingerprint_of(reward())["marks"]["yes"] == ", yes."


SMALL = MarkedRubric(items=2, yes=": y.", no=": n.")


def test_a_judge_is_read_by_its_marks_and_cut_reviews_have_none():
    said = {
        "two": "a b: y. c: n. score: 2",
        "one": "a b: y. c: n. d: y.",
        "cut": "a b: y. c: ?",
    }
    engine = Cut(lambda prompt: next(said[word] for word in said if f"<{word}>" in prompt))
    judge = SelfJudge(RewardConfig(prompt_template=PROMPT, marks=SMALL), JUDGING, 2)
    found = {j.id: j for j in judge.judge(judging_context(engine), *asked(("q", [*said])))}
    assert {i: (j.score, j.reason, j.finished) for i, j in found.items()} == {
        **{f"s/0/0/0/j{k}": (1.0, None, True) for k in range(2)},
        **{f"s/0/0/1/j{k}": (None, "no_score", True) for k in range(2)},
        **{f"s/0/0/2/j{k}": (None, "unfinished", False) for k in range(2)},
    }
    assert found["s/0/0/0/j0"].source == "sampled"


# expected marks


@pytest.fixture
def any_mass(monkeypatch):
    """Scores count however improbable both words are to a model of random weights."""
    monkeypatch.setattr(score_trie, "MIN_SCORE_MASS", 0.0)


PIECES = {
    "a token a character": pieces(),
    "words with their spaces": pieces(" yes", " no", " milk", ": none", " home"),
    "a comma within the word": pieces(", yes", ", no", "no."),
    "a comma joined to what is before": pieces("k,", "e,", ",", " yes.", " no"),
    "one word begins as the other": pieces(" ", "y", "n", "ye", "yes."),
}
SAID_AT_MARKS = [  # what the judge wrote, and what stands before each mark
    (
        "a: milk, yes. b: none, no. Score: 1",
        ("a: milk", "a: milk, yes. b: none"),
    ),
    (
        "a: milk, no. b: home, no.",
        ("a: milk", "a: milk, no. b: home"),
    ),
    (", yes., yes.", ("", ", yes.")),
]


def by_hand(module, made, prompt, before, words) -> tuple[float, float]:
    """P(yes) / (P(yes) + P(no)) after a text, and their sum: each word written out and encoded,
    the chance of each of its tokens from a whole forward."""
    rows = [made.encode(before + word) for word in words]
    shared = made.encode(before)
    shared = next(
        (
            shared[:n]
            for n in range(len(shared), 0, -1)
            if all(row[:n] == shared[:n] for row in rows)
        ),
        [],
    )
    chances = []
    for row in rows:
        chance = 1.0
        for n in range(len(shared), len(row)):
            after = last_logits(module, [*prompt, *row[:n]]).double().softmax(dim=-1)
            chance *= float(after[row[n]])
        chances.append(chance)
    return chances[0] / sum(chances), sum(chances)


@cache
def judging_module(tokenizer: str, model: str):
    """A model of random weights that is likelier to write the words of marks."""
    made = PIECES[tokenizer]
    favoured = {token for word in ("e, yes.", "e, no.") for token in made.encode(word)}
    return leaning(MODELS[model](len(made.all) + 1), favoured)


@pytest.mark.parametrize(("said", "before"), SAID_AT_MARKS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokenizer", PIECES)
def test_the_expected_score_is_the_sum_of_what_each_mark_gives_by_hand(
    tokenizer, model, said, before, any_mass
):
    made = PIECES[tokenizer]
    words, module = (", yes.", ", no."), judging_module(tokenizer, model)
    form = marks_form(*words, (1.0, 0.25))
    reader = VerdictReader(form, tokens_of(made))
    prompt = (5, 6, 7)
    places = reader.stated(prompt, tuple(made.encode(said)))
    assert [p.points for p in places] == [1.0, 0.25]
    parts = scores_at(module, places, reader)
    wanted = [by_hand(module, made, prompt, text, words) for text in before]
    assert [part.mass for part in parts] == pytest.approx([m for _, m in wanted], abs=1e-8)
    assert [part.score for part in parts] == pytest.approx([p for p, _ in wanted], abs=1e-8)
    found = summed(places, parts)
    assert found.score == pytest.approx(wanted[0][0] + wanted[1][0] / 4, abs=1e-8)
    assert found.mass == min(part.mass for part in parts)


def test_a_review_of_which_one_mark_has_no_chance_has_no_score():
    good, poor = Expected(0.5, 0.9), Expected(None, 0.05, "low_mass")
    places = [Place((0,), build_trie({1: [1], 0: [2]}), points) for points in (1.0, 2.0)]
    assert summed(places, [good, good]) == Expected(1.5, 0.9)
    assert summed(places, [good, poor]) == Expected(None, 0.05, "low_mass")
    assert summed(places, [Expected(None, None, "not_finite"), poor]) == Expected(
        None, None, "not_finite"
    )


def test_a_mark_within_a_token_has_no_place_and_then_no_item_has():
    made = pieces(unused=("k, y", "es."))
    reader = VerdictReader(marks_form(", yes.", ", no.", (1.0, 1.0)), tokens_of(made))
    split = [*made.encode("a: mil"), made.id("k, y"), made.id("es."), *made.encode(" b: x, no.")]
    assert made.decode(split) == "a: milk, yes. b: x, no."
    assert reader.form.read(made.decode(split)).score == 1
    assert reader.stated((0,), tuple(split)) == ()


def test_words_that_a_tokenizer_does_not_tell_apart_are_an_error_before_any_work():
    class Unknowing:
        """Has one token for all that it does not know."""

        def encode(self, text):
            return [" 0abcdefghijklmnopqrstuvwxyz".find(c) + 1 for c in text]

        def decode(self, ids):
            return "".join("? 0abcdefghijklmnopqrstuvwxyz"[i] for i in ids)

    config = RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        marks=MarkedRubric(items=2, yes="✓", no="✗"),
        score_mode="expected",
    )
    with pytest.raises(ConfigError, match=r"encodes ✓ like ✗.*Use score_mode='sampled'"):
        check_judge_prompt(config, Tokens(Unknowing(), eos_id=None, vocab=29), 64)
    sampled = RewardConfig(prompt_template=config.prompt_template, marks=config.marks)
    check_judge_prompt(sampled, Tokens(Unknowing(), eos_id=None, vocab=29), 64)


@pytest.mark.parametrize("points", [(1.0, 1.0), (2.0, 0.5)])
def test_a_judge_s_expected_marks_are_those_of_its_own_review(points, any_mass):
    module = lively(Recurrent(TEXT_VOCAB).double())
    module.head.bias.data[list(ids_of(": yn."))] += 6.0
    said = "milk: y. home: n. Score: 2"
    engine = Scripted(lambda prompt: said.replace("S", "s") if "<cut>" not in prompt else said[:11])
    marks = MarkedRubric(items=2, yes=": y.", no=": n.", points=points)
    config = RewardConfig(prompt_template=PROMPT, marks=marks, score_mode="expected")
    judge = SelfJudge(config, JUDGING, 1)
    found = list(
        judge.judge(
            judging_context(engine, module), *asked(("q", ["x", "yy", "cut"]), ("p", ["z"]))
        )
    )
    scores = {j.candidate_ids[0]: j for j in found}
    assert len(found) == len(scores) == 4
    for prompt, response, owner in (("q", "x", "0/0/0"), ("q", "yy", "0/0/1"), ("p", "z", "1/0/0")):
        judgement = scores[f"s/{owner}"]
        head = f"rate <{prompt}> and <{response}>\nreview:"
        wanted, masses = 0.0, []
        for before, worth in (("milk", points[0]), ("milk: y. home", points[1])):
            chances = []
            for word in (": y.", ": n."):
                ids = ids_of(head + before)
                chance = 1.0
                for token in ids_of(word):
                    chance *= float(last_logits(module, list(ids)).softmax(dim=-1)[token])
                    ids = (*ids, token)
                chances.append(chance)
            wanted += worth * chances[0] / sum(chances)
            masses.append(sum(chances))
        assert judgement.score == pytest.approx(wanted, abs=1e-8)
        assert judgement.score_mass == pytest.approx(min(masses), abs=1e-8)
        assert (judgement.source, judgement.reason) == ("expected", None)
    assert (scores["s/0/0/2"].score, scores["s/0/0/2"].reason) == (None, "no_score")


# in a run


class Reviewer(LocalEngine):
    """An engine whose reviews have as many marks of yes as its answers have letters a to f; each
    third review leaves an item out."""

    def generate(self, model, requests, decoding):
        for i in range(len(requests)):
            prompt = decode(torch.tensor(requests[i].ids))
            if not prompt.startswith("rate <"):
                letters = "abcdef"[: requests[i].key % 7]
                yield i, Completion((*ids_of(f"x{letters}"), END), True)
                continue
            met = sum(letter in prompt.split("and <")[1].split(">")[0] for letter in "abcdef")
            items = 5 if requests[i].name.endswith("j2") else 6
            marks = " ".join(f"i: {'y' if n < met else 'n'}." for n in range(items))
            yield i, Completion((*ids_of(f"{marks} score: 2"), END), True)


@pytest.mark.parametrize("score_mode", ["sampled", "expected"])
def test_a_run_is_judged_by_marks_and_goes_on_with_the_same_ones(tmp_path, score_mode, any_mass):
    config = RewardConfig(
        prompt_template=PROMPT,
        marks=MarkedRubric(items=6, yes=": y.", no=": n."),
        score_mode=score_mode,
    )
    common = dict(
        prompt_dataset=["p", "q", "r"],
        generation=JUDGING,
        judging=JUDGING,
        dropout=0.0,
        num_train_steps=1,
    )

    def run(marks=config):
        stages = [
            SelfRewardDPOConfig(**common, min_parse_rate=0.5),
            SelfRewardSFTConfig(**common, min_parse_rate=0.5, min_score=0.0, name="top"),
        ]
        return SelfRewardingTrainer(
            transformer(vocab=TEXT_VOCAB, max_seq_len=256),
            finetune_configs=stages,
            tokenizer=CHARACTERS,
            eos_id=END,
            checkpoints_folder=tmp_path / "run",
            self_reward_prompt_config=marks,
            engine=Reviewer(),
            quiet=True,
            accelerate_kwargs={"cpu": True},
        )()

    done = run()
    judged = done.judgements("self_reward")
    answers = {c.id: c.text for c in done.candidates("self_reward")}
    assert len(judged) == 3 * 4 * 3
    for judgement in judged:
        if judgement.id.endswith("j2"):
            assert (judgement.score, judgement.reason) == (None, "no_score")
            continue
        met = len(answers[judgement.candidate_ids[0]]) - 1
        assert judgement.source == score_mode and 0 <= judgement.score <= 6
        assert (judgement.score == met) == (score_mode == "sampled")
        assert (judgement.score_mass is None) == (score_mode == "sampled")
    assert done.pairs("self_reward") and (tmp_path / "run" / "report.html").exists()
    assert [j.id for j in run().judgements("self_reward")] == [j.id for j in judged]
    other = RewardConfig(prompt_template=PROMPT, marks=MarkedRubric(items=6, yes="y.", no="n."))
    with pytest.raises(RunMismatchError, match=r'"yes": "y\.'):
        run(other)
