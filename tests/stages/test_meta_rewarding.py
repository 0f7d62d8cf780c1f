"""Meta-Rewarding: one prompt by hand, whole runs that stop and go on, what is refused."""

import logging
import re
from itertools import permutations
from pathlib import Path

import pytest
import torch

from self_rewarding_lm import (
    ComparisonConfig,
    MetaJudgingConfig,
    MetaRewardDPOConfig,
    RewardConfig,
    Run,
    SamplingConfig,
    SelfRewardDPOConfig,
)
from self_rewarding_lm.errors import ConfigError, JudgeError
from self_rewarding_lm.generation.engine import Completion
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.records import stable_hash
from self_rewarding_lm.stages.meta_rewarding import battles, strengths
from tests import test_trainer
from tests.stages.test_meta_arithmetic import WORKED
from tests.support.models import END, Recurrent, decode, ids_of, last_logits
from tests.support.processes import two
from tests.test_trainer import PROMPTS, QUICK, SHORT, model64, same, weights_of

REWARD = RewardConfig(
    prompt_template="rate <{{ prompt }}> and <{{ response }}>:",
    reward_regex_template="score: {{ reward }}",
    score_range=(0, 5),
)
COUNTED = RewardConfig(  # of any text a score, which a random model's judgements have
    prompt_template="{{ prompt }}>{{ response }}:",
    parse_reward=lambda text: float(len(set(text))),
)
META = MetaJudgingConfig(
    prompt_template="task <{{ judge_prompt }}> one <{{ judgement_a }}> or <{{ judgement_b }}>?",
    labels=("a", "b"),
    tie_label="same",
    verdict_prefix="better: ",
)


def trainer_of(folder, stages, model=None, **options):
    prompts = {"default": COUNTED, "words": REWARD}
    options = {"self_reward_prompt_config": prompts, **options}
    return test_trainer.trainer_of(folder, stages, model, **options)


def meta_reward(**options):
    """A stage of a random model; `Stops` writes its verdicts."""
    defaults = dict(
        prompt_dataset=PROMPTS,
        num_candidate_responses=3,
        num_sampled_reward_responses=3,
        generation=SHORT,
        judging=SHORT,
        meta_judging=META,
        max_prompt_passes=1,
        dropout=0.0,
        optim=QUICK,
    )
    return MetaRewardDPOConfig(**{**defaults, **options})


class Written(LocalEngine):
    """An engine that writes a text that is known for each record; it breaks where there is none.

    cut: records whose text is cut off at its end.
    """

    def __init__(self, texts, cut=()) -> None:
        super().__init__()
        self.texts, self.cut, self.asked = texts, cut, {}

    def generate(self, model, requests, decoding):
        for i in reversed(range(len(requests))):  # results may come in any order
            name = requests[i].name
            self.asked[name] = requests[i]
            own_name = name.split("/", 1)[1]
            ids, is_whole = ids_of(self.texts[own_name]), own_name not in self.cut
            yield i, Completion((*ids, END) if is_whole else ids, is_whole)


def verdicts_of(judged, table, names):
    """The texts of comparisons: 1 is "a", -1 is "b", 0 a tie."""
    said = {1: "hm. better: a", -1: "better: b", 0: "better: same"}
    return {f"{judged}/{names[m]}/vs/{names[n]}": said[r] for (m, n), r in table.items()}


def numbered(judged, texts):
    return {f"{judged}/j{k}": text for k, text in enumerate(texts)}


TOLD = ["bad. score: 1", "hm. score: 5", "bad. score: 1", "ok. score: 2", "dunno"]
BY_HAND = {
    "0/0/0": "abc",
    "0/0/1": "xy",
    **numbered("0/0/0", ["fine. score: 4"] * 4 + ["score: 5"]),
    **numbered("0/0/1", TOLD),  # j2 is j0 again, j4 has no score
    **verdicts_of("0/0/1", WORKED, ["j0", "j1", "j3"]),
    "1/0/0": "left",
    "1/0/1": "right",
    **numbered("1/0/0", ["score: 3"] * 5),
    **numbered("1/0/1", ["score: 4"] * 5),
}


def by_hand(folder, texts=BY_HAND, model=None, cut=(), **options):
    """A run over two prompts of two responses with five judgements each, and its engine."""
    defaults = dict(
        prompt_dataset=PROMPTS[:2],
        num_candidate_responses=2,
        num_sampled_reward_responses=5,
        self_reward_config_keyname="words",
        meta_judging=META,
        judging=SamplingConfig(max_new_tokens=40),
    )
    engine = Written(texts, cut)
    trainer = trainer_of(
        folder,
        [meta_reward(**{**defaults, **options})],
        model or model64(),
        engine=engine,
        eos_id=END,
    )
    return trainer(rehearse=False), engine


def logprobs(module, prompt, response):
    """What the bare model gives each token of a response, one forward a token."""
    found = []
    for k, token in enumerate(response):
        chances = last_logits(module, [*prompt, *response[:k]]).log_softmax(dim=-1)
        found.append(float(chances[token]))
    return found


# One prompt by hand


def test_every_number_of_one_prompt(tmp_path):
    """The second response's scores are 1, 5, 1, 2: they vary most. Its three different judgements
    with a score meet in both orders, as in the worked case; the first prompt's do not vary."""
    run, engine = by_hand(tmp_path)
    told = {m.id: m for m in run.meta_judgements(0)}
    names = ["meta_reward/0/0/1/j0", "meta_reward/0/0/1/j1", "meta_reward/0/0/1/j3"]
    expected = {f"{a}/vs/{b.rsplit('/', 1)[1]}": (a, b) for a, b in permutations(names, 2)}
    assert {i: m.judgement_ids for i, m in told.items()} == expected
    assert told[f"{names[0]}/vs/j1"].score == 1.0 and told[f"{names[2]}/vs/j0"].score == 0.0
    assert told[f"{names[0]}/vs/j1"].text == "hm. better: a"
    assert {(m.judge, m.source, m.reason) for m in told.values()} == {
        ("self:meta", "compared", None)
    }
    request = engine.asked[f"{names[0]}/vs/j1"]
    assert decode(torch.tensor(request.ids)) == (
        "task <rate <tell 0> and <xy>:> one <bad. score: 1> or <hm. score: 5>?"
    )
    assert request.key == stable_hash(0, f"{names[0]}/vs/j1")

    actor, judge, other = run.pairs(0)
    assert (actor.id, actor.chosen, actor.rejected) == ("meta_reward/0/0", "abc", "xy")
    assert (actor.chosen_score, actor.rejected_score) == (4.2, 2.25)
    assert (other.id, other.chosen) == ("meta_reward/1/0", "right")
    assert judge.id == "meta_reward/0/0/judge"
    assert (judge.chosen_id, judge.rejected_id) == (names[0], names[2])
    assert judge.prompt_ids == ids_of("rate <tell 0> and <xy>:")
    assert judge.prompt_ids == engine.asked[names[0]].ids  # what the judge was asked
    assert judge.chosen_ids == (*ids_of("bad. score: 1"), END)
    assert judge.rejected_ids == (*ids_of("ok. score: 2"), END)
    first, _, last = strengths(battles(WORKED, 3, (1 / 6, 5 / 6)))
    assert (judge.chosen_score, judge.rejected_score) == (first, last)


def test_judgements_that_were_cut_off_are_neither_compared_nor_taught(tmp_path):
    told = ["ok. score: 3. so", *TOLD[1:]]
    texts = BY_HAND | numbered("0/0/1", told)
    texts |= verdicts_of("0/0/1", WORKED, ["j1", "j2", "j3"])
    run, _ = by_hand(tmp_path, texts, cut={"0/0/1/j0"})
    cut = [j for j in run.judgements(0) if j.finished is False]
    assert [(j.id, j.score) for j in cut] == [("meta_reward/0/0/1/j0", 3.0)]
    compared = {name for m in run.meta_judgements(0) for name in m.judgement_ids}
    assert compared == {f"meta_reward/0/0/1/j{k}" for k in (1, 2, 3)}
    assert {run.pairs(0)[1].chosen_id, run.pairs(0)[1].rejected_id} <= compared


def test_the_comparisons_measures_and_what_was_dropped(tmp_path):
    """Of six verdicts, five for the first place. The scores are 1, 5 and 2: the higher one wins in
    (1, 0) and (1, 2) alone."""
    run, _ = by_hand(tmp_path)
    metrics = run.summary(0)["metrics"]
    found = {k: v for k, v in metrics.items() if k.startswith(("meta/", "pairs/"))}
    assert found == {
        "meta/comparisons": 6,
        "meta/parse_rate": 1.0,
        "meta/tie_rate": 0.0,
        "meta/position_bias": 5 / 6,
        "meta/prefers_higher_score": 2 / 6,
        "pairs/kept": 2,
        "pairs/judge_kept": 1,
        "pairs/judge_dropped_unvaried": 1,
    }
    assert (run.summary(0)["pairs"], run.summary(0)["judge_pairs"]) == (3, 1)
    assert found.items() <= {k: v for line in run.metrics(0) for k, v in line.items()}.items()


def test_both_kinds_of_pairs_are_trained_in_one_dpo(tmp_path):
    model = model64()
    run, _ = by_hand(tmp_path, model=model)
    before = model64()
    told_by_id = {told.id: told for told in run.reference(0)}
    assert len(told_by_id) == 3
    for pair in run.pairs(0):
        told = told_by_id[f"{pair.id}/r0"]
        for side in ("chosen", "rejected"):
            expected = logprobs(before, pair.prompt_ids, getattr(pair, f"{side}_ids"))
            assert getattr(told, side) == pytest.approx(expected, abs=1e-5)
    (step,) = [m for m in run.metrics(0) if "loss" in m]
    assert step["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert not same(weights_of(model), weights_of(before))


def test_position_weights_are_of_the_whole_stage(tmp_path):
    """The other prompt's ten wins of the first place leave a win there 1/16, and one in the second
    15/16: with weights of its own its pair would come out of 1/6 and 5/6."""
    second = numbered("1/0/1", [f"score: {k}" for k in range(5)])
    places = list(permutations(range(5), 2))
    first = dict.fromkeys(places[:10], 1) | dict.fromkeys(places[10:], 0)
    texts = BY_HAND | second | verdicts_of("1/0/1", first, [f"j{k}" for k in range(5)])
    run, _ = by_hand(tmp_path, texts)
    pairs = {p.id: p for p in run.pairs(0)}
    e = strengths(battles(WORKED, 3, (1 / 16, 15 / 16)))
    assert pairs["meta_reward/0/0/judge"].chosen_score == e[0]
    assert run.summary(0)["metrics"]["meta/tie_rate"] == 10 / 26
    assert run.summary(0)["metrics"]["pairs/judge_kept"] == 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_judgement_length": 12}, "long"),  # "bad. score: 1" has 13
        ({"max_seq_len": 36}, "no_room"),  # the judge prompt has 23, the response and its end 14
        ({"judge_share": 0.3}, "surplus"),  # one of three is more
    ],
)
def test_a_judge_pair_is_dropped_for_its_reason(settings, reason, tmp_path):
    run, _ = by_hand(tmp_path, **settings)
    metrics = run.summary(0)["metrics"]
    assert metrics[f"pairs/judge_dropped_{reason}"] == 1 and metrics["pairs/judge_kept"] == 0
    assert [p.id for p in run.pairs(0)] == ["meta_reward/0/0", "meta_reward/1/0"]


@pytest.mark.parametrize(
    "settings", [{"max_judgement_length": 13}, {"max_seq_len": 37}, {"judge_share": 0.34}]
)
def test_at_its_limits_it_is_kept(settings, tmp_path):
    run, _ = by_hand(tmp_path, **settings)
    assert run.summary(0)["judge_pairs"] == 1


def test_a_pair_with_equal_scores_is_dropped_where_that_is_asked_for(tmp_path):
    texts = BY_HAND | numbered("0/0/1", ["bad. score: 1", "hm. score: 5", "no. score: 1"] * 2)
    texts |= verdicts_of("0/0/1", WORKED, ["j0", "j1", "j2"])
    run, _ = by_hand(tmp_path / "kept", texts)
    (judge,) = [p for p in run.pairs(0) if p.id.endswith("/judge")]
    assert (judge.chosen, judge.rejected) == ("bad. score: 1", "no. score: 1")
    run, _ = by_hand(tmp_path / "dropped", texts, drop_equal_scores=True)
    assert run.summary(0)["metrics"]["pairs/judge_dropped_equal_scores"] == 1


def test_ties_and_verdicts_that_cannot_be_read_give_no_pair(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "self_rewarding_lm")
    texts = BY_HAND | {key: "better: same" for key in BY_HAND if "/vs/" in key}
    run, _ = by_hand(tmp_path, texts | {"0/0/1/j0/vs/j1": "dunno"})
    metrics = run.summary(0)["metrics"]
    assert metrics["meta/parse_rate"] == 5 / 6 and metrics["meta/tie_rate"] == 1.0
    assert "meta/position_bias" not in metrics and metrics["pairs/judge_dropped_tie"] == 1
    assert "0 judge pairs; dropped: 1 tie, 1 unvaried" in caplog.text


def test_so_many_judgements_are_compared_as_is_said(tmp_path):
    run, _ = by_hand(tmp_path, max_judgements_compared=2)
    ids = [m.id.split("/", 3)[3] for m in run.meta_judgements(0)]
    assert sorted(ids) == ["1/j0/vs/j1", "1/j1/vs/j0"]


def test_judges_see_what_postprocess_response_leaves_and_so_does_the_pair(tmp_path):
    run, engine = by_hand(tmp_path, postprocess_response=lambda text: text.replace("x", "z"))
    judge = run.pairs(0)[1]
    assert judge.prompt_ids == ids_of("rate <tell 0> and <zy>:")
    assert judge.prompt_ids == engine.asked["meta_reward/0/0/1/j0"].ids
    assert run.pairs(0)[0].rejected == "xy"


def many(verdict):
    """Nine different judgements of one response, so 72 comparisons, by a function of two scores."""
    scores = [0, 1, 2, 3, 4, 5, 0.5, 1.5, 2.5]
    places = permutations(range(9), 2)
    said = {f"0/0/1/j{m}/vs/j{n}": verdict(scores[m], scores[n]) for m, n in places}
    flat = {f"{p}/0/{c}": "abc" if c else "xy" for p in (0, 1) for c in (0, 1)}
    for p in (0, 1):
        for c in (0, 1):
            flat |= numbered(f"{p}/0/{c}", [f"score: {2 + c}"] * 9)
    return flat | numbered("0/0/1", [f"score: {score:g}" for score in scores]) | said


def test_a_meta_judge_that_cannot_be_read_stops_the_stage(tmp_path):
    words = r"0 of 64 comparisons of judgements (.|\n)*'i cannot say'\nChange .* meta_judging"
    with pytest.raises(JudgeError, match=words):
        by_hand(tmp_path, many(lambda a, b: "i cannot say"), num_sampled_reward_responses=9)
    assert len(Run.open(tmp_path).meta_judgements(0)) == 64  # kept


@pytest.mark.parametrize("follows", [True, False])
def test_a_meta_judge_that_follows_the_scores_is_told(follows, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "self_rewarding_lm")
    texts = many(lambda a, b: f"better: {'ab'[(a < b) == follows]}")
    run, _ = by_hand(tmp_path, texts, num_sampled_reward_responses=9)
    metrics = run.summary(0)["metrics"]
    assert metrics["meta/prefers_higher_score"] == float(follows)
    assert metrics["meta/position_bias"] == 0.5
    assert ("(check meta_follows_scores: 1, and at most 0.95" in caplog.text) == follows
    judge = run.pairs(0)[1]
    assert (judge.chosen, judge.rejected) == (("score: 5", "score: 0")[:: 1 if follows else -1])


# Whole runs


class Stops(LocalEngine):
    """Verdicts of comparisons by their names, all else as the model samples it.

    left: comparisons until it breaks. asked: the names of those that it was asked for.
    """

    def __init__(self, left: int = 10**6) -> None:
        super().__init__()
        self.left, self.asked = left, []

    def generate(self, model, requests, decoding):
        if "/vs/" not in requests[0].name:
            yield from super().generate(model, requests, decoding)
            return
        for i, request in enumerate(requests):
            if self.left == 0:
                raise RuntimeError("stopped here")
            self.left -= 1
            self.asked.append(request.name)
            word = ("better: a", "better: b", "dunno")[stable_hash(0, request.name) % 3]
            yield i, Completion(ids_of(word), True)


def outcome(run):
    kinds = ("prompts", "candidates", "judgements", "meta_judgements", "pairs", "reference")
    records = [list(getattr(run, kind)(0)) for kind in kinds]
    return records, run.metrics(0), run.summary(0)


@pytest.mark.parametrize("left", [0, 30])
def test_a_run_that_stops_while_it_compares_goes_on_with_what_is_missing(left, tmp_path):
    """What came before it stopped is stored; what is missing is asked."""
    stage = meta_reward(prompts_per_block=4)
    models, engine = [model64(), model64()], Stops()
    whole = trainer_of(tmp_path / "whole", [stage], models[0], engine=engine)(rehearse=False)
    assert len(engine.asked) > 30 and whole.summary(0)["judge_pairs"] > 0
    with pytest.raises(RuntimeError, match="stopped here"):
        trainer_of(tmp_path / "parts", [stage], model64(), engine=Stops(left))(rehearse=False)
    stored = len(Run.open(tmp_path / "parts").meta_judgements(0))
    assert stored == left
    rest = Stops()
    parts = trainer_of(tmp_path / "parts", [stage], models[1], engine=rest)(rehearse=False)
    assert len(rest.asked) == len(engine.asked) - stored
    assert outcome(parts) == outcome(whole)
    assert same(weights_of(models[0]), weights_of(models[1]))


def test_the_first_pairs_are_those_that_the_parent_makes(tmp_path):
    """The same stage with train_judge=False and its parent, named alike, give the same weights."""
    alike = dict(name="x", train_judge=False)
    models = [model64(), model64(), model64()]
    both = trainer_of(tmp_path / "both", [meta_reward(name="x")], models[0], engine=Stops())()
    actor = trainer_of(tmp_path / "actor", [meta_reward(**alike)], models[1])()
    settings = {
        k: getattr(meta_reward(), k) for k in meta_reward().model_fields_set - {"meta_judging"}
    }
    parent = trainer_of(tmp_path / "self", [SelfRewardDPOConfig(name="x", **settings)], models[2])()
    own = [p for p in both.pairs(0) if not p.id.endswith("/judge")]
    assert own == list(actor.pairs(0)) == list(parent.pairs(0))
    assert 0 < both.summary(0)["judge_pairs"] == len(both.pairs(0)) - len(own)
    assert not actor.meta_judgements(0)
    assert same(weights_of(models[1]), weights_of(models[2]))
    assert not same(weights_of(models[0]), weights_of(models[1]))


def test_two_processes_give_the_comparisons_and_pairs_of_one(tmp_path):
    from tests.support.two_process_meta import main

    main(str(tmp_path / "one"))
    two("-m", "tests.support.two_process_meta", tmp_path / "two")
    alone, together = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for records in ("prompts", "candidates", "judgements", "meta_judgements", "pairs"):
        assert list(getattr(alone, records)(0)) == list(getattr(together, records)(0))
    assert alone.summary(0) == together.summary(0) and alone.summary(0)["judge_pairs"] > 0
    files = ("one/weights.0.pt", "two/weights.0.pt", "two/weights.1.pt")
    weights = [torch.load(tmp_path / file, weights_only=True) for file in files]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], weights[2][name])
        torch.testing.assert_close(weights[1][name], value, rtol=1e-7, atol=1e-9)


# What is refused, and what is seen before the first stage


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"judge": object()}, "judge: train_judge compares what the trained model"),
        ({"rewarding_model": Recurrent()}, "rewarding_model: train_judge"),
        ({"comparison": ComparisonConfig()}, "comparison: train_judge"),
        ({"self_reward_config_keyname": ("a", "b")}, "by one reward prompt"),
        ({"num_sampled_reward_responses": 1}, "num_sampled_reward_responses of 2 or more"),
        ({"judge_share": 1.0}, "judge_share"),
    ],
)
def test_what_gives_no_judgements_of_the_model_s_own_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        meta_reward(**settings)
    if "judge_share" not in settings:
        assert not meta_reward(**settings, train_judge=False).train_judge


@pytest.mark.parametrize(
    "way", [{"score_mode": "expected"}, {"forced_ending": True}, {"forced_ending": "at_once"}]
)
def test_scores_that_are_in_no_text_are_refused(way, tmp_path):
    stage = meta_reward(self_reward_config_keyname="words")
    rewards = {"words": REWARD.model_copy(update=way)}
    with pytest.raises(ConfigError, match=r"whose scores are not .all. in the texts"):
        trainer_of(tmp_path, [stage], self_reward_prompt_config=rewards)
    assert not tmp_path.exists() or not any(tmp_path.iterdir())


def test_a_meta_judge_prompt_needs_its_three_variables(tmp_path):
    how = META.model_copy(update={"prompt_template": "{{ prompt }} {{ judgement_a }}"})
    with pytest.raises(ConfigError, match="judge_prompt"):
        trainer_of(tmp_path, [meta_reward(meta_judging=how)])


def test_the_schedule_of_the_paper_as_the_docs_print_it(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "meta_rewarding.md").read_text()
    names = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    stages = names["meta_rewarding_stages"](PROMPTS[:8], num_prompts=2)
    assert [s.train_judge for s in stages] == [True, True, False, False]
    assert [s.max_judgement_length for s in stages] == [1100, 1000, None, None]
    assert [s.prompt_dataset for s in stages] == [PROMPTS[i : i + 2] for i in (0, 2, 4, 6)]
    (first, *_) = stages
    assert (first.num_candidate_responses, first.num_sampled_reward_responses) == (7, 11)
    assert (first.generation.temperature, first.judging.top_p, first.dpo_beta) == (0.8, 0.95, 0.1)
    assert first.default_learning_rates[0] == 5e-6
