"""What holds for any numbers: pairs, batches, packed rows, log-probs, sampling, agreement."""

import math
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise, permutations, takewhile
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import strategies as st

from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.models import policy
from self_rewarding_lm.models.batching import pad_rows
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.policy import Policy
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.stages.pairing import PairingConfig
from tests.support.models import VOCAB, Successor, context, transformer64
from tests.support.mutants import over

# Advantages

GROUP = st.lists(
    st.sampled_from([0.0, 0.1, 0.2, 0.3, 1 / 3, 1.0, 2.5, 5.0]), min_size=2, max_size=6
)


@over(
    "stages.grpo",
    st.tuples(
        GROUP.filter(lambda scores: len(set(scores)) > 1),
        st.sampled_from(["std", "none", "batch"]),
        st.sampled_from(["mean", "others"]),
    ),
    mutants={
        "number - mean for number in numbers]": "mean - number for number in numbers]",
        "number * len(numbers) / (len(numbers) - 1) for": "number * (len(numbers) - 1) / len(numbers) for",
        'if baseline == "others":': 'if baseline == "mean":',
        'EPSILON if scale == "std" else 1.0': 'EPSILON if scale != "none" else 1.0',
        "math.sqrt(squares / (len(numbers) - 1))": "math.sqrt(squares / len(numbers))",
        "EPSILON = 1e-4": "EPSILON = 1e-2",
        "exact_sum((number - mean) ** 2 for": "exact_sum((number - mean) ** 3 for",
    },
    examples=300,
)
def advantages_are_the_distances_of_scores_from_their_baseline(grpo, case):
    scores, scale, baseline = case
    found = grpo.group_advantages(scores, scale=scale, baseline=baseline)
    others = [np.mean(scores[:i] + scores[i + 1 :]) for i in range(len(scores))]
    bases = others if baseline == "others" else [np.mean(scores)] * len(scores)
    divisor = np.std(scores, ddof=1) + 1e-4 if scale == "std" else 1.0
    expected = [(score - base) / divisor for score, base in zip(scores, bases, strict=True)]
    assert np.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert abs(sum(found)) < 1e-9
    for one, other in permutations(range(len(scores)), 2):
        assert (found[one] > found[other]) == (scores[one] > scores[other])


# Pairs

SCORE = st.none() | st.sampled_from([0.0, 1.0, 2.5, 2.75, 5.0])
ANSWER = st.tuples(
    st.sampled_from([(1, 2), (1, 3), (4,)]),
    st.sampled_from(["a", "a ", "b", None]),
    st.sampled_from([True, True, None, False]),
    SCORE,
)
RULES = st.fixed_dictionaries(
    {
        "min_margin": st.sampled_from([0.0, 0.25, 2.5]),
        "is_valid_score": st.none() | st.just(lambda s: s > 0),
        "is_valid_pair": st.none() | st.just(lambda a, b: a > 2),
    }
)


def _candidates(prompt, answers):
    return [
        Candidate(f"{prompt.id}/{k}", prompt.id, ids, text, ended, 8)
        for k, (ids, text, ended, _) in enumerate(answers)
    ]


@over(
    "records",
    st.tuples(ANSWER, ANSWER),
    mutants={
        "one.text.strip() == (other.text": "one.text == (other.text",
        "if one.ids == other.ids:": "if False:",
    },
    examples=100,
)
def responses_say_the_same_by_their_ids_or_by_their_texts(records, case):
    one, other = _candidates(Prompt("s/0/0", 0, (1,)), case)
    texts = {(candidate.text or "").strip() for candidate in (one, other)}
    alike = one.ids == other.ids or (one.text is not None and len(texts) == 1)
    assert records.same_text(one, other) == alike


@over(
    "records",
    st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.booleans() | st.text(),
    mutants={
        "is_real and abs(value) <= sys.float_info.max": "is_real",
        " and not isinstance(value, bool)": "",
    },
    examples=100,
)
def a_number_is_what_a_float_can_hold(records, value):
    try:
        holds = type(value) in (int, float) and math.isfinite(float(value))
    except OverflowError:
        holds = False
    assert records.is_number(value) == holds


@over(
    "stages.pairing",
    st.tuples(st.lists(st.lists(ANSWER, max_size=5), max_size=4), RULES),
    mutants={
        '"tie": lambda: margin == 0': '"tie": lambda: False',
        "lambda: same_text(chosen.candidate, rejected.candidate)": "lambda: False",
        "lambda: abs(margin) < exact(min_margin)": "lambda: abs(margin) <= exact(min_margin)",
        "not is_valid_pair(chosen.score, rejected.score)": "not is_valid_pair(rejected.score, chosen.score)",
        "drops.kept += len(pairs)": "drops.kept += 0",
        "drops.prompts[reason] += 1": "drops.prompts[reason] = 1",
        "c.finished is not False": "c.finished is True",
        "{reason: len(left) - len(kept)}": "{reason: 1}",
        "(best[0], worst[0])": "(worst[0], best[0])",
        "chosen_id=one.id,": "chosen_id=other.id,",
        "rejected_ids=other.ids,": "rejected_ids=one.ids,",
    },
    examples=750,
)
def pairs_are_ordered_have_parents_and_all_else_is_counted(pairing, case):
    answers_PG, rules = case
    drops, pairs, asked = pairing.DropCounts(), [], 0
    lost: Counter[str] = Counter()
    for row, answers in enumerate(answers_PG):
        prompt = Prompt(f"sr/{row}/0", row, (7,), "say")
        made = {c.id: c for c in _candidates(prompt, answers)}
        scores = {c: answer[3] for c, answer in zip(made, answers, strict=True)}
        before = drops.prompts["tie"]
        found = pairing.make_pairs(
            prompt, list(made.values()), scores, drops, pairing=PairingConfig(), **rules
        )
        pair, asked = (found[0] if found else None), asked + 1
        assert len(found) <= 1
        left = {name: c for name, c in made.items() if c.finished is not False}
        lost["unfinished"] += len(made) - len(left)
        if len(left) < 2:
            assert pair is None
            continue
        known = {name: s for name in left if (s := scores[name]) is not None}
        lost["unscored"] += len(left) - len(known)
        valid = (
            {name: s for name, s in known.items() if rules["is_valid_score"] is None or s > 0}
            if len(known) > 1
            else {}
        )
        lost["invalid_score"] += len(known) - len(valid) if len(known) > 1 else 0
        high, low = (max(valid.values()), min(valid.values())) if len(valid) > 1 else (0.0, 0.0)
        if len(known) > 1:
            few = len(valid) < 2
            assert few or high > low or drops.prompts["tie"] == before + 1
        best = [made[name] for name, s in valid.items() if s == high]
        worst = [made[name] for name, s in valid.items() if s == low]
        same = bool(best) and (
            best[0].ids == worst[0].ids
            or (best[0].text is not None and best[0].text.strip() == (worst[0].text or "").strip())
        )
        wanted = high > low and high - low >= rules["min_margin"] and not same
        assert (pair is not None) == (wanted and (rules["is_valid_pair"] is None or high > 2))
        if pair is None:
            continue
        pairs.append(pair)
        chosen, rejected = made[pair.chosen_id], made[pair.rejected_id]
        assert (
            pair.chosen_score
            == scores[chosen.id]
            == high
            > low
            == scores[rejected.id]
            == pair.rejected_score
        )
        assert (pair.chosen_ids, pair.rejected_ids) == (
            chosen.ids,
            rejected.ids,
        ) and chosen.ids != rejected.ids
        assert (pair.chosen, pair.rejected, pair.prompt) == (chosen.text, rejected.text, "say")
        assert pair.id == prompt.id and pair.prompt_ids == prompt.ids
    assert drops.kept == len(pairs) and drops.kept + drops.prompts.total() == asked
    assert +drops.candidates == +lost
    assert sum(n for name, n in drops.metrics().items() if name.startswith("pairs/")) == asked


WRITTEN = st.tuples(
    st.sampled_from(["a", "a ", "bbb", "cc"]),
    st.sampled_from([True, True, True, None, False]),
    st.sampled_from([None, None, None, "busy"]),
)


@over(
    "stages.pairing",
    st.tuples(st.lists(WRITTEN, max_size=4), st.none() | st.integers(1, 3), st.integers(0, 4)),
    mutants={
        "all(same_text(left[0], c) for c in left[1:])": "same_text(left[0], left[1])",
        "not allowed": "not left",
        "lambda: not winners": "lambda: not left",
        "c in winners or not all(": "not all(",
        "not all(same_text(c, w) for w in winners)": "True",
        "if length_of(c) <= longest": "if True",
        "{**responses, **WHOLE}": "WHOLE",
    },
    examples=300,
)
def only_candidates_that_some_scores_would_pair_are_judged(pairing, case):
    """Oracle: the pairs of all scores that a judge could give."""
    written, longest, first_winner = case
    prompt = Prompt("sr/0/0", 0, (7,), "say")
    made = [
        Candidate(f"sr/0/0/{k}", prompt.id, (k,), text, ended, 8, reason=reason)
        for k, (text, ended, reason) in enumerate(written)
    ]

    def may_win(candidate):
        return int(candidate.id[-1]) >= first_winner

    drops = pairing.DropCounts()
    found = pairing.pairable(made, drops, may_win=may_win, max_chosen_length=longest)
    rules, paired = PairingConfig(max_chosen_length=longest), set[str]()
    responses = [c for c in made if c.reason is None]
    for order in permutations(range(len(responses))):
        scores = {c.id: float(place) for c, place in zip(responses, order, strict=True)}
        for pair in pairing.make_pairs(
            prompt,
            responses,
            scores,
            pairing.DropCounts(),
            pairing=rules.model_copy(update={"pick": "all_margins", "pairs_per_prompt": 99}),
        ):
            if int(pair.chosen_id[-1]) >= first_winner:
                paired |= {pair.chosen_id, pair.rejected_id}
    assert {c.id for c in found} == paired
    assert drops.prompts.total() == (not found) and drops.kept == 0
    whole = [c for c in responses if c.finished is not False]
    if found:
        assert drops.candidates.total() == len(made) - len(found)
        assert drops.candidates["identical"] == len(whole) - len(found)
    if len(whole) > 1 and len({str(c.text).strip() for c in whole}) > 1:
        none_may = not any(map(may_win, whole))
        assert drops.prompts["unpaired"] == none_may
        assert drops.prompts["too_long_chosen"] == (not found and not none_may)


PICKING = st.fixed_dictionaries(
    {
        "pick": st.sampled_from(["best_worst", "best_random", "top_bottom", "all_margins"]),
        "pairs_per_prompt": st.integers(1, 3),
        "length_control": st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        "length_penalty": st.sampled_from([0.0, 500.0]),
        "max_chosen_length": st.none() | st.integers(1, 3),
        "min_chosen_score": st.none() | st.sampled_from([1.0, 2.0]),
        "tie_break": st.sampled_from(["first", "shorter", "variance"]),
        "weight_by_margin": st.booleans(),
    }
).map(
    lambda d: {
        **d,
        "length_control": d["length_control"] if d["pick"] == "best_worst" else 0.0,
        "pairs_per_prompt": 1 if d["pick"] == "best_worst" else d["pairs_per_prompt"],
    }
)
SIZED = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 4), st.sampled_from([0.0, 1.0])),
    min_size=2,
    max_size=5,
)


def _naive_picks(sized, rules):
    """Places of chosen and rejected, as the papers say, in the order in which they are wanted."""
    places = range(len(sized))
    value = [score - rules["length_penalty"] * length / 1000 for score, length, _ in sized]
    length = [length for _, length, _ in sized]
    ties = {"first": [0] * len(sized), "shorter": length, "variance": [v for _, _, v in sized]}
    tie = ties[rules["tie_break"]]
    longer = -1 if rules["tie_break"] == "shorter" else 1
    best = sorted(places, key=lambda i: (-value[i], tie[i], i))
    worst = sorted(places, key=lambda i: (value[i], longer * tie[i], i))
    if rules["pick"] == "best_worst":
        rho, high, low = rules["length_control"], max(value), min(value)
        if rho == 0:
            return [(best[0], worst[0])]
        near = [i for i in best if value[i] >= (1 - rho) * high + rho * low]
        far = [i for i in worst if value[i] <= (1 - rho) * low + rho * high]
        shortest, longest = min(length[i] for i in near), max(length[i] for i in far)
        return [
            (
                next(i for i in near if length[i] == shortest),
                next(i for i in far if length[i] == longest),
            )
        ]
    if rules["pick"] == "best_random":  # the noise is the place
        return [(best[0], i) for i in places if i != best[0]]
    if rules["pick"] == "top_bottom":
        return [(best[j], worst[j]) for j in range(len(sized) // 2)]
    twos = [(i, j) for n, i in enumerate(best) for j in best[n + 1 :]]
    margins = sorted({value[i] - value[j] for i, j in twos}, reverse=True)
    return [(i, j) for m in margins for i, j in twos if value[i] - value[j] == m]


@over(
    "stages.pairing",
    st.tuples(SIZED, PICKING),
    mutants={
        "one.value >= high - span": "one.value > high - span",
        "one.value <= low + span": "one.value <= low",
        "sign * one.length": "one.length",
        '"variance": one.variance': '"variance": 0',
        "[: len(rated) // 2]": "[:1]",
        "key=lambda two: two[1].value - two[0].value": "key=lambda two: two[0].value - two[1].value",
        "exact(score) - each * length / 1000": "exact(score)",
        "chosen.score < least": "chosen.score <= least",
        "chosen.length > most": "chosen.length >= most",
        "if len(pairs) == pairing.pairs_per_prompt:": "if len(pairs) > pairing.pairs_per_prompt:",
        "float(abs(chosen.value - rejected.value)) if": "float(abs(chosen.score - rejected.score)) if",
        '"inverted": lambda: margin < 0': '"inverted": lambda: False',
        'f"{prompt.id}/p{len(pairs)}"': 'f"{prompt.id}/p"',
        "for _, place in drawn": "for _, place in drawn[::-1]",
        "drops.prompts[problems[0] if": "drops.prompts[problems[-1] if",
    },
    examples=1000,
)
def pickers_pick_as_their_papers_say(pairing, case):
    sized, rules = case
    prompt = Prompt("sr/0/0", 0, (7,), "say")
    made = [
        Candidate(f"sr/0/0/{k}", prompt.id, (k,), chr(97 + k) * length, True, 8)
        for k, (_, length, _) in enumerate(sized)
    ]
    drops = pairing.DropCounts()
    found = pairing.make_pairs(
        prompt,
        made,
        {c.id: float(s[0]) for c, s in zip(made, sized, strict=True)},
        drops,
        pairing=PairingConfig(**rules),
        noise=lambda record_id: int(record_id[-1]),
        variances={c.id: s[2] for c, s in zip(made, sized, strict=True)},
    )
    wanted, reasons = [], []
    for i, j in _naive_picks(sized, rules):
        (one, long, _), (other, short, _) = sized[i], sized[j]
        margin = one - other - rules["length_penalty"] * (long - short) / 1000
        refused = {
            "tie": margin == 0,
            "low_score": rules["min_chosen_score"] is not None and one < rules["min_chosen_score"],
            "too_long_chosen": long > (rules["max_chosen_length"] or 99),
            "inverted": margin < 0,
        }
        reason = next((name for name, holds in refused.items() if holds), None)
        if reason is None:
            wanted.append((made[i].id, made[j].id, margin if rules["weight_by_margin"] else None))
        else:
            reasons.append(reason)
    wanted = wanted[: rules["pairs_per_prompt"]]
    assert [(p.chosen_id, p.rejected_id, p.weight) for p in found] == wanted
    assert [p.id for p in found] == ["sr/0/0", "sr/0/0/p1", "sr/0/0/p2"][: len(found)]
    assert drops.kept == len(found)
    assert dict(drops.prompts) == ({} if found else {reasons[0]: 1})


# Judges

CONTEXT = context(Successor())
SAID = st.lists(st.tuples(SCORE, st.sampled_from(["unread", None])), max_size=2)


class _Says:
    """A judge that said this of each candidate, by ids; nothing of some."""

    def __init__(self, said):
        self.said = said

    def judge(self, ctx, prompts, candidates_PG):
        for candidate in (c for group in candidates_PG for c in group):
            for k, (score, reason) in enumerate(self.said[candidate.id]):
                reason = reason if score is None else None
                yield Judgement(f"{candidate.id}/j{k}", (candidate.id,), "says", score, reason)


@over(
    "judges.shuffled",
    st.tuples(
        st.lists(st.lists(SAID, min_size=1, max_size=4), min_size=1, max_size=4),
        st.integers(0, 99),
        st.randoms(use_true_random=False),
    ),
    mutants={
        "sorted(judged & scores.keys(), key=id_order)": "sorted(scores, key=id_order)",
        "score, text = scores[giver]": "score, text = scores[name]",
        "zip(ids, drawn, strict=True)": "zip(ids, ids[:1] * len(ids), strict=True)",
        'stable_hash(ctx.seed, "shuffled", name)': 'stable_hash("shuffled", name)',
        'reasons.get(giver, "no_score") if score is None': "reasons.get(giver) if score is None",
        "for n in j.candidate_ids}\n        # 2": "for n in j.candidate_ids if j.score}\n        # 2",
        'f"{name}/j0",': 'f"{name}/unmoved/j0",',
        "any(c.id in judged and c.id not in moved": "any(c.id in moved and c.id not in moved",
    },
    examples=300,
)
def shuffled_scores_are_the_same_numbers_whoever_has_them(shuffled, case):
    groups, seed, draw = case
    prompts = [Prompt(f"s/{row}/0", row, (1,)) for row in range(len(groups))]
    candidates_PG = [
        [Candidate(f"{p.id}/{k}", p.id, (k,), "a", True, 8) for k in range(len(group))]
        for p, group in zip(prompts, groups, strict=True)
    ]
    said = {
        c.id: of_one
        for candidates, group in zip(candidates_PG, groups, strict=True)
        for c, of_one in zip(candidates, group, strict=True)
    }
    means = {}
    for name, of_one in said.items():
        known = [score for score, _ in of_one if score is not None]
        means[name] = sum(known) / len(known) if known else None
    judge = shuffled.ShuffledJudge(_Says(said))

    def moved(seed, places):
        ctx, order = replace(CONTEXT, seed=seed), [candidates_PG[i] for i in places]
        own = list(judge.judge(ctx, [prompts[i] for i in places], order))
        draw.shuffle(own)
        return own, {j.candidate_ids[0]: j for j in judge.judge_block(ctx, order, own)}

    places = list(range(len(groups)))
    own, found = moved(seed, places)
    judged = {name for name, of_one in said.items() if of_one}
    assert found.keys() == judged
    assert Counter(j.score for j in found.values()) == Counter(means[i] for i in judged)
    for name, j in found.items():
        giver = j.text.rpartition(" ")[2]
        assert j.score == means[giver] and j.id == f"{name}/j0"
        reasons = {reason for _, reason in said[giver]} - {None} or {"no_score"}
        assert j.reason in (reasons if j.score is None else {None})
    assert moved(seed, places[::-1])[1] == found
    if len(judged) > 2:
        assert any(moved(other, places)[1] != found for other in range(seed + 1, seed + 30))
    for candidates in candidates_PG:
        scores = judge.scores(candidates, [*own, *found.values()])
        assert scores == {c.id: found[c.id].score if c.id in judged else None for c in candidates}
        if judged & {c.id for c in candidates}:
            with suppress(JudgeError):
                raise AssertionError(f"{judge.scores(candidates, own)}: nobody moved these")


# Batches

TOKEN = st.integers(0, VOCAB - 1)
ROWS = st.lists(st.lists(TOKEN, max_size=12), min_size=1, max_size=6)


@over(
    "models.batching",
    st.tuples(ROWS, TOKEN),
    mutants={
        "ids[i, : len(row)] = ": "ids[i, int(lengths.max()) - len(row) :] = ",
        "(len(rows), int(lengths.max())), pad_id": "(len(rows), int(lengths.max())), 0",
        "for row, keep in zip(ids, mask.bool(), strict=True)": "for row, keep in zip(ids, (mask * ids).bool(), strict=True)",
    },
)
def padding_and_unpadding_are_inverse(batching, case):
    rows, pad_id = case
    ids, lengths = batching.pad_rows(rows, pad_id)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    assert lengths.tolist() == [len(row) for row in rows]
    assert (ids[~mask] == pad_id).all()
    assert batching.unpad(ids, mask) == [tuple(row) for row in rows]
    assert batching.pad_masks([[True] * len(row) for row in rows]).equal(mask)


@over(
    "models.batching",
    st.tuples(
        st.lists(st.integers(0, 40), max_size=20),
        st.integers(1, 100),
        st.none() | st.integers(1, 5),
        st.booleans(),
    ),
    mutants={
        "tokens <= token_budget and": "True and",
        "len(group) < max_rows": "len(group) <= max_rows",
        "            tokens = lengths[i]\n    return": "            tokens = 0\n    return",
        "(len(group) + 1) * lengths[i] if padded": "len(group) * lengths[i] if padded",
        "groups.append([i])": "groups.append([len(groups)])",
        "key=lambda i: (lengths[i], i)": "key=lambda i: (-lengths[i], i)",
    },
    examples=600,
)
def micro_batches_are_a_partition_within_the_budget(batching, case):
    lengths, budget, max_rows, padded = case
    groups = batching.micro_batches(lengths, token_budget=budget, max_rows=max_rows, padded=padded)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths))) and all(groups)

    def size(group):
        own = [lengths[i] for i in group]
        return len(own) * max(own) if padded else sum(own)

    assert all(size(group) <= budget or len(group) == 1 for group in groups)
    assert max_rows is None or all(len(group) <= max_rows for group in groups)
    ordered = [lengths[i] for group in groups for i in group]
    assert ordered == sorted(lengths)
    for one, following in pairwise(groups):  # none could have taken one more
        assert size([*one, following[0]]) > budget or len(one) == max_rows


@st.composite
def _sharing(draw):
    """Rows of which many begin alike."""
    rows, last = [], draw(st.lists(TOKEN, min_size=1, max_size=12))
    for _ in range(draw(st.integers(1, 5))):
        kept = draw(st.integers(0, len(last)))
        own = last[:kept] + draw(st.lists(TOKEN, min_size=0 if kept else 1, max_size=8))
        rows.append(own)
        last = draw(st.sampled_from([last, own]))
    return rows, draw(st.none() | st.integers(1, 30)), draw(st.sampled_from([1, 3, 8])), draw(TOKEN)


@over(
    "models.packing",
    _sharing(),
    mutants={
        "where[row, :shared] = where[leader, :shared]": "pass",
        "torch.arange(count, count + own)": "torch.arange(count, count + own).flip(0)",
        "positions.append(torch.arange(shared, length))": "positions.append(torch.arange(0, length - shared))",
        "count += own": "count += length",
        "tokens = ids[row, :length].tolist()": "tokens = ids[row].tolist(); length = len(tokens)",
        "leader, shared = made_by[node], shared + 1": "leader, shared = row - 1, shared + 1",
        "for token in tokens[shared:]:": "for token in tokens:",
        "(leader, shared) if shared >= least": "(leader, shared) if shared > least",
        "lines = 1 if width is None else -(-count // width)": "lines = 1 if width is None else count // width + 1",
    },
    examples=600,
)
def packing_and_unpacking_are_inverse(packing, case):
    rows, width, least, pad_id = case
    ids, lengths = pad_rows(rows, pad_id)
    packed = packing.Packing(ids, lengths, torch.device("cpu"), width=width, least_shared=least)
    tokens, positions = packed.ids.flatten(), packed.positions.flatten()
    for row, places in zip(rows, packed.where, strict=True):
        assert tokens[places[: len(row)]].tolist() == row
        assert positions[places[: len(row)]].tolist() == list(range(len(row)))
    shares = []
    for k, row in enumerate(rows):
        both = (zip(row, earlier, strict=False) for earlier in rows[:k])
        alike = [len([*takewhile(lambda one: one[0] == one[1], pairs)]) for pairs in both]
        most = max(alike, default=0)
        shares.append((alike.index(most), most) if alike and most >= least else (k, 0))
    assert packing.shared_beginnings(ids, lengths, least) == shares
    assert (
        packed.count
        == sum(map(len, rows)) - sum(alike for _, alike in shares)
        == len(tokens) - packed.filled
    )
    assert width is None or (
        packed.ids.shape[1] <= width and len(packed.ids) == -(-packed.count // width)
    )
    if least == packing.LEAST_SHARED:
        assert packing.packed_length(rows) == packed.count


@cache
def _model():
    return adapt(transformer64("rotary").eval())


def _alone(rows):
    """The oracle: each row alone through the bare model, its softmax written out."""
    found = []
    for row in rows:
        with torch.no_grad():
            chances = _model().module(torch.tensor([row]))[0].softmax(-1)
        found.append([0.0] + [math.log(chances[i - 1, row[i]]) for i in range(1, len(row))])
    return found


@over(
    "models.packing",
    _sharing(),
    mutants={
        "for t in whole[part.leader])": "for t in whole[0])",
        "positions.append(torch.arange(shared, length))": "positions.append(torch.arange(0, length - shared))",
        "hidden = ~causal_mask(": "hidden = causal_mask(",
        "len(self.parts) if leader == row else part_of[leader]": "len(self.parts)",
        "part_of.append(len(self.parts) if own else part)": "part_of.append(part)",
    },
    examples=200,
)
def packing_and_padding_never_change_a_log_prob(packing, case):
    rows, _, least, pad_id = case
    model = _model()
    assert model.training is not None and model.training.packs

    def packed(ids, lengths, device, **settings):
        return packing.Packing(ids, lengths, device, least_shared=least, **settings)

    ids, lengths = pad_rows([*rows, [pad_id] * 14], pad_id)
    with patch.object(policy, "Packing", packed), torch.no_grad():
        found = Policy(model)(ids, lengths)
    for row, values, truth in zip(rows, found, _alone(rows), strict=False):
        assert torch.allclose(
            values[: len(row)], torch.tensor(truth, dtype=torch.float64), rtol=0, atol=1e-9
        )
        assert (values[len(row) :] == 0).all()


# Log-probs


@st.composite
def _logits(draw):
    b, t, v = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    scale = draw(st.sampled_from([0.0, 1.0, 50.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = scale * torch.randn(b, t, v, generator=generator, dtype=torch.float64)
    return logits, torch.randint(v, (b, t), generator=generator), draw(st.integers(1, 40))


@over(
    "models.logprobs",
    _logits(),
    mutants={
        "scores = _exact(logits[:, :-1])": "scores = _exact(logits[:, 1:])",
        "ids[:, 1:, None].long()": "ids[:, :-1, None].long()",
        "return F.pad(chosen - scores.logsumexp(dim=-1), (1, 0))": "return F.pad(chosen - scores.logsumexp(dim=-1), (0, 1))",
        "values.masked_fill(~mask, 0.0)": "values.masked_fill(mask, 0.0)",
    },
    examples=300,
)
def token_log_probs_are_those_of_a_softmax_written_out(logprobs, case):
    logits, ids, _ = case
    found = logprobs.token_logprobs(logits, ids)
    for row, tokens, values in zip(logits.tolist(), ids.tolist(), found.tolist(), strict=True):
        assert values[0] == 0.0
        for i in range(1, len(tokens)):
            most = max(row[i - 1])
            total = most + math.log(math.fsum(math.exp(x - most) for x in row[i - 1]))
            assert (
                math.isclose(values[i], row[i - 1][tokens[i]] - total, abs_tol=1e-9)
                and values[i] <= 1e-12
            )
    mask = ids % 2 == 0
    assert torch.allclose(logprobs.masked_sum(found, mask), (found * mask).sum(-1))


@over(
    "models.logprobs",
    st.tuples(_logits(), st.booleans(), st.sampled_from([1.0, 0.5]), st.none() | st.just(3.0)),
    mutants={
        "moved.scatter_add_(1, place, slopes.masked_fill(~is_here, 0.0))": "pass",
        "scores.gather(-1, place).masked_fill_(~is_here": "scores.gather(-1, place).masked_fill_(is_here",
        "shares.scatter_add_(-1, place, of_label.neg_())": "pass",
        "torch.expm1(chosen - total).neg_()": "torch.ones_like(total)",
        "1 - (scores / self.softcap).square()": "1 - (scores / self.softcap)",
        "gradient * tiles.scale, torch": "gradient, torch",
        ".sub_(mean).mul_(tiles.scale)": ".sub_(mean)",
        "(chosen - total).squeeze(-1), total": "chosen.squeeze(-1), total",
        "of_part_bias += moved.sum(dim=0)": "of_part_bias = moved.sum(dim=0)",
        "mean.mul_((before - total).exp_())": "mean",
    },
    examples=250,
)
def log_probs_in_pieces_are_those_of_whole_logits_with_their_gradients(logprobs, case):
    (hidden, ids, at_once), biased, scale, softcap = case
    states = hidden.flatten(0, 1).clone().requires_grad_()
    width, vocab = states.shape[1], 7
    generator = torch.Generator().manual_seed(at_once)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).requires_grad_()
    bias = (
        torch.randn(vocab, generator=generator, dtype=torch.float64).requires_grad_()
        if biased
        else None
    )
    head = logprobs.Head(
        lambda h: h @ weight.T + (0 if bias is None else bias), weight, bias, scale, softcap
    )
    labels = ids.flatten()
    with patch.object(logprobs, "LEAST_COLUMNS", 1 + at_once % 4):
        found = logprobs.label_logprobs(states, labels, head, vocab=vocab, logits_at_once=at_once)
    logits = scale * head.project(states)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    truth = logits.log_softmax(-1)[torch.arange(len(labels)), labels]
    assert torch.allclose(found, truth, atol=1e-9)
    parts = [t for t in (states, weight, bias) if t is not None]
    slopes = torch.arange(1.0, len(labels) + 1, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * slopes).sum(), parts),
        torch.autograd.grad((truth * slopes).sum(), parts),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-7, rtol=1e-7)


# Sampling


@st.composite
def _sampled(draw):
    """Logits a row, a uniform number, and filters; values that tie are likely."""
    values = draw(
        st.lists(st.integers(-6, 6) | st.just(-80), min_size=draw(st.integers(1, 6)), max_size=9)
    )
    filters = {
        "temperature": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 8.0])),
        "top_k": draw(st.none() | st.integers(1, 10)),
        "top_p": draw(st.none() | st.sampled_from([0.1, 0.35, 0.72, 0.9, 1.0])),
        "min_p": draw(st.none() | st.sampled_from([0.0, 0.03, 0.25, 0.9])),
    }
    return values, draw(st.integers(0, 2**20 - 1)) / 2**20, filters


def _naive_chances(values, *, temperature, top_k, top_p, min_p):
    """Token -> chance, by sorting a list: top-k, top-p, min-p; ties with the last kept one stay."""
    if temperature == 0:
        return {values.index(max(values)): 1.0}
    total = math.fsum(math.exp(v / temperature) for v in values)
    kept = {i: math.exp(v / temperature) / total for i, v in enumerate(values)}
    if top_k is not None:
        least = sorted(kept.values(), reverse=True)[min(top_k, len(kept)) - 1]
        kept = {i: p for i, p in kept.items() if p >= least}
    if top_p is not None and top_p < 1:
        whole, mass, least = math.fsum(kept.values()), 0.0, 0.0
        for p in sorted(kept.values(), reverse=True):
            if mass < top_p:
                least = p
            mass += p / whole
        kept = {i: p for i, p in kept.items() if p >= least}
    if min_p:
        most = max(kept.values())
        kept = {i: p for i, p in kept.items() if p >= min_p * most * (1 - 1e-12)}
    whole = math.fsum(kept.values())
    return {i: p / whole for i, p in kept.items()}


@over(
    "generation.sampling",
    _sampled(),
    mutants={
        "min(top_k, ordered.shape[-1]) - 1": "min(top_k, ordered.shape[-1] - 1)",
        "log_total = ordered.logsumexp(dim=-1, keepdim=True)": "pass",
        "before = mass.cumsum(dim=-1) - mass": "before = mass.cumsum(dim=-1)",
        "+ math.log(min_p)": "+ min_p",
        "torch.searchsorted(cumulative, target, right=True)": "torch.searchsorted(cumulative, target, right=False)",
        ".float()) / temperature": ".float()) * temperature",
        "target = uniform[:, None].to(total.dtype) * total": "target = uniform[:, None].to(total.dtype)",
    },
    examples=1000,
)
def a_sampled_token_is_that_of_a_sorted_list(sampling, case):
    """By the same number; where it falls on the edge between two tokens by rounding, either."""
    values, uniform, filters = case
    chances = _naive_chances(values, **filters)
    uniforms = [uniform, *(i / 32 for i in range(32))]
    logits = torch.tensor([values] * 33, dtype=torch.float64)
    found = sampling.sample_next(logits, torch.tensor(uniforms, dtype=torch.float64), **filters)
    for token, number in zip(found.tolist(), uniforms, strict=True):
        assert token in chances
        below = math.fsum(p for i, p in chances.items() if i < token)
        assert below - 1e-9 <= number <= below + chances[token] + 1e-9
    assert found[1] == min(i for i, p in chances.items() if p > 0)  # the first that there is, for 0


@over(
    "generation.sampling",
    st.tuples(st.integers(0, 2**32 - 1), st.integers(257, 400), st.integers(1, 3), _sampled()),
    mutants={
        "columns, order = columns.sort(dim=-1)": "order = torch.arange(columns.shape[-1]).expand_as(columns)",
        "short = threshold[:, 0] <= head[:, -1]": "short = threshold[:, 0] < -math.inf",
        "log_total = _scores(logits, temperature).logsumexp": "log_total = head.logsumexp",
        "rest = rest[short]": "rest = rest[:0]",
        'filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}': 'filters = {"top_k": None, "top_p": top_p, "min_p": min_p}',
    },
    examples=600,
)
def the_likeliest_of_a_large_vocabulary_give_what_all_of_it_gives(sampling, case):
    key, vocab, rows, (_, uniform, filters) = case
    generator = torch.Generator().manual_seed(key)
    spread = (0.05, 1.0, 4.0)[key % 3]
    logits = spread * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    numbers = torch.full((rows,), uniform, dtype=torch.float64)
    found = sampling.sample_next(logits, numbers, **filters)
    for row, token in zip(logits, found.tolist(), strict=True):
        chances = _naive_chances(row.tolist(), **filters)
        assert token in chances
        below = math.fsum(p for i, p in chances.items() if i < token)
        assert below - 1e-9 <= uniform <= below + chances[token] + 1e-9


@over(
    "generation.sampling",
    st.tuples(
        st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5),
        st.integers(1, 20),
        st.integers(0, 19),
    ),
    mutants={
        ">> np.uint64(11)).astype(np.float64) * 2.0**-53": ">> np.uint64(11)).astype(np.float64) * 2.0**-52",
        "np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN": "np.arange(count, 0, -1, dtype=np.uint64) * _GOLDEN",
    },
)
def noise_belongs_to_the_sample(sampling, case):
    """Number i of a key depends on both alone."""
    keys, count, place = case
    table = sampling.uniforms(np.array(keys), count)
    assert table.shape == (len(keys), count) and (table >= 0).all() and (table < 1).all()
    for key, row in zip(keys, table, strict=True):
        assert (sampling.uniforms(np.array([key]), count + place)[0, :count] == row).all()


@over(
    "records",
    st.lists(st.integers(0, 99) | st.text(max_size=3), max_size=3),
    mutants={"text = json.dumps(parts).encode()": "text = ''.join(map(str, parts)).encode()"},
)
def parts_of_a_key_are_told_apart(records, parts):
    key = records.stable_hash(*parts)
    assert 0 <= key < 2**63 and key == records.stable_hash(*parts)
    assert key != records.stable_hash(*parts, "")
    assert key != records.stable_hash(*map(repr, parts), "x")


@over(
    "generation.sampling",
    st.tuples(
        st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=1, max_size=8),
        st.floats(1.0, 3.0),
    ),
    mutants={
        "torch.where(logits > 0, logits / penalty, logits * penalty)": "logits / penalty",
        "torch.where(seen, penalised, logits)": "torch.where(seen, logits, penalised)",
    },
    examples=200,
)
def a_penalty_makes_what_was_seen_no_likelier(sampling, case):
    pairs, penalty = case
    logits = torch.tensor([[value for value, _ in pairs]], dtype=torch.float64)
    seen = torch.tensor([[was for _, was in pairs]])
    found = sampling.penalise_repetition(logits, seen, penalty)[0].tolist()
    for (value, was), new in zip(pairs, found, strict=True):
        wanted = (value / penalty if value > 0 else value * penalty) if was else value
        assert math.isclose(new, wanted, abs_tol=1e-12) and new <= value + 1e-12


# Agreement

NUMBERS = st.integers(0, 4).map(float) | st.floats(-1e6, 1e6)


def _tau(a, b):
    """Kendall's tau-b by counting pairs (scipy's is held against it in the module's own tests)."""
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i in range(len(a)) for j in range(i)]
    in_a, in_b = sum(s != 0 for s, _ in signs), sum(s != 0 for _, s in signs)
    return sum(x * y for x, y in signs) / math.sqrt(in_a * in_b) if in_a and in_b else None


def _rho(a, b):
    """Pearson's correlation of average ranks."""

    def ranks(x):
        return [sum(v < w for v in x) + (1 + sum(v == w for v in x)) / 2 for w in x]

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


@over(
    "stats",
    st.lists(st.tuples(NUMBERS, NUMBERS), max_size=7),
    mutants={
        "return products / math.sqrt(squares) if squares else None": "return products / squares if squares else None",
        "sum(y * y for y in b)": "sum(x * x for x in a)",
        "int(one > other) - int(one < other)": "int(one > other) - int(one <= other)",
        "_cosine([sum(row) for row in _signs(a)], [sum(row) for row in _signs(b)])": "_cosine([sum(row) for row in _signs(a)], [row[0] for row in _signs(b)])",
        "list(chain(*_signs(a)))": "list(chain(*_signs(b)))",
    },
    examples=400,
)
def correlations_are_symmetric_and_between_minus_one_and_one(agreement, case):
    a, b = [x for x, _ in case], [y for _, y in case]
    for measure, naive in ((agreement.kendall_tau_b, _tau), (agreement.spearman, _rho)):
        found, wanted = measure(a, b), naive(a, b)
        assert (found is None) == (wanted is None)
        if found is not None:
            assert math.isclose(found, wanted, abs_tol=1e-9) and -1 - 1e-12 <= found <= 1 + 1e-12
            assert math.isclose(found, measure(b, a), abs_tol=1e-12)
            assert math.isclose(measure([-x for x in a], b), -found, abs_tol=1e-12)
            assert math.isclose(measure(a, a), 1.0, abs_tol=1e-12)


RANKED = st.lists(
    st.tuples(st.integers(0, 3).map(float), st.none() | st.integers(0, 5).map(float)), max_size=6
)


@over(
    "evaluation.agreement",
    st.lists(RANKED, max_size=4),
    mutants={
        "(score > other) == (rank < other_rank)": "(score > other) == (rank > other_rank)",
        "elif score == other:": "elif False:",
        "if rank == other_rank:\n            continue": "if rank > other_rank:\n            continue",
        "(score > other if rank < other_rank else score < other)": "(score >= other if rank < other_rank else score <= other)",
        "return _share(self.agree, self.agree + self.disagree)": "return _share(self.agree, self.total)",
        "correlated=len(spearmans),": "correlated=len(twos),",
        "return score is not None and all(": "return all(",
        "uncorrelated=len(ordered) - len(spearmans)": "uncorrelated=len(items) - len(spearmans)",
        "if score == top_score]": "]",
    },
    examples=500,
)
def measures_of_agreement_are_shares_that_turn_round_with_the_ranks(agreement, case):
    items = [
        agreement.RankedScores(f"g{i % 2}", tuple(r for r, _ in one), tuple(s for _, s in one))
        for i, one in enumerate(case)
    ]
    back = [agreement.RankedScores(i.group, tuple(-r for r in i.ranks), i.scores) for i in items]
    found, turned = (agreement.agreement(x, top_score=5) for x in (items, back))
    shares = (
        found.best_precision,
        found.exact_match,
        found.scored,
        found.pairs.accuracy,
        found.pairs.accuracy_ties_half,
        found.pairs.tie_rate,
    )
    assert all(share is None or 0 <= share <= 1 for share in shares)
    assert (found.pairs.agree, found.pairs.disagree) == (turned.pairs.disagree, turned.pairs.agree)
    assert (found.pairs.tied, found.pairs.unscored) == (turned.pairs.tied, turned.pairs.unscored)
    pairs = [
        (one[i], one[j])
        for one in case
        for i in range(len(one))
        for j in range(i)
        if one[i][0] != one[j][0]
    ]
    assert found.pairs.total == len(pairs)
    known = [(x, y) for x, y in pairs if x[1] is not None and y[1] is not None and x[1] != y[1]]
    assert (
        found.pairs.accuracy is None
        if not known
        else math.isclose(
            found.pairs.accuracy, sum((x[1] > y[1]) == (x[0] < y[0]) for x, y in known) / len(known)
        )
    )
    assert found.pairs.accuracy is None or math.isclose(
        found.pairs.accuracy + turned.pairs.accuracy, 1
    )
    assert found.pairs.tied == sum(x[1] == y[1] is not None for x, y in pairs)
    assert (
        found.correlated + found.uncorrelated
        == found.ordered
        == sum(len({r for r, _ in one}) > 1 for one in case)
    )
    assert found.instructions == len(case) and found.replies == sum(map(len, case))
    assert found.correlated == sum(
        _tau(*zip(*k, strict=True)) is not None
        for one in case
        if (k := [x for x in one if x[1] is not None])
    )
    top = [
        (r, min(r for r, _ in one))
        for one in case
        for r, s in one
        if s == 5 and len({r for r, _ in one}) > 1
    ]
    assert found.best_count == len(top)
    for item in items:
        whole = agreement.orders_agree(item.ranks, item.scores)
        assert whole == all(agreement.agreeing(item.ranks, item.scores))
        counts = agreement.pair_counts(item)
        assert whole == (None not in item.scores and counts.agree == counts.total)


# Rows that must not be in one forward


class Remembering:
    """A cache whose logits say which rows it has; it fails when one crosses a border."""

    def __init__(self, rows, side):
        assert len({side(len(row)) for row in rows}) == 1, "rows of two sides are begun together"
        self.rows, self.begun, self.side = [list(row) for row in rows], side(len(rows[0])), side

    def logits(self):
        assert all(self.side(len(row)) == self.begun for row in self.rows), "a border was crossed"
        return torch.tensor([[sum(row), len(row), row[-1]] for row in self.rows]).double()

    def extend(self, tokens):
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self.logits()

    def select(self, rows):
        self.rows = [list(self.rows[row]) for row in rows.tolist()]

    def copy(self):
        return Remembering(self.rows, self.side)


STEP = st.integers(0, 9) | st.lists(st.integers(0, 30), min_size=1, max_size=6)


@over(
    "models.rows_apart",
    st.tuples(
        st.lists(st.integers(1, 8), min_size=1, max_size=6),
        st.lists(STEP, max_size=14),
        st.booleans(),
    ),
    mutants={
        "[i for i in places if i not in crossing]": "[i for i in places]",
        "order.argsort()": "order",
        "other.rows = [list(row) for row in self.rows]": "other.rows = self.rows",
        "other.groups = [(list(places), cache.copy())": "other.groups = [(list(places), cache)",
        "small.append(places)": "small.append([])",
        "if wanted and wanted != places:": "if False:",
    },
    examples=300,
)
def rows_apart_are_the_rows_they_should_be_and_cross_no_border(rows_apart, case):
    """A step is a token for all rows, or which of them go on."""
    lengths, steps, grows = case

    def side(length):
        return length if grows else (length > 3) + (length > 9)

    def start(rows):
        cache = Remembering(rows, side)
        return cache.logits(), cache

    def wanted(rows):
        return [[sum(row), len(row), row[-1]] for row in rows]

    rows = [[*range(1 + i, 1 + i + length)] for i, length in enumerate(lengths)]
    cache, copies = rows_apart.RowsApart(start, side, rows), []
    logits = cache.logits
    for step in [*steps, 0]:
        assert logits.tolist() == wanted(rows)
        if isinstance(step, list):
            chosen = [i % len(rows) for i in step]
            copies.append((cache.copy(), rows))
            cache.select(torch.tensor(chosen))
            rows, logits = [rows[i] for i in chosen], logits[chosen]
        else:
            copies += [(cache.copy(), rows)] * (step % 3 == 0)
            tokens = [step + i for i in range(len(rows))]
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
            logits = cache.extend(torch.tensor(tokens))
    for other, before in copies:
        after = [[*row, 1] for row in before]
        assert other.extend(torch.ones(len(after), dtype=torch.long)).tolist() == wanted(after)
