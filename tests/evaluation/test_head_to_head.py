"""Two models on held-out prompts: outcomes known beforehand, records used again, names of models."""

import json
import re

import pytest
import torch

from self_rewarding_lm import (
    ComparisonConfig,
    EnsembleJudge,
    ImplicitJudge,
    RewardConfig,
    SamplingConfig,
    compare,
    reasoning_task,
)
from self_rewarding_lm.errors import (
    ConfigError,
    DataError,
    JudgeError,
    RunMismatchError,
    StoreError,
)
from self_rewarding_lm.evaluation.tables import comparison_table
from self_rewarding_lm.evaluation.verifying import Verifier
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.records import Judgement
from self_rewarding_lm.runs.run import Run
from tests.judges.test_ensemble import naive
from tests.support.models import CHARACTERS, END, TEXT_VOCAB, Fixed, Recurrent, ids_of, lively
from tests.test_trainer import sft, trainer_of

PROMPTS = ["one", "two", "six", "ten"]
SHORT = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=6)


def model(seed: int = 0) -> torch.nn.Module:
    return lively(Recurrent(TEXT_VOCAB).double(), seed)


def longer(prompts, completions):
    return [float(len(text)) for text in completions]


def various(prompts, completions):
    return [float(sum(map(ord, text))) for text in completions]


def compared(first=None, second=None, prompts=PROMPTS, **options):
    settings = dict(judge=longer, sampling=SHORT, tokenizer=CHARACTERS, eos_id=END, quiet=True)
    if "judge_model" in options or "verifier" in options:
        del settings["judge"]
    return compare(
        first if first is not None else model(),
        second if second is not None else model(1),
        prompts,
        **{**settings, **options},
    )


class Unlikely(Judge):
    """Asked for a label at once, it finds none likely."""

    name = "unlikely"

    def judge(self, ctx, prompts, candidates_PG):
        for candidates in candidates_PG:
            for one in candidates:
                yield Judgement(f"{one.id}/j0", (one.id,), self.name, None, reason="low_mass")


def test_a_model_ties_with_itself_in_everything():
    found = compared(model(), model())
    rates = found.rates
    assert (rates.wins, rates.ties, rates.losses) == (0, 4, 0) and rates.win_rate.value == 0.5
    assert rates.length_controlled.value == pytest.approx(0.5)
    assert [c.ids for c in found.first.candidates] == [c.ids for c in found.second.candidates]
    assert found.first.responses == found.second.responses


def test_outcomes_rewards_and_lengths_are_those_of_the_texts():
    found = compared(num_samples=3, judge=various)
    texts = [[c.text for c in side.candidates] for side in (found.first, found.second)]
    scores = [various([], own) for own in texts]
    signs = [(a > b) - (a < b) for a, b in zip(*scores, strict=True)]
    assert len(signs) == 12 and set(signs) != {0}
    rates = found.rates
    assert (rates.wins, rates.ties, rates.losses) == tuple(map(signs.count, (1, 0, -1)))
    assert rates.prompts == 4 and rates.unknown == 0
    for side, own, points in zip((found.first, found.second), texts, scores, strict=True):
        assert side.reward.value == sum(points) / 12
        assert side.responses.characters == sum(map(len, own)) / 12
        assert side.tokens == sum(len(c.ids) for c in side.candidates) / 12
        assert side.clipped == sum(c.finished is False for c in side.candidates) / 12
    assert found.position is None
    turned = compared(model(1), model(), num_samples=3, judge=various).rates
    assert (turned.wins, turned.losses) == (rates.losses, rates.wins)


def test_the_table_says_why_pairs_have_no_verdict():
    def some(prompts, completions):
        return [None if prompt == "six" else 1.0 for prompt in prompts]

    lines = comparison_table(compared(judge=some), ("m1", "m2")).splitlines()
    assert lines[:3] == [
        "m1 against m2: 3 prompts",
        "1 without a verdict; judgements without a score: 2 no_score",
        "",
    ]
    assert comparison_table(compared(), ("m1", "m2")).splitlines()[:2] == [
        "m1 against m2: 4 prompts",
        "",
    ]


def test_a_judge_for_whom_the_first_place_counts_gives_ties_alone():
    row = [0.0] * TEXT_VOCAB
    row[1] = 9.0  # "b", whatever it reads: always the label of the first response
    asked = ComparisonConfig(
        prompt_template="{{ prompt }}:{{ response_a }}:{{ response_b }}",
        labels=("b", "c"),
        verdict_prefix="x: ",
        forced_ending="at_once",
    )
    found = compared(judge=asked, judge_model=Fixed(row).double())
    assert (found.rates.wins, found.rates.ties, found.rates.losses) == (0, 4, 0)
    assert found.position.first_share == 1.0 and found.position.consistency == 0.0
    assert len(found.judgements) == 8 and found.first.reward is None


def test_what_is_on_disk_is_used_again_and_more_samples_are_added(tmp_path):
    calls = []

    def counted(prompts, completions):
        calls.append(len(completions))
        return longer(prompts, completions)

    whole = compared(num_samples=2, judge=counted)
    one = compared(judge=counted, out=tmp_path)
    assert compared(judge=counted, out=tmp_path) == one  # and nothing is judged
    two = compared(num_samples=2, judge=counted, out=tmp_path)
    assert two == whole
    assert calls == [16, 8, 8]
    lines = (tmp_path / "first" / "candidates.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines[:2]] == ["compare/0/0/0", "compare/0/0/1"]


def test_a_comparison_that_was_stopped_goes_on_where_it_was(tmp_path):
    whole = compared()

    def stopping(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(judge=stopping, out=tmp_path)
    for name in ("first", "second"):
        path = tmp_path / name / "candidates.jsonl"
        path.rename(path.with_name("candidates.0.jsonl"))
        lines = path.with_name("candidates.0.jsonl").read_text().splitlines(keepends=True)
        path.with_name("candidates.0.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
        (tmp_path / name / "files.json").unlink()
    (tmp_path / "judged" / "config.json").unlink()
    assert compared(out=tmp_path) == whole


def test_a_folder_of_other_settings_is_refused(tmp_path):
    compared(out=tmp_path)
    for changes, words in (
        (dict(first=model(2)), r"weights"),
        (dict(prompts=[*PROMPTS, "more"]), r"prompts"),
        (dict(seed=1), r"seed"),
        (dict(sampling=SamplingConfig(max_new_tokens=5)), r"sampling"),
        (dict(judge=lambda prompts, completions: [1.0] * len(prompts)), r"judge"),
    ):
        with pytest.raises(RunMismatchError, match=rf"made with other settings.*\({words}\)"):
            compared(**changes, out=tmp_path)


def test_a_verifier_decides_and_counts():
    def has_a(prompts, completions, wanted):
        return [float(letter in text) for text, letter in zip(completions, wanted, strict=True)]

    rows = [{"prompt": text, "wanted": "a"} for text in PROMPTS]
    found = compared(prompts=rows, verifier=has_a, num_samples=4)
    for side in (found.first, found.second):
        right = [["a" in c.text for c in side.candidates[4 * i : 4 * i + 4]] for i in range(4)]
        assert side.accuracy.value == side.pass_at[1] == sum(map(sum, right)) / 16
        assert side.pass_at[4] == sum(map(any, right)) / 4
    assert found.rates.ties > 0
    with pytest.raises(ConfigError, match="a verifier is a text function"):
        Verifier("has_a")


def test_stages_of_a_run_are_named_by_name_or_number_and_the_module_is_as_before(tmp_path):
    run = trainer_of(tmp_path / "run", [sft(), sft(name="more")], model())()
    assert run.stages == ["sft", "more"]
    module = model(5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    by_name = compared(f"{tmp_path}/run:sft", f"{tmp_path}/run:more", module=module)
    assert compared(f"{tmp_path}/run:1", f"{tmp_path}/run:2", module=module) == by_name
    trained = [model(), model()]
    for place, one in enumerate(trained):
        Run.open(tmp_path / "run").load_weights(one, place)
    assert compared(*trained) == by_name
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(StoreError, match="no stage 'dpo'; it has: sft, more"):
        compared(f"{tmp_path}/run:dpo", module, module=module)
    with pytest.raises(StoreError, match="names no weights"):
        compared(tmp_path / "nothing", module, module=module)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (dict(judge=None), ConfigError, "who judges?"),
        (dict(judge=ComparisonConfig()), ConfigError, "Give judge_model"),
        (
            dict(judge=longer, judge_model=Recurrent(TEXT_VOCAB)),
            ConfigError,
            "Leave one of them out",
        ),
        (dict(judge="length"), ConfigError, "a judge is a RewardConfig"),
        (dict(judge=longer, num_judgements=2), ConfigError, "num_judgements is for a reward"),
        (dict(prompts=[]), DataError, "prompts is empty"),
        (dict(num_samples=0), ConfigError, "num_samples must be 1 or more"),
        (dict(tokenizer=None, prompts=[torch.tensor([1, 2])]), ConfigError, "a tokenizer is need"),
        (dict(judge=lambda prompts, completions: [None] * 8), JudgeError, "no verdict on any of 4"),
        (
            dict(judge=Unlikely()),
            JudgeError,
            "let it write before (without forced_ending='at_once')",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(wrong, error, words):
    with pytest.raises(error, match=re.escape(words)):
        compared(**wrong)


def test_a_reward_prompt_asks_the_judging_model():
    reward = RewardConfig(
        prompt_template="{{ prompt }}:{{ response }}", parse_reward=lambda text: float(len(text))
    )
    judging = SamplingConfig(temperature=1.0, max_new_tokens=16)
    found = compared(judge=reward, judge_model=model(3), num_judgements=2, judging=judging)
    assert len(found.judgements) == 16 and all(j.text is not None for j in found.judgements)
    assert found.first.reward.value is not None


def test_a_judge_of_log_probs_asks_the_second_model():
    second = model(1)
    found = compared(second=second, judge=ImplicitJudge(reference=None))
    scores = {j.id: j.score for j in found.judgements}
    for row, text in enumerate(PROMPTS):
        for place, side in enumerate((found.first, found.second)):
            ids = side.candidates[row].ids
            mean = naive(second, ids_of(text), ids) / len(ids)
            assert scores[f"compare/{row}/0/{place}/j0"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("judge", [ImplicitJudge(), EnsembleJudge([longer, ImplicitJudge()])])
def test_a_judge_cannot_ask_for_the_weights_of_a_run(judge):
    with pytest.raises(ConfigError, match=r"asks for the weights initial.*reference=None"):
        compared(judge=judge)


def test_a_task_of_reasoning_gym_brings_its_verifier():
    pytest.importorskip("reasoning_gym", exc_type=ImportError)
    rows, verify = reasoning_task("chain_sum", size=3, seed=1)
    assert [row["entry"] for row in rows] == [0, 1, 2]
    sums = [str(eval(re.search(r"[-+\d ]+\d", row["prompt"])[0])) for row in rows]
    entries = [row["entry"] for row in rows]
    assert verify(prompts=[""] * 3, completions=sums, entry=entries) == [1.0] * 3
    marked = [f"it is <answer> {number} </answer>" for number in sums]
    assert verify(prompts=[""] * 3, completions=marked, entry=entries) == [1.0] * 3
    assert max(verify(prompts=[""] * 3, completions=["no"] * 3, entry=entries)) < 1
    with pytest.raises(ConfigError, match="no task 'chain_sums'"):
        reasoning_task("chain_sums")


def against_various(prompts, completions):
    return [-2.0 * score for score in various(prompts, completions)]


def test_the_weights_of_an_ensemble_count():
    """(3 x - 2 x) / 4 prefers what x prefers; the plain mean of both, (x - 2 x) / 2, the other."""
    alone = compared(judge=various).rates
    together = compared(judge=EnsembleJudge([(various, 3.0), (against_various, 1.0)])).rates
    assert alone.wins != alone.losses
    assert together == alone
