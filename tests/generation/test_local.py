"""Decoding: the same tokens however rows are batched, and exactly the tokens that were asked for."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from self_rewarding_lm.config import SamplingConfig
from self_rewarding_lm.errors import AdapterError, ConfigError, DataError, TokenizerError
from self_rewarding_lm.generation.candidates import generate, sample_candidates
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.sampling import sample_next, uniforms
from self_rewarding_lm.generation.score_trie import ScoreTrie
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.policy import Policy, response_logprobs
from self_rewarding_lm.records import Prompt
from self_rewarding_lm.runtime import Runtime
from tests.support.models import (
    ALPHABET,
    CHARACTERS,
    END,
    KINDS,
    KINDS64,
    LIMIT,
    TEXT_VOCAB,
    VOCAB,
    Fixed,
    Recurrent,
    Successor,
    context,
    encode,
    last_logits,
    text_tokens,
    transformer,
    transformer64,
)

RAGGED = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9, 3], [3, 1, 4], [0, 0]]
EOS = 7
GREEDY = Decoding(temperature=0.0, end_ids=(EOS,))
NOISY = Decoding(temperature=1.3, top_k=12, top_p=0.95, min_p=0.01, end_ids=(EOS,))
TAKE_ALL = SamplingConfig(temperature=0.0, max_new_tokens=6)


def requests_of(rows=RAGGED, limits=(4, 9, 6, 1, 8, 5)) -> list[Request]:
    return [
        Request(tuple(row), key, new)
        for key, (row, new) in enumerate(zip(rows, itertools.cycle(limits), strict=False))
    ]


def decoded(module: nn.Module, requests: list[Request], decoding: Decoding, **engine):
    """The completions, in the order of the requests."""
    found = dict(LocalEngine(**engine).generate(adapt(module), requests, decoding))
    return [found[i] for i in range(len(requests))]


def oracle(module: nn.Module, request: Request, decoding: Decoding) -> Completion:
    """One row, the whole of it through the bare model for each token."""
    noise = uniforms(np.array([request.key]), request.max_new_tokens)[0]
    filters = {"top_k": decoding.top_k, "top_p": decoding.top_p, "min_p": decoding.min_p}
    new: list[int] = []
    for number in noise:
        logits = last_logits(module, [*request.ids, *new])[None]
        uniform = torch.tensor([number])
        token = sample_next(logits, uniform, temperature=decoding.temperature, **filters)
        new.append(int(token))
        if new[-1] in decoding.end_ids:
            return Completion(tuple(new), True)
    return Completion(tuple(new), False)


def sizes_of_forwards(module: nn.Module, requests: list[Request], decoding: Decoding) -> list[int]:
    """The rows of each forward that decoding costs."""
    model, sizes = adapt(module), []
    module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    list(LocalEngine().generate(model, requests, decoding))
    return sizes


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_batched_and_cached_is_greedy_one_row_at_a_time(kind):
    module, requests = KINDS[kind](), requests_of()
    assert decoded(module, requests, GREEDY) == [oracle(module, r, GREEDY) for r in requests]


@pytest.mark.parametrize("kind", KINDS64)
def test_sampled_tokens_are_those_of_a_plain_loop(kind):
    module, requests = KINDS64[kind](), requests_of(RAGGED * 2)
    assert decoded(module, requests, NOISY) == [oracle(module, r, NOISY) for r in requests]


def test_log_probs_are_those_of_the_model_alone_if_they_are_asked_for():
    """Without the temperature, the filters and the penalty that chose the tokens."""
    module, requests = KINDS64["rotary"](), requests_of()
    decoding = replace(NOISY, repetition_penalty=1.5, min_new_tokens=2, logprobs=True)
    completions = decoded(module, requests, decoding)
    policy = Policy(adapt(module))
    wanted = response_logprobs(
        policy, [(r.ids, c.ids) for r, c in zip(requests, completions, strict=True)]
    )
    for completion, logprobs in zip(completions, wanted, strict=True):
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-9)
    others = decoded(module, requests, replace(decoding, logprobs=False))
    assert [c.ids for c in others] == [c.ids for c in completions]
    assert all(c.logprobs is None for c in others)


@pytest.mark.parametrize("kind", ["rotary", "plain"])
def test_candidates_do_not_depend_on_the_batch_or_the_order(kind):
    module, requests = KINDS64[kind](), requests_of(RAGGED * 4)
    expected = decoded(module, requests, NOISY, max_rows=1)
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    shuffled = decoded(module, [requests[i] for i in order], NOISY)
    assert decoded(module, requests, NOISY, max_rows=3) == expected
    assert decoded(module, requests, NOISY, max_rows=64) == expected
    assert decoded(module, requests, NOISY, max_prefill_tokens=10) == expected
    assert shuffled == [expected[i] for i in order]


def test_a_candidate_is_a_function_of_seed_and_its_id():
    model = adapt(transformer64())
    prompts = [Prompt(f"sft/{i}/0", i, tuple(row)) for i, row in enumerate(RAGGED)]

    def texts(prompts, seed, count):
        found = sample_candidates(
            model,
            prompts,
            SamplingConfig(temperature=1.0, max_new_tokens=8),
            count,
            engine=LocalEngine(max_rows=5),
            tokens=text_tokens(None),
            seed=seed,
            limit=LIMIT,
        )
        return {c.id: c.ids for c in found}

    straight = texts(prompts, 0, 4)
    assert set(straight) == {f"{p.id}/{s}" for p in prompts for s in range(4)}
    assert texts(prompts[::-1], 0, 4) == straight
    fewer = texts(prompts[:2], 0, 2)
    assert fewer == {i: straight[i] for i in fewer}
    assert texts(prompts, 1, 4) != straight
    # prompts 0 and 4 have the same ids; the samples are their own all the same
    assert [straight[f"sft/0/0/{s}"] for s in range(4)] != [
        straight[f"sft/4/0/{s}"] for s in range(4)
    ]


def test_rows_that_have_ended_cost_no_more_forwards():
    requests = [Request((6,), 0, 9), Request((2,), 1, 9), Request((4,), 2, 9)]
    # 6 -> 7 ends at once; 4 -> 5 6 7 after three tokens; 2 -> 3 4 5 6 7 after five
    assert sizes_of_forwards(Successor(), requests, GREEDY) == [3, 2, 2, 1, 1]


def test_the_last_token_of_a_limit_costs_no_forward():
    assert sizes_of_forwards(Successor(), [Request((0,), 0, 3)], GREEDY) == [1, 1, 1]


def test_samples_of_one_prompt_share_its_first_forward():
    requests = [Request((1, 2), key, 3) for key in range(4)] + [Request((3, 2), 9, 3)]
    assert sizes_of_forwards(Successor(), requests, GREEDY) == [2, 5, 5]


def test_decoding_keeps_no_gradients_and_is_in_evaluation_mode():
    module, states = Recurrent().train(), []
    model = adapt(module)
    module.register_forward_pre_hook(
        lambda *_: states.append((torch.is_grad_enabled(), module.training))
    )
    list(LocalEngine().generate(model, requests_of(), GREEDY))
    assert set(states) == {(False, False)}


def test_max_rows_bounds_the_rows_of_a_forward():
    model, sizes = adapt(Recurrent()), []
    model.module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    list(LocalEngine(max_rows=2).generate(model, requests_of(), GREEDY))
    assert max(sizes) == 2


def test_max_prefill_tokens_bounds_a_first_forward_padding_included():
    model, sizes = adapt(Recurrent()), []
    model.module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    requests = requests_of(limits=[1])  # the first forward is the only one
    list(LocalEngine(max_prefill_tokens=10).generate(model, requests, GREEDY))
    # the longest first: with the row of 5 the one of 7 would be 2 x 7; 5 and 3 (twice the same) go
    # as 2 x 5; 2 and 1 as 2 x 2
    assert sizes == [7, 10, 4]


class Failing(Recurrent):
    """From a moment on its forward fails where more than `most` rows go through it at once."""

    most = 0
    error: Callable[[], object] | None = None

    def forward(self, ids):
        if self.error is not None and len(ids) > self.most:
            self.error()
        return super().forward(ids)


def memory_of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore")


def another():
    raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.parametrize("error", [memory_of_a_gpu, lambda: torch.empty(2**60)])
def test_memory_that_is_used_up_is_said_with_what_bounds_it(error):
    module = Failing(VOCAB)
    model = adapt(module)
    module.error = error
    engine = LocalEngine(max_rows=4, cache_bytes=1_000_000)
    words = (
        r"out of memory while {}: .*allocate.*\. {} sequence ran .* lower LocalEngine\(max_rows=\.\.\.\) "
        r"\(now 4\), cache_bytes=\.\.\. \(now 1,000,000\) or max_prefill_tokens=\.\.\. \(now 4,096\)"
    )
    with pytest.raises(ConfigError, match=words.format("sampling", 1)):
        list(engine.generate(model, requests_of(), GREEDY))
    trie, rows = ScoreTrie((), ((1.0, (1,)), (2.0, (2,)))), [tuple(row) for row in RAGGED]
    with pytest.raises(ConfigError, match=words.format("scoring", 1)):
        list(engine.chances(model, rows, trie, frozenset()))


@pytest.mark.parametrize("most", [1, 2])
def test_what_memory_does_not_hold_is_tried_again_with_half_of_the_rows(most, caplog):
    module = Failing(VOCAB)
    model, engine, sampling = adapt(module), LocalEngine(max_rows=4), NOISY
    trie, rows = ScoreTrie((), ((1.0, (1,)), (2.0, (2,)))), [tuple(row) for row in RAGGED]
    texts = dict(engine.generate(model, requests_of(), sampling))
    chances = dict(engine.chances(model, rows, trie, frozenset()))
    caplog.clear()
    module.error, module.most = memory_of_a_gpu, most
    assert dict(engine.generate(model, requests_of(), sampling)) == texts
    assert [r.message.count("Tried again with half") for r in caplog.records] == [1]
    assert dict(engine.chances(model, rows, trie, frozenset())).keys() == chances.keys()
    assert engine.fitting_rows == 4  # the next stage begins with all of them


def test_other_errors_of_a_model_stay_what_they_are():
    module = Failing(VOCAB)
    model = adapt(module)
    module.error = another
    with pytest.raises(RuntimeError, match=r"^shapes cannot be multiplied$"):
        list(LocalEngine().generate(model, requests_of(), GREEDY))


def test_no_requests_give_no_completions():
    assert decoded(Successor(), [], GREEDY) == []


def test_the_end_token_is_kept_and_finishes_a_row():
    assert decoded(Successor(), [Request((4,), 0, 9)], GREEDY) == [Completion((5, 6, 7), True)]


def test_an_end_token_in_the_last_place_still_finishes():
    assert decoded(Successor(), [Request((4,), 0, 3)], GREEDY) == [Completion((5, 6, 7), True)]


def test_a_row_that_is_cut_off_is_unfinished():
    assert decoded(Successor(), [Request((4,), 0, 2)], GREEDY) == [Completion((5, 6), False)]


def test_without_an_end_token_finished_is_unknown():
    never = Decoding(temperature=0.0)
    assert decoded(Successor(), [Request((4,), 0, 4)], never) == [Completion((5, 6, 7, 8), None)]


def test_token_0_is_generated_and_kept_like_any_other():
    requests = [Request((8,), 0, 4), Request((0, 0), 1, 2)]
    done = decoded(Successor(), requests, Decoding(temperature=0.0))
    assert [c.ids for c in done] == [(9, 0, 1, 2), (1, 2)]


def test_token_0_can_be_the_end_token():
    decoding = Decoding(temperature=0.0, end_ids=(0,))
    assert decoded(Successor(), [Request((8,), 0, 9)], decoding) == [Completion((9, 0), True)]


def test_an_end_token_in_the_prompt_ends_nothing():
    assert decoded(Successor(), [Request((EOS,), 0, 2)], GREEDY) == [Completion((8, 9), False)]


def test_limits_are_those_of_each_request():
    requests = [Request((8,), 0, 1), Request((8,), 1, 5), Request((8,), 2, 3)]
    lengths = [len(c.ids) for c in decoded(Successor(), requests, GREEDY)]
    assert lengths == [1, 5, 3]


def test_min_new_tokens_forbids_the_end_token_before():
    decoding = Decoding(temperature=0.0, end_ids=(4,), min_new_tokens=2)
    # after 3 comes the end, 4; forbidden, all others are equal and the first, 0, is taken
    assert decoded(Successor(), [Request((3,), 0, 9)], decoding)[0].ids == (0, 1, 2, 3, 4)


def test_exactly_min_new_tokens_come_before_the_end_token():
    decoding = Decoding(temperature=0.0, end_ids=(2,), min_new_tokens=2)
    done = decoded(Fixed([1.0, 0.5, 3.0]), [Request((1,), 0, 9)], decoding)
    assert done == [Completion((0, 0, 2), True)]


def test_min_new_tokens_that_are_reached_change_nothing():
    decoding = Decoding(temperature=0.0, end_ids=(EOS,), min_new_tokens=2)
    assert decoded(Successor(), [Request((4,), 0, 9)], decoding)[0].ids == (5, 6, 7)


def test_repetition_penalty_makes_seen_tokens_less_likely():
    decoding = Decoding(temperature=0.0, repetition_penalty=4.0)
    module = Fixed([2.0, 1.5, 1.0, -1.0])
    requests = [Request((1,), 0, 1), Request((3,), 1, 4), Request((0,), 2, 3)]
    # 2.0 -> 0.5 once token 0 was seen, 1.5 -> 0.375, 1.0 -> 0.25: then 0 is the likeliest again
    found = [c.ids for c in decoded(module, requests, decoding)]
    assert found == [(0,), (0, 1, 2, 0), (1, 2, 0)]


def test_filter_fn_sees_logits_first_and_may_change_them_in_place():
    def no_zero(logits):
        logits[:, 0] = -torch.inf
        return logits

    decoding = Decoding(temperature=1.0, top_k=1, filter_fn=no_zero)
    done = decoded(Fixed([2.0, 1.5, 1.0]), [Request((2,), 0, 2), Request((1,), 0, 2)], decoding)
    assert [c.ids for c in done] == [(1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("filter_fn", "came"),
    [(lambda logits: logits[:, :2], r"\(1, 2\)"), (lambda logits: None, "NoneType")],
    ids=["narrower", "nothing"],
)
def test_a_filter_fn_with_another_shape_is_refused(filter_fn, came):
    with pytest.raises(AdapterError, match=rf"\(1, 3\); got {came}"):
        decoded(Fixed([2.0, 1.5, 1.0]), [Request((2,), 0, 2)], Decoding(filter_fn=filter_fn))


def letters(stop: tuple[str, ...], prompt: str = "a", new: int = 50):
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=new, stop=stop)
    return generate(
        Successor(TEXT_VOCAB), [prompt], sampling=sampling, tokenizer=CHARACTERS, eos_id=END
    )[0][0]


def test_a_stop_text_ends_a_row_and_stays_in_it():
    found = letters(("xyz", "fg"))
    assert (found.text, found.finished) == ("bcdefg", True)


def test_a_stop_text_of_the_prompt_ends_nothing():
    assert letters(("ab",), prompt="ab", new=3).text == "cde"


def test_a_stop_text_longer_than_32_tokens_ends_a_row():
    assert letters((ALPHABET[1:37],)).text == ALPHABET[1:37]


def test_the_end_token_is_no_part_of_the_text():
    found = letters(())
    assert found.ids[-1] == END and found.text == ALPHABET[1:] and found.finished


def test_stop_texts_need_a_tokenizer():
    with pytest.raises(ConfigError, match="tokenizer"):
        generate(Successor(), [torch.tensor([1])], sampling=SamplingConfig(stop=("x",)))


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_with_a_mask_are_the_same_as_lists(side, pad):
    rows = [[3, 0, 4], [0, 5, 9, 2, 3], [0], [3, 3]]  # real tokens equal to the padding among them
    ids, mask = torch.full((4, 5), pad), torch.zeros(4, 5, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(5 - len(row), 5) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), True
    module = transformer64()
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=6)
    listed = generate(module, [torch.tensor(r) for r in rows], sampling=sampling, num_samples=2)
    padded = generate(module, ids, mask=mask, sampling=sampling, num_samples=2)
    assert padded == listed
    assert generate(module, ids, mask=mask.long(), sampling=sampling, num_samples=2) == listed


def test_texts_are_the_same_as_their_ids():
    module = transformer(vocab=TEXT_VOCAB)
    kwargs = {"sampling": TAKE_ALL, "tokenizer": CHARACTERS, "eos_id": END}
    by_text = generate(module, ["what is 2", "a"], **kwargs)
    by_ids = generate(module, [encode("what is 2"), encode("a")], **kwargs)
    assert by_text == by_ids


def test_generate_gives_num_samples_a_prompt_in_order():
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([1, 2])]
    found = generate(Successor(), prompts, sampling=TAKE_ALL, num_samples=3)
    assert [[c.id for c in group] for group in found] == [
        [f"generate/{p}/{s}" for s in range(3)] for p in range(3)
    ]
    assert [group[0].ids[0] for group in found] == [4, 5, 3]


def test_generate_repeats_itself_and_leaves_the_global_random_state():
    module, prompts = Recurrent(), [torch.tensor([1, 2])]
    sampling = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=40)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(module, prompts, sampling=sampling, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert generate(module, prompts, sampling=sampling, seed=3) == first
    assert generate(module, prompts, sampling=sampling, seed=4) != first


def test_generate_is_without_dropout_and_leaves_modes_and_gradients():
    module = Recurrent(dropout=0.9).train()
    module.head.eval()
    module.head.bias.grad = torch.ones(VOCAB)
    same = Recurrent().eval()
    prompts = [torch.tensor([1, 2, 3])]
    assert generate(module, prompts, sampling=TAKE_ALL) == generate(
        same, prompts, sampling=TAKE_ALL
    )
    assert module.training and module.dropout.training and not module.head.training
    assert torch.equal(module.head.bias.grad, torch.ones(VOCAB)) and torch.is_grad_enabled()


def test_modes_and_gradients_are_as_before_between_results_and_after_stopping_early():
    module = Recurrent().train()
    results = LocalEngine(max_rows=2).generate(adapt(module), requests_of(), GREEDY)
    next(results)
    assert torch.is_grad_enabled() and module.training
    module(torch.tensor([[1, 2]])).sum().backward()  # the consumer may train in between
    results.close()
    assert torch.is_grad_enabled() and module.training
    assert module.head.bias.grad is not None


@pytest.fixture
def bf16():
    yield Runtime({"cpu": True, "mixed_precision": "bf16"}, quiet=True)
    Runtime({"cpu": True, "mixed_precision": "no"}, quiet=True)  # accelerate's state is global


def test_autocast_is_not_left_on_for_the_consumer_of_a_rollout(bf16):
    ctx = context(Recurrent(), runtime=bf16)
    prompts = [Prompt("stage/0/0", 0, (1, 2)), Prompt("stage/1/0", 1, (1,))]
    results = ctx.sample(prompts, TAKE_ALL, 1)
    next(results)
    on = torch.is_autocast_enabled("cpu")
    results.close()
    assert not on


def test_length_is_counted_in_new_tokens():
    prompt = torch.tensor([5] * 20)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=3)
    assert len(generate(Successor(), [prompt], sampling=sampling)[0][0].ids) == 3


def test_max_new_tokens_are_shortened_to_the_room_and_recorded():
    prompts = [torch.tensor([1] * n) for n in (LIMIT - 2, LIMIT - 1, 1)]
    found = generate(transformer(), prompts, sampling=SamplingConfig(max_new_tokens=10))
    assert [(len(c.ids), c.max_new_tokens) for (c,) in found] == [(2, 2), (1, 1), (10, 10)]


@pytest.mark.parametrize("positions", ["absolute", "rotary"])
def test_a_prompt_can_be_answered_up_to_the_models_last_position(positions):
    module, request = transformer(positions), Request((1,) * (LIMIT - 5), 0, 5)
    forever = Decoding(temperature=0.0)
    ids = decoded(module, [request], forever)[0].ids
    assert len(ids) == 5 and ids == oracle(module, request, forever).ids


def test_a_prompt_that_fills_the_model_is_refused():
    prompts = [torch.tensor([1]), torch.tensor([1] * LIMIT)]
    with pytest.raises(DataError, match=f"prompt 1 has {LIMIT} tokens.*fewer than the {LIMIT}"):
        generate(transformer(), prompts)


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match="prompt 1 has 0 tokens"):
        generate(Successor(), [torch.tensor([1]), torch.tensor([], dtype=torch.long)])


def test_a_row_whose_mask_is_all_false_is_refused():
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[True] * 3, [False] * 3])
    with pytest.raises(DataError, match="prompt 1 has 0 tokens"):
        generate(Successor(), ids, mask=mask)


def test_ids_that_the_model_does_not_know_are_refused():
    with pytest.raises(TokenizerError, match="0 to 9; got 10"):
        generate(Successor(10), [torch.tensor([10])])


def test_a_mask_of_another_shape_and_a_mask_for_lists_are_refused():
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(DataError, match=r"\(2, 3\) and \(2, 2\)"):
        generate(Successor(), ids, mask=ids[:, :2].bool())
    with pytest.raises(ConfigError, match="mask"):
        generate(Successor(), [ids[0]], mask=ids[:1].bool())


def test_prompts_may_be_floats_that_are_whole():
    found = generate(Successor(), [torch.tensor([1.0, 2.0])], sampling=TAKE_ALL)
    assert found[0][0].ids == (3, 4, 5, 6, 7, 8)
