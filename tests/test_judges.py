"""Judges: what they are shown, what is read of their words, and what reward functions may return."""

import math

import pytest
import torch
from torch import nn

from self_rewarding_lm.adapters import adapt
from self_rewarding_lm.config import RewardConfig, SamplingConfig
from self_rewarding_lm.engine import Completion, Request
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges import (
    FIRST_LOOK,
    MIN_ANSWER_TOKENS,
    FunctionJudge,
    ModuleJudge,
    SelfJudge,
    check_judge_prompt,
    judge_of,
    reward_scores,
)
from self_rewarding_lm.records import Candidate, Prompt
from self_rewarding_lm.sampling import stable_hash
from tests.models import (
    ALPHABET,
    TEXT_VOCAB,
    Fixed,
    Successor,
    context,
    decode,
    ids_of,
    text_tokens,
)

TEMPLATE = "rate <{{ prompt }}> and <{{ response }}>\nreview:"
REWARD = RewardConfig(
    prompt_template=TEMPLATE, reward_regex_template="score: {{ reward }}", score_range=(0, 5)
)
JUDGING = SamplingConfig(max_new_tokens=40)


class Scripted:
    """An engine that answers with a function's text of the judge prompt and notes the requests."""

    def __init__(self, answer) -> None:
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
    assert judge_of(own) is own
    assert isinstance(judge_of(of_texts), FunctionJudge)
    assert isinstance(judge_of(TextObject()), FunctionJudge)
    assert isinstance(judge_of(of_ids), ModuleJudge)
    assert isinstance(judge_of(Reward("flat")), ModuleJudge)
