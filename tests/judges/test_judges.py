"""Judges: what they are shown, what is read of their words, and what reward functions may return."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from self_rewarding_lm.config import RewardConfig, SamplingConfig
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, JudgeError
from self_rewarding_lm.generation.engine import Completion, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.judges.asking import FIRST_LOOK, MIN_ANSWER_TOKENS
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.ensemble import EnsembleJudge
from self_rewarding_lm.judges.functions import FunctionJudge, ModuleJudge, reward_scores
from self_rewarding_lm.judges.implicit import ImplicitJudge
from self_rewarding_lm.judges.kinds import JUDGES
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.judges.self_judge import (
    PairwiseJudge,
    SelfJudge,
    SeveralJudges,
    check_judge_prompt,
)
from self_rewarding_lm.judges.tally import judge_metrics
from self_rewarding_lm.judges.votes import VoteJudge
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.records import Candidate, Judgement, Prompt, stable_hash
from self_rewarding_lm.scores import candidate_scores
from tests.support.models import (
    ALPHABET,
    CHARACTERS,
    END,
    TEXT_VOCAB,
    Fixed,
    Recurrent,
    Successor,
    context,
    decode,
    ids_of,
    last_logits,
    lively,
    run_of_format_1,
    text_tokens,
)

TEMPLATE = "rate <{{ prompt }}> and <{{ response }}>\nreview:"
REWARD = RewardConfig(
    prompt_template=TEMPLATE, reward_regex_template="score: {{ reward }}", score_range=(0, 5)
)
JUDGING = SamplingConfig(max_new_tokens=40)


class Scripted(LocalEngine):
    """An engine that answers with a function's text of the judge prompt and notes the requests."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer
        self.calls: list[list[Request]] = []

    def generate(self, model, requests, decoding):
        self.calls.append(list(requests))
        for i in reversed(range(len(requests))):  # results may come in any order
            text = self.answer(decode(torch.tensor(requests[i].ids)))
            yield i, Completion(ids_of(text), True)

    @property
    def requests(self) -> list[Request]:
        return [request for call in self.calls for request in call]

    @property
    def prompts(self) -> list[str]:
        return [decode(torch.tensor(request.ids)) for request in self.requests]


def asked(*pairs: tuple[str, list[str]]) -> tuple[list[Prompt], list[list[Candidate]]]:
    """Prompts and their candidates from texts."""
    prompts, candidates_PG = [], []
    for row, (prompt, responses) in enumerate(pairs):
        prompts.append(Prompt(f"s/{row}/0", row, ids_of(prompt), prompt))
        candidates_PG.append(
            [
                Candidate(f"s/{row}/0/{i}", f"s/{row}/0", ids_of(text), text, True, 9)
                for i, text in enumerate(responses)
            ]
        )
    return prompts, candidates_PG


def judging_context(engine=None, module=None, seed: int = 0):
    fields = {} if engine is None else {"engine": engine}
    return context(module or Successor(TEXT_VOCAB), seed=seed, tokens=text_tokens(), **fields)


def scores_of(judge, ctx, prompts, candidates_PG) -> dict[str, float | None]:
    return {j.id: j.score for j in judge.judge(ctx, prompts, candidates_PG)}


def test_the_judge_is_shown_prompt_and_response_in_the_template():
    engine = Scripted(lambda prompt: "good. score: 4")
    judge = SelfJudge(REWARD, JUDGING, 1)
    scores = scores_of(judge, judging_context(engine), *asked(("what is 2", ["two", "2 is 2"])))
    assert engine.prompts == [
        "rate <what is 2> and <two>\nreview:",
        "rate <what is 2> and <2 is 2>\nreview:",
    ]
    assert scores == {"s/0/0/0/j0": 4.0, "s/0/0/1/j0": 4.0}


class Cut(Scripted):
    """An engine of which answers that end in `?` were cut off."""

    def generate(self, model, requests, decoding):
        for i, answer in super().generate(model, requests, decoding):
            text = decode(torch.tensor(answer.ids))
            yield i, Completion(ids_of(text.removesuffix("?")), not text.endswith("?"))


def test_a_judgement_that_was_cut_off_states_no_half_number_and_is_counted():
    says = {
        "a": "score: 1?",
        "b": "score: 4 as it?",
        "c": "score: 2",
        "d": "<think>score: 2 or?",
        "e": "good?",
    }
    engine = Cut(lambda prompt: says[prompt.split("<")[2][0]])
    asked_for = asked(("what", list(says)))
    judgements = list(SelfJudge(REWARD, JUDGING, 1).judge(judging_context(engine), *asked_for))
    found = {j.candidate_ids[0][-1]: (j.score, j.reason, j.finished) for j in judgements}
    assert found == {
        "0": (None, "unfinished", False),
        "1": (4.0, None, False),
        "2": (2.0, None, True),
        "3": (None, "unfinished", False),
        "4": (None, "no_score", False),
    }
    metrics = judge_metrics(asked_for[1][0], judgements)
    assert metrics["judge/cut"] == 4 / 5 and metrics["judge/parse_rate"] == 2 / 5
    whole = [j for j in judgements if j.finished]
    assert "judge/cut" not in judge_metrics(asked_for[1][0], whole)
    assert "judge/too_long" not in metrics
    long = [replace(j, score=None, reason="too_long") for j in judgements[:2]]
    assert judge_metrics(asked_for[1][0], [*long, *judgements[2:]])["judge/too_long"] == 2 / 5


def test_a_run_of_0_1_0_scores_what_was_cut_off_as_it_did():
    engine = Cut(lambda prompt: "score: 1?")
    ctx = judging_context(engine)
    ctx = replace(ctx, run=run_of_format_1())
    (found,) = SelfJudge(REWARD, JUDGING, 1).judge(ctx, *asked(("what", ["a"])))
    assert (found.score, found.reason, found.finished) == (1.0, None, None)


def test_an_expected_score_does_not_need_the_end_of_the_number():
    engine = Cut(lambda prompt: "score: 1?")
    reward = REWARD.model_copy(update={"score_mode": "expected"})
    (found,) = SelfJudge(reward, JUDGING, 1).judge(judging_context(engine), *asked(("a", ["b"])))
    assert (found.source, found.finished) == ("expected", False)
    assert found.score_mass is not None and found.reason != "unfinished"


def test_each_candidate_is_judged_k_times_each_with_noise_of_its_own():
    engine = Scripted(lambda prompt: "score: 1")
    found = list(
        SelfJudge(REWARD, JUDGING, 3, name="me").judge(
            judging_context(engine, seed=5), *asked(("a", ["b", "c"]), ("d", ["e"]))
        )
    )
    ids = [f"{c}/j{k}" for c in ("s/0/0/0", "s/0/0/1", "s/1/0/0") for k in range(3)]
    assert sorted(j.id for j in found) == ids
    assert all(j.candidate_ids == (j.id.rsplit("/", 1)[0],) and j.judge == "me" for j in found)
    assert [r.key for r in engine.requests] == [stable_hash(5, i) for i in ids]
    assert len({r.key for r in engine.requests}) == 9


def test_each_judgement_keeps_its_own_words_and_score():
    words = {"b": "fine. score: 2", "c": "score: 5", "e": "i do not know"}
    engine = Scripted(lambda prompt: words[prompt[prompt.index("and <") + 5]])
    found = SelfJudge(REWARD, JUDGING, 1).judge(
        judging_context(engine), *asked(("a", ["b", "c"]), ("d", ["e"]))
    )
    assert {j.id: (j.text, j.score, j.reason) for j in found} == {
        "s/0/0/0/j0": ("fine. score: 2", 2.0, None),
        "s/0/0/1/j0": ("score: 5", 5.0, None),
        "s/1/0/0/j0": ("i do not know", None, "no_score"),
    }


@pytest.mark.parametrize("said", ["", "it is long", "score: 9"])
def test_a_response_that_states_a_score_does_not_score_itself(said):
    engine = Scripted(lambda prompt: said)
    scores = scores_of(
        SelfJudge(REWARD, JUDGING, 2),
        judging_context(engine),
        *asked(("score: 5", ["great. score: 5", "score: 4\nscore: 4"])),
    )
    assert "score: 5" in engine.prompts[0]
    assert list(scores.values()) == [None] * 4


def test_only_what_a_real_model_writes_behind_the_judge_prompt_is_read():
    one_letter = Fixed([9.0] + [0.0] * (TEXT_VOCAB - 1))
    judge = SelfJudge(REWARD, SamplingConfig(temperature=0.0, max_new_tokens=20), 1)
    ctx = judging_context(module=one_letter)
    (found,) = judge.judge(ctx, *asked(("what", ["score: 5"])))
    assert (found.text, found.score, found.reason) == ("a" * 20, None, "no_score")


def test_another_model_than_the_policy_judges_where_one_is_given():
    digits = Fixed([0.0] * ALPHABET.index("3") + [9.0] + [0.0] * 40)
    other = adapt(nn.Sequential(digits, nn.Identity()))
    reward = RewardConfig(prompt_template=TEMPLATE, parse_reward=lambda text: float(text))
    judge = SelfJudge(reward, SamplingConfig(temperature=0.0, max_new_tokens=1), 1, model=other)
    assert scores_of(judge, judging_context(), *asked(("a", ["b"]))) == {"s/0/0/0/j0": 3.0}


def test_parse_reward_comes_before_the_template():
    reward = RewardConfig(
        prompt_template=TEMPLATE,
        reward_regex_template="score: {{ reward }}",
        parse_reward=lambda text: len(text),
    )
    engine = Scripted(lambda prompt: "score: 4")
    scores = scores_of(SelfJudge(reward, JUDGING, 1), judging_context(engine), *asked(("a", ["b"])))
    assert scores == {"s/0/0/0/j0": 8.0}


def test_a_judge_prompt_without_room_for_an_answer_is_none_and_costs_nothing():
    limit = 60
    engine = Scripted(lambda prompt: "score: 3")
    ctx = judging_context(engine, Successor(TEXT_VOCAB, max_seq_len=limit))
    template = len("rate <> and <>\nreview:")
    fits = "x" * (limit - template - 1 - MIN_ANSWER_TOKENS)
    found = SelfJudge(REWARD, JUDGING, 2).judge(ctx, *asked(("a", [fits, fits + "x"])))
    assert {j.id: (j.score, j.reason, j.text) for j in found} == {
        "s/0/0/0/j0": (3.0, None, "score: 3"),
        "s/0/0/0/j1": (3.0, None, "score: 3"),
        "s/0/0/1/j0": (None, "too_long", None),
        "s/0/0/1/j1": (None, "too_long", None),
    }
    assert [r.max_new_tokens for r in engine.requests] == [MIN_ANSWER_TOKENS] * 2


def test_a_judge_with_a_short_answer_needs_only_the_room_for_it():
    prompt_length = len("rate <a> and <b>\nreview:")
    engine = Scripted(lambda prompt: "score: 3")
    ctx = judging_context(engine, Successor(TEXT_VOCAB, max_seq_len=prompt_length + 8))
    short = SelfJudge(REWARD, SamplingConfig(max_new_tokens=8), 1)
    assert scores_of(short, ctx, *asked(("a", ["b"]))) == {"s/0/0/0/j0": 3.0}


def test_a_long_judge_prompt_leaves_the_judge_all_its_new_tokens():
    engine = Scripted(lambda prompt: "score: 3")
    ctx = judging_context(engine, Successor(TEXT_VOCAB, max_seq_len=500))
    list(SelfJudge(REWARD, JUDGING, 1).judge(ctx, *asked(("a" * 300, ["b"]))))
    assert [r.max_new_tokens for r in engine.requests] == [40]


def test_the_first_look_is_64_judgements_once_a_judge():
    engine = Scripted(lambda prompt: "score: 3")
    ctx, judge = judging_context(engine), SelfJudge(REWARD, JUDGING, 3)
    first = judge.judge(ctx, *asked(("a", ["b"] * 30)))
    for _ in range(FIRST_LOOK):
        next(first)
    assert [len(call) for call in engine.calls] == [64]  # a consumer may stop here
    assert len(list(first)) == 90 - 64
    list(judge.judge(ctx, *asked(("c", ["d"] * 30))))
    assert [len(call) for call in engine.calls if call] == [64, 26, 90]


def test_a_judge_says_the_same_whatever_it_judged_before():
    def answer(prompt):
        return f"score: {len(prompt) % 6}"

    batch, other = asked(("a", ["b", "cc"])), asked(("score: 5 x", ["long " * 9, "z"]))
    engine, fresh = Scripted(answer), Scripted(answer)
    used = SelfJudge(REWARD, JUDGING, 2)
    list(used.judge(judging_context(engine), *other))
    engine.calls.clear()
    again = scores_of(used, judging_context(engine), *batch)
    assert again == scores_of(SelfJudge(REWARD, JUDGING, 2), judging_context(fresh), *batch)
    assert engine.requests == fresh.requests


def test_two_judges_keep_their_templates_apart():
    engine = Scripted(lambda prompt: "score: 1")
    one = SelfJudge(REWARD, JUDGING, 1)
    other = SelfJudge(
        RewardConfig(
            prompt_template="{{ response }} for {{ prompt }}",
            reward_regex_template="x {{ reward }}",
        ),
        JUDGING,
        1,
    )
    for judge in (one, other, one):
        list(judge.judge(judging_context(engine), *asked(("a", ["b"]))))
    rated = "rate <a> and <b>\nreview:"
    assert engine.prompts == [rated, "b for a", rated]


def test_a_template_that_fills_the_judge_is_refused_before_any_work():
    tokens = text_tokens()
    empty = len("rate <> and <>\nreview:")
    check_judge_prompt(REWARD, tokens, empty + MIN_ANSWER_TOKENS + 1)
    check_judge_prompt(REWARD, tokens, None)
    with pytest.raises(JudgeError, match=f"has {empty} tokens"):
        check_judge_prompt(REWARD, tokens, empty + MIN_ANSWER_TOKENS)


def test_a_text_function_is_given_prompts_and_completions_side_by_side():
    seen = {}

    def lengths(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [float(len(c)) for c in completions]

    scores = scores_of(
        FunctionJudge(lengths), judging_context(), *asked(("a", ["b", "cc"]), ("d", ["eee"]))
    )
    assert seen == {"prompts": ["a", "a", "d"], "completions": ["b", "cc", "eee"]}
    assert scores == {"s/0/0/0/j0": 1.0, "s/0/0/1/j0": 2.0, "s/1/0/0/j0": 3.0}


def with_columns() -> tuple[list[Prompt], list[list[Candidate]]]:
    prompts, candidates_PG = asked(("a", ["b", "cc"]), ("d", ["eee"]))
    columns = ({"answer": "4", "level": 1}, {"answer": "5"})
    prompts = [Prompt(p.id, p.row, p.ids, p.text, c) for p, c in zip(prompts, columns, strict=True)]
    return prompts, candidates_PG


def test_columns_are_given_to_a_function_that_names_them():
    def right(prompts, completions, answer):
        assert answer == ["4", "4", "5"]
        return [1.0] * 3

    list(FunctionJudge(right).judge(judging_context(), *with_columns()))


def test_all_columns_are_given_to_a_function_that_takes_any():
    def right(prompts, completions, **columns):
        assert columns == {"answer": ["4", "4", "5"], "level": [1, 1, None]}
        return [1.0] * 3

    list(FunctionJudge(right).judge(judging_context(), *with_columns()))


def test_no_columns_are_given_to_a_function_that_takes_none():
    def right(prompts, completions):
        return [1.0] * 3

    assert len(list(FunctionJudge(right).judge(judging_context(), *with_columns()))) == 3


def test_a_function_that_takes_no_completions_by_that_name_is_refused():
    others = (lambda prompts, texts: [1.0], lambda p, c: [1.0], lambda completions: [1.0], len, max)
    for function in others:
        with pytest.raises(JudgeError, match="have arguments named prompts and completions"):
            FunctionJudge(function)


def test_a_function_that_takes_what_no_row_has_is_refused_with_the_columns():
    def right(prompts, completions, solution, level):
        raise AssertionError("called without what it needs")

    with pytest.raises(JudgeError, match=r"takes solution, and no row.*columns: answer, level"):
        FunctionJudge(right).judge(judging_context(), *with_columns())


@pytest.mark.parametrize(
    ("returned", "read"),
    [
        ([1, None, 0.5], [1.0, None, 0.5]),
        ([1.0, math.nan, -math.inf], [1.0, None, None]),
        ([True, "4", 2.0], [None, None, 2.0]),
        (torch.tensor([1.0, math.nan, 3.0]), [1.0, None, 3.0]),
        ([torch.tensor(1.5), torch.tensor(2), None], [1.5, 2.0, None]),
    ],
    ids=["None", "not finite", "no numbers", "tensor", "scalar tensors"],
)
def test_what_is_no_number_is_none_with_a_reason(returned, read):
    def function(prompts, completions):
        return returned

    found = FunctionJudge(function).judge(judging_context(), *asked(("a", ["b", "c", "d"])))
    assert [j.score for j in found] == read
    assert all((j.score is None) == (j.reason is not None) for j in found)


@pytest.mark.parametrize("returned", [[1.0], [1.0] * 3, torch.ones(3)], ids=str)
def test_a_function_that_returns_another_number_of_scores_is_refused(returned):
    def reward(prompts, completions):
        return returned

    with pytest.raises(JudgeError, match=f"reward must return.*2 completions; got {len(returned)}"):
        FunctionJudge(reward).judge(judging_context(), *asked(("a", ["b", "c"])))


@pytest.mark.parametrize("returned", [None, 1.0], ids=["nothing", "one number"])
def test_a_function_that_returns_no_list_is_refused(returned):
    def reward(prompts, completions):
        return returned

    with pytest.raises(JudgeError, match="reward must return"):
        FunctionJudge(reward).judge(judging_context(), *asked(("a", ["b", "c"])))


class Reward(nn.Module):
    """Scores of the sum of each row's ids, in the form that is asked for; notes the shapes."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.dropout = nn.Dropout(0.9)
        self.weight = nn.Parameter(torch.ones(()))
        self.shapes: list[tuple[int, int]] = []

    def forward(self, ids):
        self.shapes.append(tuple(ids.shape))
        assert not self.dropout.training and not torch.is_grad_enabled()
        sums = self.dropout(ids.double().sum(dim=-1) * self.weight)
        if self.form == "classes":
            return torch.stack([0 * sums, sums.log(), (2 * sums).log()], dim=-1)
        return sums if self.form == "flat" else sums[:, None]


def expected(form: str, prompt: str, response: str) -> float:
    total = sum(ids_of(prompt) + ids_of(response))
    if form != "classes":
        return total
    return (total + 2 * 2 * total) / (1 + total + 2 * total)  # softmax weights 1, s and 2 s


@pytest.mark.parametrize("form", ["flat", "column", "classes"])
def test_a_reward_module_scores_prompt_and_response(form):
    reward = Reward(form)
    prompts, candidates_PG = asked(("ab", ["cde", "b", "xyz"]), ("abcd", ["e", "f4"]))
    scores = scores_of(ModuleJudge(reward), judging_context(), prompts, candidates_PG)
    assert scores == pytest.approx(
        {
            f"{c.id}/j0": expected(form, p.text, c.text)
            for p, group in zip(prompts, candidates_PG, strict=True)
            for c in group
        }
    )


def test_a_reward_module_sees_only_unpadded_rows_of_one_length():
    reward = Reward("flat")
    batch = asked(("ab", ["cde", "b", "xyz"]), ("abcd", ["e", "f4"]))
    scores_of(ModuleJudge(reward), judging_context(), *batch)
    assert sorted(reward.shapes) == [(1, 3), (1, 6), (3, 5)]
    reward.shapes.clear()
    scores_of(ModuleJudge(reward, max_rows=2), judging_context(), *batch)
    assert sorted(reward.shapes) == [(1, 3), (1, 5), (1, 6), (2, 5)]


def test_a_function_of_ids_is_a_reward_like_a_module():
    batch = asked(("ab", ["cde", "b"]), ("abcd", ["e"]))
    function = ModuleJudge(lambda ids: ids.sum(dim=-1).float())
    module = ModuleJudge(Reward("column"))
    assert scores_of(function, judging_context(), *batch) == scores_of(
        module, judging_context(), *batch
    )


def test_a_reward_modules_modes_are_restored():
    reward = Reward("flat").train()
    judge = ModuleJudge(nn.Sequential(reward, nn.Identity().eval()))
    scores_of(judge, judging_context(), *asked(("a", ["b"])))
    assert reward.training and reward.dropout.training and not judge.reward[1].training
    assert reward.weight.requires_grad and reward.weight.grad is None


def test_a_reward_that_is_not_finite_is_none():
    judge = ModuleJudge(lambda ids: torch.tensor([math.nan, 2.0]))
    found = list(judge.judge(judging_context(), *asked(("a", ["b", "c"]))))
    assert [(j.score, j.reason) for j in found] == [(None, "not_finite"), (2.0, None)]


@pytest.mark.parametrize(
    ("output", "came"),
    [
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(()), r"\(\)"),
        (torch.ones(2, 4, 5), r"\(2, 4, 5\)"),
        (torch.ones(1, 2), r"\(1, 2\)"),
        ([1.0, 2.0], "list"),
        (None, "NoneType"),
    ],
    ids=["wrong batch", "scalar", "logits", "transposed", "list", "nothing"],
)
def test_a_reward_of_another_shape_is_refused(output, came):
    judge = ModuleJudge(lambda ids: output)
    with pytest.raises(JudgeError, match=rf"\(2, t\).*got {came}"):
        list(judge.judge(judging_context(), *asked(("a", ["b", "c"]))))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.tensor([True, False]), "real numbers; got torch.bool"),
        (torch.ones(2, 1, dtype=torch.bool), "real numbers; got torch.bool"),
        (torch.ones(2, dtype=torch.complex64), "real numbers; got torch.complex64"),
        (torch.ones(2, 0), r"got \(2, 0\)"),
    ],
    ids=["bool", "bool column", "complex", "no columns"],
)
def test_a_reward_that_is_no_number_is_refused(output, words):
    judge = ModuleJudge(lambda ids: output)
    with pytest.raises(JudgeError, match=words):
        list(judge.judge(judging_context(), *asked(("a", ["b", "c"]))))


@pytest.mark.parametrize("responses", [["b", "c"], ["b", "bcd"], ["", "b"]], ids=str)
def test_a_score_for_each_token_is_not_taken_for_classes(responses):
    judge = ModuleJudge(lambda ids: ids.double())
    with pytest.raises(JudgeError, match=r"one for each token. Return the one at"):
        list(judge.judge(judging_context(), *asked(("a", responses))))


def test_as_many_classes_as_tokens_are_classes():
    lengths = []

    def classes(ids):
        lengths.append(ids.shape[1])
        return torch.zeros(len(ids), 3)

    judge = ModuleJudge(classes, max_rows=1)
    found = list(judge.judge(judging_context(), *asked(("ab", ["c", "d", "cd"]), ("a", ["bc"]))))
    assert [j.score for j in found] == [1.0] * 4
    assert lengths == [3, 2, 3, 3, 4]  # one more look, and no further one


def test_the_expected_class_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert reward_scores(logits, 2) == pytest.approx([0.75, 0.5])


def test_the_judge_of_a_reward_model_is_chosen_by_what_it_takes():
    def of_texts(prompts, completions, **columns):
        return []

    def of_ids(ids):
        return ids

    class TextObject:
        def __call__(self, prompts, completions):
            return []

    own = SelfJudge(REWARD, JUDGING, 1)
    assert make_judge(own) is own
    assert isinstance(make_judge(of_texts), FunctionJudge)
    assert isinstance(make_judge(TextObject()), FunctionJudge)
    assert isinstance(make_judge(of_ids), ModuleJudge)
    assert isinstance(make_judge(Reward("flat")), ModuleJudge)


# expected scores and forced endings

EXPECTED = REWARD.model_copy(update={"score_mode": "expected"})
FORCED = REWARD.model_copy(update={"forced_ending": True})
AT_ONCE = REWARD.model_copy(update={"forced_ending": "at_once"})
BOTH = REWARD.model_copy(update={"score_mode": "expected", "forced_ending": True})
WORDS = "score: "


def model64():
    return lively(Recurrent(TEXT_VOCAB).double())


def expectation(module, text: str, numbers=range(6)) -> tuple[float, float]:
    """The oracle: the expected score after a text and the mass, of one forward of the bare model;
    each number is one token."""
    chances = last_logits(module, list(ids_of(text))).softmax(dim=-1).tolist()
    of = {n: chances[ALPHABET.index(str(n))] for n in numbers}
    return sum(n * p for n, p in of.items()) / sum(of.values()), sum(of.values())


def single(judge, engine=None, module=None, response: str = "b"):
    ctx = judging_context(engine, module or model64())
    return list(judge.judge(ctx, *asked(("a", [response]))))


def test_an_expected_score_is_taken_where_the_judge_states_one():
    module = favouring_digits(model64())
    said = "quite good\nscore: 4 score: 1. bye"
    (found,) = single(SelfJudge(EXPECTED, JUDGING, 1), Scripted(lambda p: said), module)
    score, mass = expectation(module, "rate <a> and <b>\nreview:quite good\nscore: 4 score: ")
    assert (found.source, found.text, found.reason) == ("expected", said, None)
    assert (found.score, found.score_mass) == pytest.approx((score, mass), abs=1e-8)
    assert found.score not in (1.0, 4.0)


def favouring_digits(module):
    """Numbers have mass."""
    with torch.no_grad():
        module.head.bias[[ALPHABET.index(d) for d in "0123456789"]] += 6.0
    return module


def test_a_forced_ending_closes_the_text_of_a_judge_that_states_no_score():
    module = favouring_digits(model64())
    engine = Scripted(lambda p: "it goes on and")
    for reward in (FORCED, BOTH):
        (found,) = single(SelfJudge(reward, JUDGING, 1), engine, module)
        score, mass = expectation(module, "rate <a> and <b>\nreview:it goes on and\nscore: ")
        assert (found.source, found.text, found.reason) == ("forced", "it goes on and", None)
        assert (found.score, found.score_mass) == pytest.approx((score, mass), abs=1e-8)


def test_a_score_that_is_stated_is_kept_beside_forced_endings():
    (found,) = single(SelfJudge(FORCED, JUDGING, 1), Scripted(lambda p: "score: 3"))
    assert (found.score, found.source, found.score_mass) == (3.0, "sampled", None)


@pytest.mark.parametrize("said", ["score: 8 out of 10", "score: 9", ""])
def test_a_score_that_does_not_count_is_replaced_by_a_forced_one(said):
    module = favouring_digits(model64())
    (found,) = single(SelfJudge(FORCED, JUDGING, 1), Scripted(lambda p: said), module)
    closed = f"rate <a> and <b>\nreview:{said}\nscore: "
    assert found.source == "forced"
    assert found.score == pytest.approx(expectation(module, closed)[0], abs=1e-8)


def test_without_a_forced_ending_what_has_no_place_is_none_with_its_reason():
    def reason(said):
        (found,) = single(SelfJudge(EXPECTED, JUDGING, 1), Scripted(lambda p: said))
        assert found.score is None and found.score_mass is None and found.source == "expected"
        return found.reason

    assert reason("i like it") == "no_score"
    assert reason("score: 8 out of 10") == "other_scale"


def test_at_once_no_review_is_sampled_and_one_judgement_is_made():
    module = favouring_digits(model64())
    engine = Scripted(lambda p: pytest.fail("asked"))
    judge = SelfJudge(AT_ONCE, JUDGING, 3)
    assert judge.num_judgements == 1
    ctx = judging_context(engine, module)
    found = list(judge.judge(ctx, *asked(("a", ["b", "cc"]), ("d", ["e"]))))
    assert not engine.calls
    shown = {"s/0/0/0/j0": ("a", "b"), "s/0/0/1/j0": ("a", "cc"), "s/1/0/0/j0": ("d", "e")}
    assert {j.id for j in found} == set(shown)
    for judgement in found:
        prompt, response = shown[judgement.id]
        text = f"rate <{prompt}> and <{response}>\nreview:\nscore: "
        score, mass = expectation(module, text)
        assert (judgement.score, judgement.score_mass) == pytest.approx((score, mass), abs=1e-8)
        assert (judgement.source, judgement.text) == ("forced", None)


def test_a_judge_that_would_say_something_else_gives_no_score_and_its_mass():
    (found,) = single(SelfJudge(AT_ONCE, JUDGING, 1), module=Successor(TEXT_VOCAB))
    assert (found.score, found.reason, found.source) == (None, "low_mass", "forced")
    assert found.score_mass is not None and 0 < found.score_mass < 0.1


@pytest.mark.parametrize("score_range", [(0, 5), (0, 10), (1, 100)], ids=str)
@pytest.mark.parametrize(
    "way", [{}, {"score_mode": "expected"}, {"forced_ending": True}, {"forced_ending": "at_once"}],
    ids=str,
)  # fmt: skip
def test_all_ways_on_scales_with_numbers_of_several_tokens(way, score_range):
    """The model is one that always says the scale's highest number, digit by digit, at once."""
    high = score_range[1]
    top = str(high)
    reward = REWARD.model_copy(update={"score_range": score_range, **way})
    said = f"score: {top}"
    engine = Scripted(lambda p: said if not reward.forced_ending else "no idea")
    (found,) = single(SelfJudge(reward, JUDGING, 1), engine, Saying(f" {top}\n"))
    assert found.score == pytest.approx(high, abs=1e-6)
    forced = bool(reward.forced_ending)
    assert found.source == ("forced" if forced else reward.score_mode)
    if found.source != "sampled":
        assert found.score_mass == pytest.approx(1.0, abs=1e-6)


class Saying(nn.Module):
    """After ":" it says a text, character by character; it looks back at no more than that."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ids_of(text)

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, TEXT_VOCAB)
        colon = ids_of(":")[0]
        for row in range(ids.shape[0]):
            place = len(self.text)
            for column in range(ids.shape[1]):
                place = 0 if ids[row, column] == colon else place + 1
                if place < len(self.text):
                    logits[row, column, self.text[place]] = 50.0
        return logits


def test_expected_judgements_have_the_noise_of_sampled_ones():
    engines = [Scripted(lambda p: "score: 4") for _ in range(2)]
    for reward, engine in zip((REWARD, EXPECTED), engines, strict=True):
        single(SelfJudge(reward, JUDGING, 3), engine)
    assert engines[0].requests == engines[1].requests


@pytest.mark.parametrize(("room", "source"), [(3, "expected"), (30, "forced")])
def test_a_real_judge_is_sampled_and_then_looked_at(room, source):
    """It writes " 4" and a line break after every colon, and anything afterwards."""
    judge = SelfJudge(BOTH, SamplingConfig(temperature=1.0, max_new_tokens=room), 4)
    found = list(judge.judge(judging_context(module=Saying(" 4\n")), *asked(("a", ["b"]))))
    assert {j.id for j in found} == {f"s/0/0/0/j{k}" for k in range(4)}
    for judgement in found:
        assert judgement.text is not None and judgement.text.startswith(" 4\n")
        assert judgement.source == source and len(judgement.text) <= room
        assert judgement.score == pytest.approx(4.0, abs=1e-6)


# room


def test_a_forced_ending_has_its_room_beside_the_answer():
    prompt = "rate <a> and <b>\nreview:"
    limit = len(prompt) + MIN_ANSWER_TOKENS + len("\nscore: ")
    judge = SelfJudge(FORCED, JUDGING, 1)
    engine = Scripted(lambda p: "x" * 16)
    batch = asked(("a", ["b", "bb"]))
    ctx = judging_context(engine, Bounded(limit))
    found = {j.candidate_ids[0]: j for j in judge.judge(ctx, *batch)}
    assert [r.max_new_tokens for r in engine.requests] == [MIN_ANSWER_TOKENS]
    assert found["s/0/0/0"].source == "forced" and found["s/0/0/0"].reason != "too_long"
    assert found["s/0/0/1"].reason == "too_long"


class Bounded(nn.Module):
    """A model that fails on more tokens than it takes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.max_seq_len = limit

    def forward(self, ids):
        assert ids.shape[1] <= self.max_seq_len
        logits = torch.zeros(*ids.shape, TEXT_VOCAB)
        logits[..., [ALPHABET.index(d) for d in "0123456789"]] = 9.0
        return logits


def test_at_once_only_the_words_need_room():
    prompt = "rate <a> and <b>\nreview:"
    limit = len(prompt) + len("\nscore: ")
    ctx = judging_context(module=Bounded(limit))
    found = list(SelfJudge(AT_ONCE, JUDGING, 1).judge(ctx, *asked(("a", ["b", "bb"]))))
    assert {j.id: j.reason for j in found} == {"s/0/0/0/j0": None, "s/0/0/1/j0": "too_long"}
    wide = AT_ONCE.model_copy(update={"score_range": (1, 100)})  # two more tokens are read
    assert single(SelfJudge(wide, JUDGING, 1), module=Bounded(limit + 1))[0].reason == "too_long"
    assert single(SelfJudge(wide, JUDGING, 1), module=Bounded(limit + 2))[0].reason is None


def test_a_number_at_the_very_end_of_the_context_is_not_read_past_it():
    """The judge's last token is the 1 of a scale to 100, and no room is left for what follows."""
    prompt = "rate <a> and <b>\nreview:"
    said = "score: 1"
    wide = EXPECTED.model_copy(update={"score_range": (1, 100)})
    judge = SelfJudge(wide, SamplingConfig(max_new_tokens=len(said)), 1)
    fits = len(prompt) + len(said) + 1  # "score: 10" is read to see whether 0 follows
    (found,) = single(judge, Scripted(lambda p: said), Bounded(fits + 1))
    assert found.reason is None and found.source == "expected"
    (found,) = single(judge, Scripted(lambda p: said + "0"), Bounded(fits - 1))
    assert (found.score, found.reason) == (None, "too_long")


def test_a_template_that_fills_the_judge_with_its_ending_is_refused():
    empty, words = len("rate <> and <>\nreview:"), len("\nscore: ")
    tokens = text_tokens()
    check_judge_prompt(FORCED, tokens, empty + words + MIN_ANSWER_TOKENS + 1)
    check_judge_prompt(AT_ONCE, tokens, empty + words + 1)
    for reward, ending in ((FORCED, words + MIN_ANSWER_TOKENS), (AT_ONCE, words)):
        with pytest.raises(JudgeError, match=f"has {empty} tokens"):
            check_judge_prompt(reward, tokens, empty + ending)


def test_numbers_that_a_tokenizer_does_not_tell_apart_are_refused_before_any_work():
    tokens = Tokens(
        CallableTokenizer(lambda t: torch.zeros(len(t)), lambda ids: "?" * len(ids)),
        eos_id=None,
        vocab=TEXT_VOCAB,
    )
    check_judge_prompt(REWARD, tokens, None)
    for reward in (EXPECTED, FORCED, AT_ONCE):
        with pytest.raises(ConfigError, match="cannot tell the scores apart"):
            check_judge_prompt(reward, tokens, None)


# chat templates and several prompts

CHAT = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}<>{% endfor %}" + (
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def test_the_judge_prompt_is_a_users_message_and_a_forced_ending_stays_in_the_open_turn():
    tokens = Tokens(CHARACTERS, eos_id=END, vocab=TEXT_VOCAB, chat_template=CHAT)
    module = favouring_digits(model64())
    engine = Scripted(lambda p: "good")
    rendered = "<u>rate <a> and <b>\nreview:<><a>"
    for reward, before in ((FORCED, "good\nscore: "), (AT_ONCE, "score: ")):
        ctx = context(module, engine=engine, tokens=tokens)
        (found,) = SelfJudge(reward, JUDGING, 1).judge(ctx, *asked(("a", ["b"])))
        score, mass = expectation(module, rendered + before)
        assert (found.score, found.score_mass) == pytest.approx((score, mass), abs=1e-8)
    assert engine.prompts == [rendered]


def test_several_reward_prompts_judge_every_candidate_with_ids_and_noise_of_their_own():
    strict = RewardConfig(
        prompt_template="strictly <{{ response }}> for <{{ prompt }}>",
        reward_regex_template="score: {{ reward }}",
        score_range=(0, 5),
    )
    engine = Scripted(lambda p: "score: 1" if "strictly" in p else "score: 4")
    judges = [
        SelfJudge(REWARD, JUDGING, 2),
        SelfJudge(strict, JUDGING, 1, name="self:strict", first=2),
    ]
    several = SeveralJudges(judges)
    prompts, candidates_PG = asked(("a", ["b", "c"]))
    found = list(several.judge(judging_context(engine), prompts, candidates_PG))
    ids = [f"s/0/0/{c}/j{k}" for c in range(2) for k in range(3)]
    assert sorted(j.id for j in found) == ids
    assert sorted(several.judgement_ids(candidates_PG[0])) == ids
    assert {(j.id[-2:], j.judge, j.score) for j in found} == {
        ("j0", "self", 4.0),
        ("j1", "self", 4.0),
        ("j2", "self:strict", 1.0),
    }
    assert candidate_scores(candidates_PG[0], found) == {"s/0/0/0": 2.5, "s/0/0/1": 2.5}
    assert len({r.key for r in engine.requests}) == 6


# what a judge says of itself


def test_a_subclass_of_judge_and_any_object_with_a_method_judge_have_the_same_defaults():
    class Subclass(Judge):
        def judge(self, ctx, prompts, candidates_PG):
            return []

    class Plain:
        def judge(self, ctx, prompts, candidates_PG):
            return []

    _, (candidates,) = asked(("a", ["b", "cc"]))
    said = [Judgement(f"{c.id}/j0", (c.id,), "x", float(i)) for i, c in enumerate(candidates)]
    subclass, plain = Subclass(), Plain()
    assert make_judge(subclass) is subclass
    assert [make_judge(subclass).name, make_judge(plain).name] == ["judge", "Plain"]
    for judge in (make_judge(subclass), make_judge(plain)):
        assert isinstance(judge, Judge) and make_judge(judge) is judge
        assert judge.judgement_ids(candidates) == [j.id for j in said]
        assert judge.has_judged(candidates, said) and not judge.has_judged(candidates, said[:1])
        assert judge.scores(candidates, said) == {c.id: float(i) for i, c in enumerate(candidates)}
        assert judge.filtered(candidates, said) == judge.weights_used() == set()
        assert judge.own(said) == said and judge.reads_weights


def test_what_an_object_defines_itself_is_asked_of_it():
    class Own:
        name, num_judgements, reads_weights = "own", 2, False

        def judge(self, ctx, prompts, candidates_PG):
            return [Judgement("an id", ("a",), "own", 3.0)]

        def judgement_ids(self, candidates):
            return ["an id"]

        def scores(self, candidates, judgements):
            return {"a": 1.0}

        def filtered(self, candidates, judgements):
            return {"b"}

        def weights_used(self):
            return {"initial"}

    judge = make_judge(Own())
    assert (judge.name, judge.num_judgements, judge.reads_weights) == ("own", 2, False)
    assert [j.score for j in judge.judge(judging_context(), [], [])] == [3.0]
    assert judge.judgement_ids([]) == ["an id"]
    assert judge.scores([], []) == {"a": 1.0}
    assert judge.filtered([], []) == {"b"} and judge.weights_used() == {"initial"}


def test_judgements_are_counted_if_an_object_does_not_say_their_ids():
    class Twice:
        num_judgements = 2

        def judge(self, ctx, prompts, candidates_PG):
            return []

    _, (candidates,) = asked(("a", ["b"]))
    name = candidates[0].id
    said = [Judgement(f"{name}/{k}", (name,), "x", 1.0) for k in ("first", "second")]
    judge = make_judge(Twice())
    assert judge.has_judged(candidates, said) and not judge.has_judged(candidates, said[1:])


def test_only_judges_that_ask_the_policy_read_its_weights():
    text = FunctionJudge(lambda prompts, completions: [])
    fixed = [text, ModuleJudge(len), VoteJudge(), EnsembleJudge([text, VoteJudge()])]
    fixed.append(SelfJudge(REWARD, JUDGING, 1, model=adapt(Successor(TEXT_VOCAB))))
    asking = [SelfJudge(REWARD, JUDGING, 1), PairwiseJudge(), ImplicitJudge()]
    asking.append(EnsembleJudge([text, SelfJudge(REWARD, JUDGING, 1)]))
    assert not any(judge.reads_weights for judge in fixed)
    assert all(judge.reads_weights for judge in asking)
    assert {type(judge) for judge in (*fixed, *asking)} <= set(JUDGES)
