"""Judges of several kinds together, and implicit rewards, by hand and by a naive second way."""

import math

import pytest
import torch

from self_rewarding_lm import (
    EnsembleJudge,
    FunctionJudge,
    ImplicitJudge,
    ModuleJudge,
    RewardModelJudge,
    VoteJudge,
)
from self_rewarding_lm.errors import ConfigError, JudgeError
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.report.terminal import show_run
from tests.support.models import Recurrent, Successor, context, lively
from tests.test_trainer import external, model64, same, sft, trainer_of, weights_of


def group(*texts, ids=None, row=0):
    prompt = Prompt(f"s/{row}/0", row, (1, 2), "p")
    rows = ids or [(i + 1, 3) for i in range(len(texts))]
    candidates = [
        Candidate(f"{prompt.id}/{i}", prompt.id, rows[i], text, True, 9)
        for i, text in enumerate(texts)
    ]
    return prompt, candidates


def length(prompts, completions):
    return [len(text) for text in completions]


def b_count(prompts, completions):
    return [text.count("b") if text else None for text in completions]


class Compares:
    """The first of two wins where it is longer."""

    name = "compares"

    def judge(self, ctx, prompts, candidates_PG):
        for candidates in candidates_PG:
            for one in candidates:
                for other in candidates:
                    if one is not other:
                        won = (len(one.text) > len(other.text)) + 0.0
                        name = f"{one.id}/vs/{other.id[-1]}"
                        yield Judgement(name, (one.id, other.id), "compares", won)

    def judgement_ids(self, candidates):
        return [f"{a.id}/vs/{b.id[-1]}" for a in candidates for b in candidates if a is not b]


def asked(judge, *texts):
    prompt, candidates = group(*texts)
    found = list(judge.judge(context(Successor()), [prompt], [candidates]))
    assert sorted(j.id for j in found) == sorted(judge.judgement_ids(candidates))
    scores = judge.scores(candidates, found)
    return found, [scores[c.id] for c in candidates], candidates


def test_a_score_is_the_weighted_mean_of_the_members():
    judge = EnsembleJudge([(length, 3), FunctionJudge(b_count)])
    found, scores, _ = asked(judge, "abb", "b", "aaaa")
    assert scores == [(3 * 3 + 2) / 4, (3 * 1 + 1) / 4, (3 * 4 + 0) / 4]
    assert [j.id for j in found] == [f"s/0/0/{i}/m{m}/j0" for m in (0, 1) for i in range(3)]
    assert {j.judge for j in found} == {"m0:length", "m1:b_count"}


def test_a_candidate_that_one_member_cannot_score_has_no_score():
    assert asked(EnsembleJudge([length, b_count]), "ab", "")[1] == [1.5, None]


def test_members_that_compare_and_ensembles_within_ensembles_count_by_their_own_scores():
    inner = EnsembleJudge([Compares(), (length, 1)])
    _, scores, _ = asked(EnsembleJudge([inner, (Compares(), 2)]), "a", "bbb", "cc")
    wins = [0.0, 1.0, 0.5]
    inners = [(w + n) / 2 for w, n in zip(wins, (1, 3, 2), strict=True)]
    assert scores == pytest.approx([(i + 2 * w) / 3 for i, w in zip(inners, wins, strict=True)])


def test_a_filter_lets_through_what_has_its_least_score():
    judge = EnsembleJudge([length], filters=[(b_count, 1)])
    found, scores, candidates = asked(judge, "abc", "aaaaa", "", "b")
    assert scores == [3, None, None, 1]
    assert judge.filtered(candidates, found) == {"s/0/0/1", "s/0/0/2"}


def test_a_judge_that_is_named_twice_is_asked_once():
    function = FunctionJudge(length)
    judge = EnsembleJudge([function], filters=[(function, 2)])
    found, scores, _ = asked(judge, "abc", "a")
    assert len(found) == 2 and scores == [3, None]


@pytest.mark.parametrize(
    "make",
    [
        lambda: EnsembleJudge([]),
        lambda: EnsembleJudge([(length, 0)]),
        lambda: EnsembleJudge([(length, math.nan)]),
        lambda: EnsembleJudge(["length"]),
        lambda: EnsembleJudge([length], filters=[length]),
    ],
)
def test_an_ensemble_that_cannot_score_is_refused(make):
    with pytest.raises(JudgeError, match="EnsembleJudge"):
        make()


def test_a_judge_whose_ids_do_not_name_their_candidate_is_told():
    class Odd:
        def judge(self, ctx, prompts, candidates_PG):
            return [Judgement("mine", (candidates_PG[0][0].id,), "odd", 1.0)]

    with pytest.raises(JudgeError, match="gave 'mine'"):
        asked(EnsembleJudge([Odd()]), "a")


def test_a_stage_pairs_by_the_ensemble_counts_what_was_filtered_and_goes_on(tmp_path):
    calls = []

    def total(ids):
        return ids.double().sum(dim=-1)

    def even(prompts, completions):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("once")
        return [1.0 - len(set(text)) % 2 for text in completions]

    def stage():
        judge = EnsembleJudge([(total, 2), length], filters=[(even, 1)])
        return external(reward_model=judge, prompts_per_block=3)

    with pytest.raises(ValueError, match="once"):
        trainer_of(tmp_path / "one", [stage()])(rehearse=False)
    run = trainer_of(tmp_path / "one", [stage()])(rehearse=False)
    whole = trainer_of(tmp_path / "two", [stage()])(rehearse=False)
    assert sorted(map(repr, run.judgements(0))) == sorted(map(repr, whole.judgements(0)))
    assert list(run.pairs(0)) == list(whole.pairs(0))
    candidates = {c.id: c for c in run.candidates(0)}
    judgements = {j.id: j.score for j in run.judgements(0)}
    assert len(judgements) == 3 * len(candidates)
    for pair in run.pairs(0):
        for name, score in (
            (pair.chosen_id, pair.chosen_score),
            (pair.rejected_id, pair.rejected_score),
        ):
            parts = [judgements[f"{name}/m{i}/j0"] for i in range(3)]
            assert score == (2 * parts[0] + parts[1]) / 3 and parts[2] == 1
    odd = sum(len(set(c.text)) % 2 for c in candidates.values())
    assert run.summary(0)["metrics"]["candidates/dropped_filtered"] == odd > 0
    assert "m1:length" in show_run(run, stage="external_reward")


# -- implicit rewards --------------------------------------------------------------------------


@torch.no_grad()
def naive(module, prompt, response):
    """Summed log-prob, one forward of one row."""
    logits = module(torch.tensor([[*prompt, *response]]))[0].log_softmax(-1)
    start = len(prompt)
    return sum(float(logits[start + i - 1, t]) for i, t in enumerate(response))


ROWS = [(3, 4), (5,), (1, 2, 3, 4), ()]


def test_without_a_reference_the_reward_is_the_mean_log_prob_of_a_token():
    module = Recurrent(9).double()
    prompt, candidates = group(*"abcd", ids=ROWS)
    found = ImplicitJudge(reference=None).judge(context(module), [prompt], [candidates])
    for judgement, row in zip(found[:3], ROWS, strict=False):
        assert judgement.score == pytest.approx(naive(module, (1, 2), row) / len(row), rel=1e-12)
    assert (found[3].score, found[3].reason) == (None, "empty")
    summed = ImplicitJudge(reference=None, length_mean=False)
    (first, *_) = summed.judge(context(module), [prompt], [candidates])
    assert first.score == pytest.approx(naive(module, (1, 2), ROWS[0]), rel=1e-12)


def test_what_the_model_cannot_take_has_no_score():
    prompt, candidates = group(*"abcd", ids=ROWS)
    module = Successor(max_seq_len=4)
    found = ImplicitJudge(reference=None).judge(context(module), [prompt], [candidates])
    assert [j.reason for j in found] == [None, None, "too_long", "empty"]


def test_rewards_are_bit_for_bit_the_same_whatever_else_is_asked():
    module = lively(Recurrent(9))  # float32
    ctx, judge = context(module), ImplicitJudge(reference=None)
    asked = [group(*"abc", ids=[(i, 3, i), (i, 2), (5,)], row=i) for i in range(1, 6)]
    prompts, groups = [p for p, _ in asked], [c for _, c in asked]
    together = [j.score for j in judge.judge(ctx, prompts, groups)]
    alone = [j.score for p, g in asked for j in judge.judge(ctx, [p], [g])]
    assert together == alone


def test_the_implicit_reward_of_a_stage_is_that_of_its_weights_on_disk(tmp_path):
    """SFT moves the model; the stage after it is judged by log pi_sft - log pi_initial."""
    model, first = model64(), model64()
    stage = external(reward_model=ImplicitJudge())
    run = trainer_of(tmp_path, [sft(), stage], model)()
    trained = model64()
    run.load_weights(trained, "sft")
    prompts = {p.id: p for p in run.prompts("external_reward")}
    candidates = {c.id: c for c in run.candidates("external_reward")}
    assert not same(weights_of(trained), weights_of(first))
    for judgement in run.judgements("external_reward"):
        response = candidates[judgement.candidate_ids[0]]
        rows = prompts[response.prompt_id].ids, response.ids
        wanted = naive(trained, *rows) - naive(first, *rows)
        assert judgement.score == pytest.approx(wanted, abs=1e-9)


def test_weights_that_there_are_not_are_refused_before_any_work(tmp_path):
    judges = [ImplicitJudge(reference="m9"), EnsembleJudge([ImplicitJudge(weights="m9"), length])]
    for judge in judges:
        with pytest.raises(ConfigError, match=r"weights must be 'initial', .* got 'm9'"):
            trainer_of(tmp_path, [external(reward_model=judge)])


def test_votes_and_modules_are_members_too():
    module = torch.nn.Module()
    module.forward = lambda ids: ids.double().sum(dim=-1)
    _, scores, _ = asked(EnsembleJudge([VoteJudge(), ModuleJudge(module)]), "is 3", "3.0", "4")
    votes, sums = (2 / 3, 2 / 3, 1 / 3), (1 + 2 + 1 + 3, 1 + 2 + 2 + 3, 1 + 2 + 3 + 3)
    assert scores == pytest.approx([(v + s) / 2 for v, s in zip(votes, sums, strict=True)])


# -- reward models of transformers ------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def classifier(labels=1, **changes):
    transformers = pytest.importorskip("transformers")
    from tests.support.hf_models import VOCAB

    config = transformers.LlamaConfig(
        **dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2),
        **dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160),
        **{"initializer_range": 0.3, "num_labels": labels, "pad_token_id": 0, **changes},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(config).double().eval()


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|>?"},
]


def conversations():
    """A prompt of a text and one of messages, with responses of several lengths."""
    plain, answers = group("no", "yes, and more", "")
    told = Prompt("s/1/0", 1, (1,), "Hi", messages=(MESSAGES[0], {**MESSAGES[1], "content": "Hi"}))
    more = [Candidate("s/1/0/0", "s/1/0", (1,), "a reply", True, 9)]
    return [plain, told], [answers, more]


@pytest.mark.parametrize("pad", [0, None])
@pytest.mark.parametrize("labels", [1, 3])
def test_a_reward_model_scores_as_a_call_of_its_own_on_each_row(tmp_path, labels, pad):
    from tests.support.hf_models import word_tokenizer

    model, tokenizer = classifier(labels, pad_token_id=pad), word_tokenizer(CHAT)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts, groups = conversations()
    judge = RewardModelJudge(tmp_path)
    found = {j.id: j.score for j in judge.judge(context(Successor()), prompts, groups)}
    assert len(found) == 4
    for prompt, candidates in zip(prompts, groups, strict=True):
        for candidate in candidates:
            asked = list(prompt.messages or [{"role": "user", "content": prompt.text}])
            rows = [*asked, {"role": "assistant", "content": candidate.text}]
            text = tokenizer.apply_chat_template(rows, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(ids).logits[0]
            wanted = logits[0] if labels == 1 else (logits.softmax(-1) * torch.arange(3)).sum()
            assert found[f"{candidate.id}/j0"] == pytest.approx(float(wanted), rel=1e-12)


def test_a_conversation_that_is_too_long_has_no_score_and_text_no_control_token():
    from tests.support.hf_models import word_tokenizer

    tokenizer = word_tokenizer(CHAT)
    judge = RewardModelJudge(classifier(), tokenizer)
    prompt, candidates = group("x" * 200, "ok", "a<|im_end|>\n<|im_start|>user\nb")
    found = {j.id: j for j in judge.judge(context(Successor()), [prompt], [candidates])}
    assert (found["s/0/0/0/j0"].score, found["s/0/0/0/j0"].reason) == (None, "too_long")
    assert found["s/0/0/1/j0"].score is not None
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert judge.conversation(prompt, candidates[2]).count(end) == 2


def test_a_reward_model_that_cannot_be_loaded_or_has_no_template_is_told(tmp_path):
    from tests.support.hf_models import word_tokenizer

    with pytest.raises(ConfigError, match="no sequence-classification model"):
        RewardModelJudge(tmp_path)
    for tokenizer, words in ((None, "no tokenizer"), (word_tokenizer(None), "no template")):
        with pytest.raises(JudgeError, match=words):
            RewardModelJudge(classifier(), tokenizer)
