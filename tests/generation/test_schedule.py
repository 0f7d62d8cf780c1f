"""The order of requests, the places of rows, and the memory that they take.

Oracles: definitions written out over all pairs of prompts; one row at a time by whole forwards; a
queue with a fixed number of places, worked by hand.
"""

import gc
import os
import random
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.schedule import Group, plan_sessions
from self_rewarding_lm.models import attention, interface
from self_rewarding_lm.models.attention import KeyValues
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.interface import Plan, TokenModel
from tests.generation.test_local import oracle
from tests.models.test_sessions import PADDED, nodes_of, own, tokens_through
from tests.support.hf_models import tiny
from tests.support.models import Recurrent, transformer64

Ids = tuple[int, ...]
Sizes = list[tuple[Ids, int]]


@cache
def keeping(bytes_per_token: int) -> TokenModel:
    """Some model that says it keeps so much; plans ask no more of it."""
    model = adapt(Recurrent())
    model.bytes_per_token = bytes_per_token
    return model


def common(*rows: Ids) -> int:
    n = 0
    while all(len(row) > n for row in rows) and len({row[n] for row in rows}) == 1:
        n += 1
    return n


def some_requests(draw: random.Random) -> Sizes:
    """Prompts with beginnings in common: of all, of some, of none; some of them the same."""
    root = draw.choices(range(3), k=draw.choice([0, 5, 15, 16, 17, 30]))
    stems = [draw.choices(range(3), k=draw.choice([0, 2, 8, 12])) for _ in range(3)]
    tails = [draw.choices(range(2), k=draw.choice([1, 1, 2, 9, 40])) for _ in range(4)]
    return [
        ((*root, *draw.choice(stems), *draw.choice(tails)), draw.randint(1, 20))
        for _ in range(draw.randint(1, 12))
    ]


def root_of(rows: Sequence[Ids]) -> Ids:
    """At least 16 tokens, and of each prompt one is left."""
    length = min(common(*rows), min(map(len, rows)) - 1)
    return rows[0][:length] if length >= 16 else ()


def check_groups(groups: Sequence[Group], plan: Plan, requests: Sizes) -> None:
    rows = [g.ids for g in groups]
    assert len(set(rows)) == len(rows)
    assert all(requests[i][0] == g.ids for g in groups for i in g.members)
    assert plan.root == root_of(rows)
    assert plan.longest == max(map(len, rows))
    assert plan.max_new == max(requests[i][1] for g in groups for i in g.members)
    # a family: those with 8 tokens in common after the root, directly or by way of others
    enough = len(plan.root) + 8
    families: list[list[Ids]] = []
    for row in rows:
        if families and any(common(row, other) >= enough for other in families[-1]):
            families[-1].append(row)
        else:
            families.append([row])
    for i, family in enumerate(families):
        others = [row for other in families[:i] for row in other]
        assert all(common(row, other) < enough for row in family for other in others)
        # each beginning that two of the family share stands in the one before
        new = [len(family[0]), *(len(b) - common(a, b) for a, b in pairwise(family))]  # fmt: skip
        assert sum(new) == nodes_of(family)
    longest = [max(map(len, family)) for family in families]
    assert longest == sorted(longest, reverse=True)


def test_every_request_is_in_one_group_families_side_by_side_and_the_longest_first():
    draw, roots, multiple = random.Random(0), 0, 0
    for _ in range(300):
        requests = some_requests(draw)
        [(plan, groups)] = plan_sessions(keeping(0), requests, 64, None)
        assert sorted(i for g in groups for i in g.members) == list(range(len(requests)))
        assert (plan.max_rows, plan.is_cut) == (len(requests), False)
        check_groups(groups, plan, requests)
        roots += bool(plan.root)
        multiple += len(groups) > 3
    assert roots > 50 and multiple > 100  # the sets are not all trivial


@pytest.mark.parametrize(
    ("rows", "root"),
    [
        ([(1,) * 16 + (2,), (1,) * 16 + (3,)], 16),
        ([(1,) * 15 + (2,), (1,) * 15 + (3,)], 0),
        ([(1,) * 17, (1,) * 17 + (3,)], 16),  # of the first a token is left
        ([(1,) * 16, (1,) * 16 + (3,)], 0),
        ([(1,) * 20], 19),
        ([(1,) * 20] * 3, 19),
        ([(5,)], 0),
    ],
)
def test_the_root_is_what_all_prompts_begin_with(rows, root):
    [(plan, _)] = plan_sessions(keeping(0), [(row, 1) for row in rows], 8, None)
    assert plan.root == rows[0][:root]


def test_no_requests_need_no_session():
    assert list(plan_sessions(keeping(0), [], 8, None)) == []


def tokens_of(plan: Plan, rows: int) -> int:
    """By hand: the root once, a stem a row, one in eight and two more, and the rows' own."""
    root = len(plan.root)
    return root + (rows + rows // 8 + 2) * (plan.longest - root) + rows * plan.max_new


@pytest.mark.parametrize("copies", [1, 3])
def test_as_many_rows_are_in_flight_as_memory_has_room_for(copies):
    draw, refused, several = random.Random(1), 0, 0
    for _ in range(200):
        requests, allowed = some_requests(draw), draw.randint(100, 2000)
        try:
            found = list(plan_sessions(keeping(8), requests, 9, 8 * allowed, copies=copies))
        except ConfigError:
            groups = [Group(ids, ()) for ids, _ in requests]
            whole = Plan(
                root_of([g.ids for g in groups]),
                max(len(g.ids) for g in groups),
                max(new for _, new in requests),
                max_rows=copies,
            )
            assert tokens_of(whole, copies) > allowed
            refused += 1
            continue
        several += len(found) > 1
        assert sorted(i for _, gs in found for g in gs for i in g.members) == list(range(len(requests)))  # fmt: skip
        for plan, groups in found:
            check_groups(groups, plan, requests)
            wanted = min(9, copies * sum(len(g.members) for g in groups))
            assert tokens_of(plan, plan.max_rows) == plan.tokens <= allowed
            assert copies <= plan.max_rows <= wanted and plan.is_cut == (plan.max_rows < wanted)
            if plan.is_cut:
                assert tokens_of(plan, plan.max_rows + 1) > allowed
    assert refused > 5 and several > 5


def test_short_prompts_have_a_session_of_their_own_where_long_ones_leave_room_for_fewer_rows():
    """With the long ones: 4 + 2 stems of 100 and 4 x 10. Without: 8 + 1 + 2 of 9 and 8 x 10."""
    long, short = [((9, i) * 50, 10) for i in range(2)], [((i,) * 9, 10) for i in range(8)]
    (first, longer), (second, others) = plan_sessions(keeping(1), [*long, *short], 8, 640)
    assert [g.members for g in longer] == [(0,), (1,)]
    assert (first.longest, first.max_rows) == (100, 2)
    assert sorted(g.members[0] for g in others) == list(range(2, 10))
    assert (second.longest, second.max_rows, second.is_cut) == (9, 8, False)
    [(both, groups)] = plan_sessions(keeping(1), [*long, *short], 4, 640)
    assert (both.longest, both.max_rows, both.is_cut) == (100, 4, False) and len(groups) == 10


def test_one_row_that_does_not_fit_is_an_error_with_both_sizes():
    """A row of a prompt of 20 tokens and 5 new ones: the root of 19 once, 3 stems of 1, 5 own."""
    mib = 2**20
    with pytest.raises(ConfigError, match=r"20 tokens.*5 new.*27 MiB.*1 row, .*26 MiB"):
        list(plan_sessions(keeping(mib), [((1,) * 20, 5)], 8, 26 * mib))
    [(plan, _)] = plan_sessions(keeping(mib), [((1,) * 20, 5)], 8, 27 * mib)
    assert plan.max_rows == 1


# rows in flight


VOCAB, SMALL = 96, 17
JOINING: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny("llama", dtype=torch.float64),
    "gemma3": lambda: tiny("gemma3", dtype=torch.float64),
    "own": own,
}
WAITING: dict[str, Callable[[], nn.Module]] = {
    "x-transformers": lambda: transformer64("alibi", max_seq_len=64, seed=1),
    "padded": PADDED["chunked"],
    "plain": lambda: Recurrent().double(),
}
DECODINGS = {
    "greedy": Decoding(temperature=0.0),
    "sampled": Decoding(temperature=1.3, top_k=12, top_p=0.95),
}


def cut(ids: Ids, ends: Ids) -> Completion:
    """A row that would go on, up to the first token that ends it."""
    place = next((n for n, token in enumerate(ids) if token in ends), None)
    return Completion(ids if place is None else ids[: place + 1], place is not None)


@cache
def worked(kind: str, how: str) -> tuple[nn.Module, Decoding, list[Request], list[Completion]]:
    """A model, requests in disorder that end at different times, and what a naive loop gives."""
    module = {**JOINING, **WAITING}[kind]()
    vocab = adapt(module).vocab
    draw = random.Random(0)
    root = draw.choices(range(vocab), k=17)
    starts = [[], root, root, root + draw.choices(range(vocab), k=9)]
    prompts = [
        tuple(draw.choice(starts) + draw.choices(range(vocab), k=draw.randint(1, 9)))
        for _ in range(7)
    ]
    order = [*range(7), *range(7), *range(3)]
    draw.shuffle(order)
    requests = [Request(prompts[p], i, draw.randint(2, 10)) for i, p in enumerate(order)]
    endless = [oracle(module, r, DECODINGS[how]).ids for r in requests]
    ends = tuple({ids[len(ids) // 2] for ids in endless[:3]})
    decoding = replace(DECODINGS[how], end_ids=ends)
    return module, decoding, requests, [cut(ids, ends) for ids in endless]


@pytest.mark.parametrize("how", DECODINGS)
@pytest.mark.parametrize("kind", [*JOINING, *WAITING])
def test_completions_are_those_of_one_row_at_a_time(kind, how):
    module, decoding, requests, expected = worked(kind, how)
    assert len({len(done.ids) for done in expected}) >= 4
    assert {done.finished for done in expected} == {True, False}
    model, draw = adapt(module), random.Random(1)
    for max_rows in (1, 2, 3, 5, 64):
        order = list(range(len(requests)))
        draw.shuffle(order)
        engine = LocalEngine(max_rows=max_rows, max_prefill_tokens=draw.choice([1, 30, 4096]))
        found = dict(engine.generate(model, [requests[i] for i in order], decoding))
        assert [found[place] for place in range(len(order))] == [expected[i] for i in order]


def rounds_of(model: TokenModel, requests, decoding: Decoding, **limits) -> list[int]:
    """How many rows were given a token each time tokens were chosen."""
    sizes: list[int] = []

    def watch(logits: Tensor) -> Tensor:
        sizes.append(len(logits))
        return logits

    list(LocalEngine(**limits).generate(model, requests, replace(decoding, filter_fn=watch)))
    return sizes


def served(lengths: Sequence[int], places: int) -> list[int]:
    """A queue before some places: how many are served at each turn."""
    waiting, serving, sizes = deque(lengths), [], []
    while waiting or serving:
        while waiting and len(serving) < places:
            serving.append(waiting.popleft())
        sizes.append(len(serving))
        serving = [n - 1 for n in serving if n > 1]
    return sizes


def served_in_batches(parties: Sequence[Sequence[int]], places: int) -> list[int]:
    """Parties are seated together, with the next ones that fit; none before all have left."""
    waiting, sizes = deque(list(party) for party in parties), []
    while waiting:
        batch = waiting.popleft()
        while waiting and len(batch) + len(waiting[0]) <= places:
            batch += waiting.popleft()
        sizes += served(batch, places)
    return sizes


@pytest.mark.parametrize("how", DECODINGS)
@pytest.mark.parametrize(
    ("kind", "max_rows"),
    [*(("own", n) for n in (1, 2, 3, 5, 64)), ("llama", 3), ("gemma3", 5)],
)
def test_a_place_that_is_free_is_taken_before_the_next_token(kind, how, max_rows):
    module, decoding, requests, expected = worked(kind, how)
    model = adapt(module)
    sizes = [(r.ids, r.max_new_tokens) for r in requests]
    [(_, groups)] = plan_sessions(model, sizes, max_rows, None)
    lengths = [len(expected[i].ids) for g in groups for i in g.members]
    found = rounds_of(model, requests, decoding, max_rows=max_rows)
    assert found == served(lengths, max_rows)
    waited = sum(lengths) > sum(lengths[:max_rows])
    assert not waited or found[0] == max_rows


@pytest.mark.parametrize("max_rows", [3, 5, 64])
@pytest.mark.parametrize("kind", WAITING)
def test_rows_that_cannot_be_joined_wait_for_their_batch(kind, max_rows):
    """No prompt of these has more than three requests, so none is in two batches."""
    module, decoding, requests, expected = worked(kind, "sampled")
    model = adapt(module)
    [(_, groups)] = plan_sessions(
        model, [(r.ids, r.max_new_tokens) for r in requests], max_rows, None
    )
    parties = [[len(expected[i].ids) for i in g.members] for g in groups]
    assert max(map(len, parties)) <= 3
    found = rounds_of(model, requests, decoding, max_rows=max_rows)
    assert found == served_in_batches(parties, max_rows)


@pytest.mark.parametrize("kind", JOINING)
def test_a_step_computes_one_token_of_each_row_that_goes_on(kind):
    """Tokens that go through the model: the prompts', and of each row all but the last new one."""
    module, decoding, requests, expected = worked(kind, "sampled")
    model = adapt(module)
    with tokens_through(module) as counts:
        model.refresh()
        trial = sum(counts)  # which comes before each generation
        list(LocalEngine(max_rows=3, max_prefill_tokens=1).generate(model, requests, decoding))
    steps = sum(len(done.ids) - 1 for done in expected)
    prompts, through = {r.ids for r in requests}, sum(counts) - 2 * trial
    assert nodes_of(list(prompts)) + steps <= through < sum(map(len, prompts)) + steps


def test_results_come_as_they_end():
    """Twelve prompts and two places: the first result is there before most prompts went through."""
    module = own()
    requests = [Request((i, i + 1, i + 2), i, 2 + i % 3) for i in range(0, 36, 3)]
    model = adapt(module)
    with tokens_through(module) as counts:
        results = LocalEngine(max_rows=2, max_prefill_tokens=6).generate(
            model, requests, Decoding(temperature=0.0)
        )
        next(results)
        first = sum(counts)
        model.refresh()
        trial = sum(counts) - first  # which comes before each generation
        assert trial < first < trial + 12 * 3
        assert len(list(results)) == 11 and sum(counts) > first + trial


# memory


Seen = tuple[int, tuple[int, ...], int]
"""Of a forward: which KeyValues, where its tensors are, and how many bytes they have."""


def tensors_of(memory: KeyValues) -> list[Tensor]:
    return [
        t for la in memory.layers.values() for pair in (la.root, la.stems, la.own) for t in pair
    ]


def watched(module: nn.Module) -> tuple[list[Seen], list[weakref.ref]]:
    """What is filled in with each forward of a session."""
    seen: list[Seen] = []
    alive: list[weakref.ref] = []

    def look(_, args, kwargs, output) -> None:
        memory = kwargs.get("cache", kwargs.get("key_values"))
        if memory is None or (memory.sizes.rows, memory.sizes.new) == (2, 2):  # a trial's
            return
        if not alive or alive[-1]() is not memory:
            alive.append(weakref.ref(memory))
        tensors = tensors_of(memory)
        total = sum(t.numel() * t.element_size() for t in tensors)
        seen.append((len(alive), tuple(t.data_ptr() for t in tensors if t.numel()), total))

    module.register_forward_hook(look, with_kwargs=True)
    return seen, alive


# 2 layers of keys and values of 2 heads of 8 numbers in float64; the own model has 4 heads
BYTES = {"llama": 2 * 2 * 2 * 8 * 8, "own": 2 * 2 * 4 * 8 * 8}
TEN = [Request((i, *range(9)), i, 6) for i in range(12)]
NEVER = Decoding(temperature=0.0)


@pytest.mark.parametrize("kind", BYTES)
def test_memory_is_allocated_once_and_does_not_grow_with_the_number_of_prompts(kind):
    module, decoding, requests, _ = worked(kind, "sampled")
    module = JOINING[kind]()
    model = adapt(module)
    seen, _ = watched(module)
    totals = []
    for some in (requests, requests * 3):
        seen.clear()
        list(LocalEngine(max_rows=4).generate(model, some, decoding))
        assert len(seen) > 10 and len(set(seen)) == 1  # one storage from the first to the last
        totals.append(seen[0][2])
    assert totals[0] == totals[1]


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_cache_bytes_bound_the_memory_and_so_the_rows(kind, rows):
    """Stems of 10 tokens: one a row, one in eight and two more; 6 tokens of its own a row."""
    needed = (rows + rows // 8 + 2) * 10 + rows * 6
    module = JOINING[kind]()
    model = adapt(module)
    assert model.bytes_per_token == BYTES[kind]
    seen, _ = watched(module)
    budget = needed * BYTES[kind]
    assert max(rounds_of(model, TEN, NEVER, cache_bytes=budget)) == rows
    assert {total for _, _, total in seen} == {budget}
    if rows > 1:
        assert max(rounds_of(model, TEN, NEVER, cache_bytes=budget - 1)) == rows - 1
    else:
        with pytest.raises(ConfigError, match="cache_bytes"):
            rounds_of(model, TEN, NEVER, cache_bytes=budget - 1)


def test_completions_are_the_same_in_little_memory_and_several_sessions():
    module = own()
    model = adapt(module)
    long = [Request((5, i) * 40, 50 + i, 5) for i in range(3)]
    requests = [*TEN, *long]
    expected = [oracle(module, r, NEVER).ids for r in requests]
    seen, alive = watched(module)
    budget = 600 * BYTES["own"]
    found = dict(LocalEngine(cache_bytes=budget).generate(model, requests, NEVER))
    assert [found[i].ids for i in range(len(requests))] == expected
    assert len(alive) == 2 and {number for number, _, _ in seen} == {1, 2}
    assert max(total for _, _, total in seen) <= budget


@pytest.mark.parametrize("block", [1, 3])
def test_memory_is_as_wide_as_the_longest_in_it_wider_and_narrower_again(block, monkeypatch):
    """Answers of 1 to 12 tokens to prompts of 3 to 17; what is wider than needed is hidden."""
    monkeypatch.setattr(attention, "BLOCK", block)
    module = own()
    requests = [Request((i, *range(i % 15), 7), i, 1 + 5 * i % 12) for i in range(24)]
    expected = [oracle(module, r, NEVER).ids for r in requests]
    model = adapt(module)
    seen, _ = watched(module)
    found = dict(LocalEngine(max_rows=4).generate(model, requests, NEVER))
    assert [found[i].ids for i in range(len(requests))] == expected
    totals = [total for _, _, total in seen]
    steps = list(pairwise(totals))
    assert any(a < b for a, b in steps) and any(a > b for a, b in steps)
    [(plan, _)] = plan_sessions(model, [(r.ids, r.max_new_tokens) for r in requests], 4, None)
    assert max(totals) <= plan.tokens * BYTES["own"]


def test_by_default_half_of_the_free_memory_is_used(monkeypatch):
    """3 rows need 5 stems of 10 tokens and 3 x 6; 4 need 6 stems and 4 x 6: 84 tokens."""
    assert 0 < interface.free_bytes(torch.device("cpu")) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # fmt: skip
    model = adapt(own())
    for tokens, rows in ((83, 3), (84, 4)):
        monkeypatch.setattr(interface, "free_bytes", lambda _, n=tokens: 2 * n * BYTES["own"])
        assert max(rounds_of(model, TEN, NEVER)) == rows


def test_rows_over_x_transformers_own_cache_are_bounded_by_three_times_their_keys_and_values():
    """2 layers of keys and values of 2 heads of 32 numbers in float64, three times."""
    model = adapt(transformer64("alibi", max_seq_len=64))  # over its own cache
    assert model.bytes_per_token == 3 * (2 * 2 * 2 * 32 * 8)
    some = [Request((i, *range(9)), i, 6) for i in range(12)]
    budget = (5 * 10 + 3 * 6) * model.bytes_per_token
    assert max(rounds_of(model, some, NEVER, cache_bytes=budget)) == 3


@pytest.mark.parametrize("kind", BYTES)
def test_closing_early_gives_memory_back_and_leaves_modes_as_they_were(kind):
    module = JOINING[kind]().train()
    next(module.children()).eval()
    modes = [part.training for part in module.modules()]
    model = adapt(module)
    _, alive = watched(module)
    results = LocalEngine(max_rows=2).generate(model, TEN, NEVER)
    for _ in range(3):
        next(results)
        assert [part.training for part in module.modules()] == modes and torch.is_grad_enabled()
    assert [ref() is None for ref in alive] == [False]
    results.close()
    del results
    gc.collect()
    assert [ref() is None for ref in alive] == [True]
    assert [part.training for part in module.modules()] == modes


def test_memory_is_given_back_at_the_end():
    module = own()
    model = adapt(module)
    _, alive = watched(module)
    results = LocalEngine(max_rows=2).generate(model, TEN, NEVER)
    assert len(list(results)) == 12
    gc.collect()
    assert [ref() is None for ref in alive] == [True]
