"""Stages that judge in all ways: resume per judgement, several prompts, comparisons, what judges see."""

from collections import Counter
from itertools import count

import pytest
import torch
from torch import nn

from self_rewarding_lm import (
    EnsembleJudge,
    FunctionJudge,
    OptimConfig,
    PairingConfig,
    RewardConfig,
    Run,
    SamplingConfig,
)
from self_rewarding_lm.config import ComparisonConfig
from self_rewarding_lm.errors import ConfigError, NoPairError, RunMismatchError
from self_rewarding_lm.judges.self_judge import PairwiseJudge, SelfJudge, SeveralJudges
from self_rewarding_lm.runs import resume
from self_rewarding_lm.scores import candidate_scores
from tests.support.models import ALPHABET, END
from tests.test_trainer import JUDGE, SHORT, encode, external, model64, self_reward, trainer_of

JUDGING = SamplingConfig(temperature=1.0, max_new_tokens=4)
REWARD = RewardConfig(
    prompt_template="{{ prompt }}>{{ response }}:",
    reward_regex_template="s{{ reward }}",
    score_range=(0, 5),
    forced_ending=True,
)
STRICT = REWARD.model_copy(update={"prompt_template": "strictly {{ prompt }}>{{ response }}:"})
AT_ONCE = REWARD.model_copy(update={"forced_ending": "at_once"})
WIDE = AT_ONCE.model_copy(update={"score_range": (1, 100)})
COMPARISON = ComparisonConfig(
    prompt_template="{{ prompt }}>{{ response_a }}>{{ response_b }}:",
    labels=("1", "2"),
    verdict_prefix="s",
    forced_ending=True,
)


def numerate() -> nn.Module:
    """A model that goes on with digits everywhere, so that there are scores."""
    module = model64()
    with torch.no_grad():
        module.head.bias[[ALPHABET.index(d) for d in "0123456789"]] += 5.0
    return module


JUDGES = {
    "forced": lambda: SelfJudge(REWARD, JUDGING, 2),
    "at once": lambda: SelfJudge(AT_ONCE, JUDGING, 2),
    "at once, 1 to 100": lambda: SelfJudge(WIDE, JUDGING, 2),
    "two prompts": lambda: SeveralJudges(
        [SelfJudge(REWARD, JUDGING, 2), SelfJudge(STRICT, JUDGING, 1, name="self:strict", first=2)]
    ),
    "compared": lambda: PairwiseJudge(COMPARISON, JUDGING),
}
PER_PROMPT = {"forced": 8, "at once": 4, "at once, 1 to 100": 4, "two prompts": 12, "compared": 12}


class StopError(Exception):
    pass


class Stopping:
    """A judge that is killed after some judgements, and notes the prompts that it is asked for."""

    def __init__(self, inner, judgements: int) -> None:
        self.inner, self.left, self.asked = inner, judgements, []
        self.judgement_ids = inner.judgement_ids

    def judge(self, ctx, prompts, candidates_PG):
        self.asked += [prompt.id for prompt in prompts]
        for judgement in self.inner.judge(ctx, prompts, candidates_PG):
            if self.left == 0:
                raise StopError
            self.left -= 1
            yield judgement


def stage(judge, **options):
    return self_reward(
        judge=judge,
        prompts_per_block=20,
        num_generated_preference_pairs=12,
        min_parse_rate=0,
        **options,
    )


def records(run):
    return run.prompts(0), run.candidates(0), run.judgements(0), run.pairs(0)


@pytest.mark.parametrize("kind", JUDGES)
def test_a_judge_that_was_stopped_goes_on_with_its_judgements(tmp_path, kind):
    straight = trainer_of(
        tmp_path / "straight", [stage(Stopping(JUDGES[kind](), -1))], numerate()
    )()
    stops = [stage(Stopping(JUDGES[kind](), 64 + 6))]
    with pytest.raises(StopError):
        trainer_of(tmp_path / "stopped", stops, numerate())()
    kept = Run.open(tmp_path / "stopped").judgements(0)
    assert len(kept) >= 64
    counts = Counter(j.candidate_ids[0].rsplit("/", 1)[0] for j in kept)
    trainer = trainer_of(tmp_path / "stopped", [stage(Stopping(JUDGES[kind](), -1))], numerate())
    resumed = trainer(rehearse=False)
    assert records(resumed) == records(straight)
    prompts = [prompt.id for prompt in straight.prompts(0)]
    missing = {prompt for prompt in prompts if counts[prompt] < PER_PROMPT[kind]}
    assert set(trainer.stages[0].judge.asked) == missing  # those judged in full are not
    assert len(straight.judgements(0)) == PER_PROMPT[kind] * len(prompts)


@pytest.mark.parametrize("kind", JUDGES)
def test_pairs_are_the_best_against_the_worst_of_what_the_judgements_come_to(tmp_path, kind):
    run = trainer_of(tmp_path, [stage(JUDGES[kind]())], numerate())()
    candidates, judgements = run.candidates(0), run.judgements(0)
    scores = candidate_scores(candidates, judgements)
    assert run.pairs(0)
    for pair in run.pairs(0):
        own = [c for c in candidates if c.prompt_id == pair.id and c.finished is not False]
        known = [scores[c.id] for c in own if scores[c.id] is not None]
        assert pair.chosen_score == scores[pair.chosen_id] == max(known)
        assert pair.rejected_score == scores[pair.rejected_id] == min(known)
        wins = (pair.chosen_score, pair.rejected_score) if kind == "compared" else (None, None)
        assert (pair.win_probability, pair.rejected_win_probability) == wins


def compared(**options):
    judge = options.pop("judge", None) or PairwiseJudge(COMPARISON, JUDGING)
    return stage(judge, num_candidate_responses=4, **options)


def test_sppo_learns_how_often_each_side_of_a_pair_wins(tmp_path):
    """At step 1 nothing has moved, so the loss is that of the shares alone."""
    one_batch = OptimConfig(batch_size=64, learning_rate=1e-3)
    run = trainer_of(tmp_path, [compared(loss="sppo", optim=one_batch)], numerate())(rehearse=False)
    shares = [(p.chosen_score - 0.5, p.rejected_score - 0.5) for p in run.pairs(0)]
    assert {abs(one) < 0.5 for two in shares for one in two} == {True, False}
    wanted = sum(won**2 + lost**2 for won, lost in shares) / len(shares) / 2 / 0.001**2
    assert run.metrics(0)[-1]["loss"] == pytest.approx(wanted)


def test_scores_are_shares_of_comparisons_only_if_all_judges_compare(tmp_path, monkeypatch):
    def wins_of(folder, judge):
        run = trainer_of(tmp_path / folder, [compared(judge=judge)], numerate())(rehearse=False)
        return {(p.win_probability, p.rejected_win_probability) for p in run.pairs(0)}

    judges = PairwiseJudge(COMPARISON, JUDGING), FunctionJudge(letters)
    assert (None, None) not in wins_of("both compare", EnsembleJudge([judges[0], judges[0]]))
    assert wins_of("one scores", EnsembleJudge(judges)) == {(None, None)}
    monkeypatch.setattr(resume, "FORMAT", 1)
    assert wins_of("format 1", judges[0]) == {(None, None)}


def test_the_stage_builds_the_judges_that_its_settings_name(tmp_path):
    def run_of(folder, **options):
        prompts = {"default": REWARD, "strict": STRICT}
        stages = [self_reward(judging=JUDGING, min_parse_rate=0, **options)]
        trainer = trainer_of(
            tmp_path / folder, stages, numerate(), self_reward_prompt_config=prompts
        )
        return trainer()

    plain = run_of("plain")
    assert {j.judge for j in plain.judgements(0)} == {"self"}
    strict = run_of("strict", self_reward_config_keyname="strict")
    assert {j.judge for j in strict.judgements(0)} == {"self:strict"}
    both = run_of("both", self_reward_config_keyname=("default", "strict"))
    names = {(j.id.rsplit("/j")[1], j.judge) for j in both.judgements(0)}
    assert names == {
        *((str(k), "self") for k in range(3)),
        *((str(k), "self:strict") for k in range(3, 6)),
    }
    first = {j.id: j for j in plain.judgements(0)}
    assert all(first[j.id] == j for j in both.judgements(0) if j.judge == "self" and j.id in first)
    compared = run_of("compared", comparison=COMPARISON)
    assert {(j.judge, j.source) for j in compared.judgements(0)} == {("self", "compared")}


@pytest.mark.parametrize("names", [(), ("default", "default")], ids=str)
def test_names_of_reward_prompts_are_different_and_at_least_one(names):
    with pytest.raises(ConfigError, match="self_reward_config_keyname"):
        self_reward(self_reward_config_keyname=names)


def test_a_name_that_no_reward_prompt_has_is_refused_before_any_work(tmp_path):
    stages = [self_reward(self_reward_config_keyname=("default", "strict"))]
    with pytest.raises(ConfigError, match="'strict' is not one of the reward prompts"):
        trainer_of(tmp_path, stages)


def test_a_comparison_that_cannot_be_used_is_refused_before_any_work(tmp_path):
    broken = COMPARISON.model_copy(update={"prompt_template": "{{ prompt }}"})
    with pytest.raises(ConfigError, match="response_a"):
        trainer_of(tmp_path, [self_reward(comparison=broken)])


# what judges see


def without_digits(text: str) -> str:
    return "".join(c for c in text if not c.isdigit())


@pytest.mark.parametrize("reward", ["texts", "ids"])
def test_judges_see_postprocessed_responses_and_training_does_not(tmp_path, reward):
    seen: list[str] = []

    def of_texts(prompts, completions):
        seen.extend(completions)
        return [float(sum(map(ord, text))) for text in completions]

    def of_ids(ids):
        seen.extend("".join((ALPHABET + " ")[i] for i in row) for row in ids.tolist())
        return ids.double().sum(dim=-1)

    def run_of(folder, **options):
        model = of_texts if reward == "texts" else of_ids
        stages = [external(reward_model=model, **options)]
        return trainer_of(tmp_path / folder, stages)()

    plain = run_of("plain")
    start = 0 if reward == "texts" else len("tell 0")
    assert any(c.isdigit() for text in seen for c in text[start:])
    seen.clear()
    run = run_of("stripped", postprocess_response=without_digits)
    assert seen and not any(c.isdigit() for text in seen for c in text[start:])
    assert run.candidates(0)[:4] == plain.candidates(0)[:4]
    by_id = {c.id: c for c in run.candidates(0)}
    for pair in run.pairs(0):
        assert pair.chosen_ids == by_id[pair.chosen_id].ids
        assert pair.chosen == by_id[pair.chosen_id].text


def test_end_tokens_of_a_postprocessed_response_stay(tmp_path):
    rows: list[list[int]] = []
    end = ALPHABET.index("7")

    def of_ids(ids):
        rows.extend(ids.tolist())
        return ids.double().sum(dim=-1)

    stages = [
        external(reward_model=of_ids, postprocess_response=lambda text: "x" + text, judge_all=True)
    ]
    run = trainer_of(tmp_path, stages, numerate(), eos_id=end)()
    prompts = {p.id: p for p in run.prompts(0)}
    as_text = [c for c in run.candidates(0) if END not in c.ids]  # which is read as a space
    assert any(c.ids[-1] == end for c in as_text) and any(c.ids[-1] != end for c in as_text)
    for candidate in as_text:
        shown = [*prompts[candidate.prompt_id].ids, *encode("x").tolist(), *candidate.ids]
        assert shown in rows


def test_a_postprocessed_response_that_is_no_text_is_an_error(tmp_path):
    stages = [self_reward(postprocess_response=lambda text: None)]
    with pytest.raises(ConfigError, match=r"postprocess_response must return the text.*NoneType"):
        trainer_of(tmp_path, stages, self_reward_prompt_config=JUDGE)()


def test_postprocess_response_must_be_a_function_and_needs_texts(tmp_path):
    with pytest.raises(ConfigError, match="postprocess_response must be a function"):
        trainer_of(tmp_path, [self_reward(postprocess_response="strip")])
    with pytest.raises(ConfigError, match="postprocess_response reads texts"):
        trainer_of(
            tmp_path,
            [external(prompt_dataset=[[1, 2]], postprocess_response=str.strip, generation=SHORT)],
            tokenizer_encode=None,
            tokenizer_decode=None,
        )


# several pairs of a prompt, and pairs of earlier stages


def letters(prompts, completions):
    return [float(len(set(text))) for text in completions]


def several(**options):
    pairing = PairingConfig(pick="top_bottom", pairs_per_prompt=2)
    defaults = dict(reward_model=letters, pairing=pairing, num_generated_preference_pairs=7)
    return external(**{**defaults, "prompts_per_block": 4, **options})


def test_a_prompt_gives_several_pairs_each_with_its_reference(tmp_path):
    run = trainer_of(tmp_path, [several()])()
    pairs, scores = run.pairs(0), candidate_scores(run.candidates(0), run.judgements(0))
    assert len(pairs) == 7
    by_prompt: dict[str, list] = {}
    for pair in pairs:
        assert (pair.chosen_score, pair.rejected_score) == (
            scores[pair.chosen_id],
            scores[pair.rejected_id],
        )
        by_prompt.setdefault(pair.id.removesuffix("/p1"), []).append(pair)
    assert {len(own) for own in by_prompt.values()} == {1, 2}
    for name, own in by_prompt.items():
        assert [p.id for p in own] == [name, f"{name}/p1"][: len(own)]
        assert {p.chosen_id.rsplit("/", 1)[0] for p in own} == {name}
        assert len({i for p in own for i in (p.chosen_id, p.rejected_id)}) == 2 * len(own)
        known = [scores[c.id] for c in run.candidates(0) if c.prompt_id == name]
        assert own[0].chosen_score == max(known)
    assert {r.id for r in run.reference(0)} == {f"{pair.id}/r0" for pair in pairs}
    last = [line for line in run.metrics(0) if "pairs/kept" in line][-1]
    assert last["pairs/kept"] == 7


def test_a_random_loser_is_the_same_whatever_the_blocks(tmp_path):
    pairing = PairingConfig(pick="best_random")
    runs = [
        trainer_of(
            tmp_path / str(size), [several(pairing=pairing, prompts_per_block=size)], seed=seed
        )()
        for size, seed in ((1, 0), (8, 0), (9, 1))
    ]
    one, other, another = ([(p.chosen_id, p.rejected_id) for p in run.pairs(0)] for run in runs)
    assert one == other != another


def test_pairs_of_earlier_stages_are_trained_on_too(tmp_path):
    stages = [
        external(reward_model=letters),
        several(mix_pairs=("external_reward",), num_generated_preference_pairs=3),
    ]
    run = trainer_of(tmp_path, stages)()
    assert (len(run.pairs(0)), len(run.pairs(1))) == (4, 3)
    assert run.summary(1)["pairs"] == 7 and run.summary(1)["steps"] == 2  # of 4 each
    asked = {record.id.removesuffix("/r0") for record in run.reference(1)}
    assert asked == {pair.id for stage in (0, 1) for pair in run.pairs(stage)}
    before = {record.id: record for record in run.reference(0)}
    again = [record for record in run.reference(1) if record.id in before]
    assert len(again) == 4 and all(record != before[record.id] for record in again)


@pytest.mark.parametrize("name", ["later", "self_reward", "nobody"])
def test_mixed_pairs_are_of_earlier_stages(tmp_path, name):
    stages = [self_reward(mix_pairs=(name,)), external(name="later")]
    with pytest.raises(ConfigError, match=f"mix_pairs must name earlier stages.*'{name}'"):
        trainer_of(tmp_path, stages)


def test_a_picker_of_ones_own_is_refused_beside_another():
    with pytest.raises(ConfigError, match="pick_paired_rewards_fn picks a pair itself"):
        external(pick_paired_rewards_fn=lambda s: s[:2], pairing=PairingConfig(tie_break="shorter"))
    external(pick_paired_rewards_fn=lambda s: s[:2], pairing=PairingConfig(max_chosen_length=9))


# Blocks, and few prompts


TWELVE = [f"tell {i} {i % 3}" for i in range(12)]


def rising():
    """A reward function that gives each response a higher score than the one before."""
    numbers = count()
    return lambda completions, **_: [float(next(numbers)) for _ in completions]


def rows_asked(run):
    """The row and the pass of each prompt, in the order in which they were asked."""
    places = [tuple(map(int, prompt.id.split("/")[1:])) for prompt in run.prompts(0)]
    return sorted(places, key=lambda place: (place[1], place[0]))


@pytest.mark.parametrize(
    ("wanted", "size", "asked"),
    [
        (4, 32, 4),  # as many as there shall be pairs
        (12, 32, 12),
        (20, 32, 24),  # a pass, and then up to the end of the next
        (7, 5, 10),
        (14, 8, 20),  # 8 and 4 of the first pass, 8 of the second
    ],
)
def test_a_block_ends_with_the_dataset_and_the_first_is_as_large_as_what_is_missing(
    tmp_path, wanted, size, asked
):
    options = dict(num_generated_preference_pairs=wanted, prompts_per_block=size)
    stage = external(reward_model=rising(), prompt_dataset=TWELVE, **options)
    run = trainer_of(tmp_path, [stage])(rehearse=False)
    assert rows_asked(run) == [(place % 12, place // 12) for place in range(asked)]
    assert len(run.pairs(0)) == wanted
    assert Run.open(tmp_path).next_prompt(0, 12, skips=False) == asked


def test_a_run_of_the_first_format_keeps_its_blocks_and_its_number_of_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "FORMAT", 1)
    options = dict(prompt_dataset=TWELVE, num_generated_preference_pairs=30)
    trainer_of(tmp_path, [external(reward_model=StopAt(40), **options)])  # it can be made
    with pytest.raises(StopError):
        trainer_of(tmp_path, [external(reward_model=StopAt(40), **options)])(rehearse=False)
    rule = external(reward_model=StopAt(None), unless_few_prompts=True, **options)
    run = trainer_of(tmp_path, [rule])(rehearse=False)
    assert run.format == 1 and len(run.pairs(0)) == 30 and len(rows_asked(run)) == 32


class StopAt:
    """A reward that rises, of a function that is killed after some responses."""

    __qualname__ = "StopAt"

    def __init__(self, left):
        self.left, self.given = left, rising()

    def __call__(self, completions, **columns):
        if self.left is not None:
            self.left -= len(completions)
            if self.left < 0:
                raise StopError
        return self.given(completions)


def test_a_number_that_gives_way_is_one_pass_where_the_prompts_are_too_few(tmp_path, caplog):
    options = dict(prompt_dataset=TWELVE, num_generated_preference_pairs=13)
    for rule, asked in ((True, 12), (None, 24)):
        stage = external(reward_model=rising(), unless_few_prompts=rule, **options)
        folder = tmp_path / str(rule)
        with caplog.at_level("INFO", logger="self_rewarding_lm"):
            run = trainer_of(folder, [stage], quiet=False)(rehearse=False)
        assert len(rows_asked(run)) == asked
        assert ("12 prompts, each used once" in caplog.text) == bool(rule)
        assert ("24 prompts (12 different)" in caplog.text) == (rule is None)
        caplog.clear()
    enough = external(reward_model=rising(), unless_few_prompts=True, prompt_dataset=TWELVE)
    assert [enough.pairs_wanted(n) for n in (3, 4, 5)] == [None, 4, 4]
    both = PairingConfig(pick="top_bottom", pairs_per_prompt=2)
    two = external(unless_few_prompts=True, pairing=both)
    assert [two.pairs_wanted(n) for n in (1, 2)] == [None, 4]


def test_the_rule_of_few_prompts_is_a_setting_of_a_run_that_begins_now(tmp_path):
    options = dict(prompt_dataset=TWELVE, num_generated_preference_pairs=13)
    trainer_of(tmp_path, [external(**options, unless_few_prompts=True)])(rehearse=False)
    with pytest.raises(RunMismatchError, match="unless_few_prompts"):
        trainer_of(tmp_path, [external(**options)])()


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (dict(num_generated_preference_pairs=25), "num_generated_preference_pairs is 25"),
        (dict(num_generated_preference_pairs=24), None),
        (dict(num_generated_preference_pairs=25, unless_few_prompts=True), None),
        (dict(num_generated_preference_pairs=None, max_prompt_passes=3), "max_prompt_passes is 3"),
        (dict(num_generated_preference_pairs=25, max_prompt_passes=2), None),
        (dict(prompts_per_round=25), None),  # fewer may be enough for the pairs
        (
            dict(num_generated_preference_pairs=None, prompts_per_round=25),
            "prompts_per_round is 25",
        ),
    ],
)
def test_prompts_that_will_be_asked_more_than_twice_are_warned_of(
    tmp_path, caplog, options, setting
):
    stage = external(reward_model=rising(), prompt_dataset=TWELVE, **options)
    trainer_of(tmp_path, [stage])
    warned = [r.getMessage() for r in caplog.records if "repeated_prompts" in r.getMessage()]
    assert len(warned) == (setting is not None)
    assert (
        setting is None
        or f"12 prompts will be asked 3 times each or more, as {setting};" in (warned[0])
    )


def test_a_third_pass_over_the_prompts_is_warned_of_when_it_begins(tmp_path, caplog):
    stage = external(
        reward_model=lambda completions, **_: [1.0 for _ in completions],  # no pair
        prompt_dataset=TWELVE,
        num_generated_preference_pairs=12,
    )
    with pytest.raises(NoPairError, match=r"from 48 prompts \(12 different\)"):
        trainer_of(tmp_path, [stage])(rehearse=False)
    assert "pass 3 over the 12 prompts begins: those before gave 0 pairs" in caplog.text
    assert "pass 4" not in caplog.text
