"""Judge examples of two replies: which are compared, which verdicts are kept, and rounds on them."""

import sys
from collections import Counter

import pytest
import torch

from self_rewarding_lm import (
    BuildEFTConfig,
    ComparisonConfig,
    DPOConfig,
    PreferencePair,
    Run,
    SamplingConfig,
    SelfRewardDPOConfig,
    from_stage,
)
from self_rewarding_lm.data.ranked import ranked_row
from self_rewarding_lm.errors import ConfigError, DataError, JudgeError
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.records import stable_hash
from self_rewarding_lm.stages.eft import thinned
from tests.stages.test_eft import IFT, QUICK, Told, counted, model64, sft, trainer_of
from tests.support.models import END, ids_of
from tests.support.processes import two

COMPARISON = ComparisonConfig(
    prompt_template="of <{{ prompt }}> is <{{ response_a }}> or <{{ response_b }}>?",
    labels=("1", "2"),
    tie_label="0",
    verdict_prefix="best: ",
)
RANKED = [
    {"prompt": "one", "chosen": "a", "rejected": "b"},
    {"prompt": "two", "replies": ["c", "d", "e"], "ranks": [1, 0, 1]},  # c and e are not compared
    {"prompt": "six", "replies": ["f", "g", "h"]},
]
PAIRS = {  # by id: the better and the worse reply
    "eft/0/0/0/vs/1": "ab",
    "eft/1/0/1/vs/0": "dc",
    "eft/1/0/1/vs/2": "de",
    "eft/2/0/0/vs/1": "fg",
    "eft/2/0/0/vs/2": "fh",
    "eft/2/0/1/vs/2": "gh",
}
ASKED = {"0": "one", "1": "two", "2": "six"}


def better_first(pair_ids, seed=0) -> set[str]:
    """Every other pair in the order of their hashes, beginning with the first."""
    in_order = sorted(pair_ids, key=lambda i: stable_hash(seed, "order", i))
    return {pair_id for place, pair_id in enumerate(in_order) if place % 2 == 0}


FIRST = better_first(PAIRS)


def eft(**options):
    defaults = dict(
        ranked_dataset=RANKED,
        method="comparisons",
        comparison=COMPARISON,
        num_judgements=3,
        max_score_share=None,
    )
    return BuildEFTConfig(**{**defaults, **options})


def right(pair_id, text="best: {}") -> str:
    return text.format("1" if pair_id in FIRST else "2")


def wrong(pair_id) -> str:
    return "best: " + ("2" if pair_id in FIRST else "1")


SAID = {
    "eft/0/0/0/vs/1": [wrong("eft/0/0/0/vs/1"), right("eft/0/0/0/vs/1", "well. best: {}"), "no"],
    "eft/1/0/1/vs/0": [right("eft/1/0/1/vs/0"), wrong("eft/1/0/1/vs/0"), "no"],
    "eft/1/0/1/vs/2": ["best: 0", wrong("eft/1/0/1/vs/2"), "who knows"],  # a tie is not right
    "eft/2/0/0/vs/1": ["no", "no", "no"],
    "eft/2/0/0/vs/2": [right("eft/2/0/0/vs/2")] * 3,
    "eft/2/0/1/vs/2": ["hm", "hm", right("eft/2/0/1/vs/2", "at last. best: {}")],
}


def shown(pair_id) -> str:
    one, other = PAIRS[pair_id] if pair_id in FIRST else PAIRS[pair_id][::-1]
    return f"of <{ASKED[pair_id[4]]}> is <{one}> or <{other}>?"


def test_the_first_right_verdict_of_each_pair_becomes_its_demonstration(tmp_path):
    engine = Told(SAID)
    run = trainer_of(tmp_path, [eft()], engine=engine)(rehearse=False)
    made = {d.id: d for d in run.demonstrations("eft")}
    assert {name: d.completion for name, d in made.items()} == {
        "eft/0/0/0/vs/1": SAID["eft/0/0/0/vs/1"][1],
        "eft/1/0/1/vs/0": SAID["eft/1/0/1/vs/0"][0],
        "eft/2/0/0/vs/2": SAID["eft/2/0/0/vs/2"][0],
        "eft/2/0/1/vs/2": SAID["eft/2/0/1/vs/2"][2],
    }
    for pair_id, d in made.items():
        assert d.prompt == shown(pair_id) and d.prompt_ids == ids_of(shown(pair_id))
        assert d.completion_ids == (*ids_of(d.completion), END)
        assert d.prompt_ids == engine.asked[d.parents[-1]]  # what is learnt is what was asked
    replies = [f"eft/2/0/{i}" for i in ((0, 2) if "eft/2/0/0/vs/2" in FIRST else (2, 0))]
    assert made["eft/2/0/0/vs/2"].parents == ("eft/2", *replies, "eft/2/0/0/vs/2/j0")
    assert set(engine.asked) == {f"{pair_id}/j{k}" for pair_id in PAIRS for k in range(3)}
    judged = run.judgements("eft")
    assert len(judged) == 18 and {j.source for j in judged} == {"compared"}


def test_a_judgement_that_was_cut_off_is_not_taught(tmp_path):
    pair_id = "eft/2/0/0/vs/2"
    said = {**SAID, pair_id: [right(pair_id, "best: {}. as"), right(pair_id), "no"]}
    engine = Told(said, cut={f"{pair_id}/j0"})
    run = trainer_of(tmp_path, [eft()], engine=engine)(rehearse=False)
    first, second = (j for j in run.judgements("eft") if j.id in (f"{pair_id}/j0", f"{pair_id}/j1"))
    assert first.score == second.score and first.finished is False
    made = {d.id: d.parents[-1] for d in run.demonstrations("eft")}
    assert made[pair_id] == f"{pair_id}/j1"


def test_half_of_the_pairs_show_the_better_reply_first(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(21)]
    ids = [f"eft/{i}/0/0/vs/1" for i in range(21)]
    sides = {}
    for seed in range(3):
        engine = Told({})
        engine.texts = {stable_hash(seed, f"{i}/j0"): (f"{i}/j0", "best: 1") for i in ids}
        stage = eft(ranked_dataset=rows, num_judgements=1)
        trainer = trainer_of(tmp_path / str(seed), [stage], engine=engine, seed=seed)
        run = trainer(rehearse=False)
        first = {d.id for d in run.demonstrations("eft")}  # it always says the first
        assert first == better_first(ids, seed) and len(first) == 11
        sides[seed] = frozenset(first)
    assert len(set(sides.values())) == 3  # the seed says which


def test_the_counts_are_those_made_by_hand(tmp_path, caplog):
    caplog.set_level("INFO", "self_rewarding_lm")
    run = trainer_of(tmp_path, [eft()], engine=Told(SAID), quiet=False)(rehearse=False)
    found = counted(run)
    # verdicts that could be read, by pair: right of all
    read = {"eft/0/0/0/vs/1": (1, 2), "eft/1/0/1/vs/0": (1, 2), "eft/1/0/1/vs/2": (0, 2)}
    read |= {"eft/2/0/0/vs/2": (3, 3), "eft/2/0/1/vs/2": (1, 1)}
    for name, inside in (("first", True), ("second", False)):
        counts = [n for pair_id, n in read.items() if (pair_id in FIRST) == inside]
        assert counts
        share = sum(n for n, _ in counts) / sum(n for _, n in counts)
        assert found.pop(f"right_better_{name}") == pytest.approx(share)
    verdicts = Counter("1" if i in FIRST else "2" for i in ("eft/0/0/0/vs/1", "eft/1/0/1/vs/0"))
    verdicts += Counter("1" if i in FIRST else "2" for i in ("eft/2/0/0/vs/2", "eft/2/0/1/vs/2"))
    assert found == {
        "instructions": 3,
        "replies": 8,
        "pairs": 6,
        "parsed": 5,
        "agreed": 4,
        "too_long": 0,
        "kept": 4,
        "scores_before": dict(verdicts),
        "scores_after": dict(verdicts),
    }
    assert run.summary("eft")["metrics"]["judge/parse_rate"] == 10 / 18
    assert "6 pairs of 3 instructions, 5 with a verdict that could be read, 4 with a right one" in (
        caplog.text
    )


def test_both_verdicts_are_kept_equally_often(tmp_path):
    ids = [f"eft/{i}/0/0/vs/1" for i in range(20)]
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(20)]
    first = better_first(ids)
    knows = set(sorted(set(ids) - first)[:3])  # of those shown second it finds three
    said = {i: ["best: 1" if i in first else "best: 2" if i in knows else "no"] for i in ids}
    stage = eft(ranked_dataset=rows, num_judgements=1, max_score_share=0.5)
    run = trainer_of(tmp_path, [stage], engine=Told(said))(rehearse=False)
    assert counted(run)["scores_before"] == {"1": 10, "2": 3}
    assert counted(run)["scores_after"] == {"1": 3, "2": 3} and counted(run)["kept"] == 6
    assert {d.id for d in run.demonstrations("eft")} - first == knows


def test_a_judge_that_names_one_place_alone_teaches_nothing(tmp_path):
    said = {pair_id: ["best: 1"] for pair_id in PAIRS}
    stage = eft(num_judgements=1, max_score_share=0.5)
    with pytest.raises(JudgeError, match="max_score_share=None") as caught:
        trainer_of(tmp_path, [stage], engine=Told(said))(rehearse=False)
    assert "100% right where the better is shown first" in str(caught.value)
    assert "0% right where the better is shown second" in str(caught.value)
    assert "Verdicts before thinning: 3 x 1; after: none" in str(caught.value)


def test_thinning_counts_scores_that_none_has_where_it_is_told_of_them():
    ones = {f"s/{i}": 1.0 for i in range(4)}
    options = dict(seed=0, max_share=0.5, max_per_score=None)
    assert thinned(ones, **options) == set(ones)
    assert thinned(ones, **options, scores=(0.0, 1.0)) == set()
    both = ones | {"t/0": 0.0, "t/1": 0.0}
    kept = thinned(both, **options, scores=(0.0, 1.0))
    assert Counter(both[i] for i in kept) == {1.0: 2, 0.0: 2}


def test_the_paper_draws_fifteen_and_three_are_drawn_to_score():
    assert eft(num_judgements=None).attempts == 15
    assert eft(num_judgements=None, method="judgements").attempts == 3
    assert eft(num_judgements=2).attempts == 2


# -- rows ------------------------------------------------------------------------------------------


def test_pairs_of_an_earlier_stage_are_known_better_replies(tmp_path):
    rows = [{"prompt": "one", "chosen": "a", "rejected": "b"}]
    dpo = DPOConfig(train_dataset=rows, dropout=0.0, optim=QUICK, num_train_steps=1)
    more = SelfRewardDPOConfig(  # its pairs are on disk with their texts
        prompt_dataset=["q"], judge=Lengths(), generation=WILD, dropout=0.0, optim=QUICK
    )
    stages = [dpo, more, eft(ranked_dataset=from_stage("self_reward"), min_kept=0)]
    engine = Verdicts(["eft/0/0/0/vs/1"], attempts=3)
    run = trainer_of(tmp_path, stages, engine=engine)()
    (pair,) = run.pairs("self_reward")
    (made,) = run.demonstrations("eft")
    assert made.prompt == f"of <q> is <{pair.chosen}> or <{pair.rejected}>?"
    assert made.completion == "best: 1"


def test_a_pair_is_a_ranked_row_where_it_has_texts():
    pair = PreferencePair("dpo/0", (1,), (2,), (3,), "p", "c", "r")
    found = ranked_row(pair, "row 0")
    assert (found.prompt, found.replies, found.ranks) == ("p", ("c", "r"), (0.0, 1.0))
    talk = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    found = ranked_row(PreferencePair("dpo/0", (1,), (2,), (3,), "t", "c", "r", messages=talk), "")
    assert found.prompt == talk
    with pytest.raises(DataError, match="row 0"):
        ranked_row(PreferencePair("dpo/0", (1,), (2,), (3,)), "row 0")


def test_a_comparison_that_fills_the_model_is_refused_and_no_reward_prompt_is_looked_at(tmp_path):
    model = model64()
    model.max_seq_len = len("of <> is <> or <>?") + 16  # and nothing for what is compared
    with pytest.raises(JudgeError, match="no room"):
        trainer_of(tmp_path, [eft()], model)
    assert eft().reward_names() == ()
    with pytest.raises(ConfigError, match="method"):
        eft(method="comparison")


# -- runs ------------------------------------------------------------------------------------------


def soon(logits):
    """The end token is likelier, so that responses end."""
    more = torch.zeros_like(logits)
    more[:, END] = 4.0
    return logits + more


WILD = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=40, filter_fn=soon)


class Lengths:
    """The longer response is the better one; each two differ by their place at least."""

    def judge(self, ctx, prompts, candidates_PG):
        from self_rewarding_lm import Judgement

        for candidates in candidates_PG:
            for place, c in enumerate(candidates):
                yield Judgement(f"{c.id}/j0", (c.id,), "lengths", len(c.ids) + place / 10)


class Verdicts(LocalEngine):
    """The library's engine, which answers comparisons of some pairs rightly and says no others."""

    def __init__(self, pair_ids, *, attempts: int, stop_after: int | None = None) -> None:
        super().__init__()
        first = {  # each stage's pairs are ordered by themselves
            i
            for stage in {i.split("/")[0] for i in pair_ids}
            for i in better_first([i for i in pair_ids if i.split("/")[0] == stage])
        }
        said = {i: [f"best: {1 if i in first else 2}"] * attempts for i in pair_ids}
        self.told = Told(said, stop_after=stop_after)

    def generate(self, model, requests, decoding):
        if all(request.key in self.told.texts for request in requests):
            yield from self.told.generate(model, requests, decoding)
        else:
            yield from super().generate(model, requests, decoding)


def rounds(known):
    """Two rounds: preferences, judge examples by the model as it is then, and SFT of the seed."""
    stages = []
    for i in (1, 2):
        stages += [
            SelfRewardDPOConfig(
                name=f"answers{i}",
                prompt_dataset=["tell 0", "tell 1"],
                judge=Lengths(),
                generation=WILD,
                dropout=0.0,
                optim=QUICK,
                reuse_prompts=True,
            ),
            eft(name=f"judged{i}", ranked_dataset=known, max_score_share=0.5),
            sft(
                name=f"m{i}",
                init_from="initial",
                train_dataset=[IFT, from_stage(f"judged{i}")],
            ),
        ]
    return stages


def test_two_rounds_with_judge_examples_of_each_in_the_sft_of_the_round(tmp_path):
    """docs/judging.md, training the judge: the demonstrations of a round are in its SFT, which
    begins at the seed; the preference stage after it begins at that."""
    known = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(6)]
    pair_ids = [f"judged{n}/{i}/0/0/vs/1" for n in (1, 2) for i in range(6)]
    model = model64()
    trainer = trainer_of(tmp_path, rounds(known), model, engine=Verdicts(pair_ids, attempts=3))
    run = trainer()
    for n in (1, 2):
        made, rows = run.demonstrations(f"judged{n}"), run.rows(f"m{n}")
        assert len(made) == 6 and len(rows) == len(IFT) + 6
        learnt = [(*d.prompt_ids, *d.completion_ids) for d in made]
        assert [row.ids for row in rows[len(IFT) :]] == learnt
        assert Counter(d.completion for d in made) == {"best: 1": 3, "best: 2": 3}
    # the last stage begins at the seed: it is SFT of M0 on its rows, whatever came before
    by_hand = [(list(r.ids), [not t for t in r.targets]) for r in run.rows("m2")]
    alone = model64()
    trainer_of(tmp_path / "alone", [sft(name="m2", train_dataset=by_hand)], alone)()
    for name, value in model.state_dict().items():
        assert (value == alone.state_dict()[name]).all(), name
    # and the second round's answers are those of m1, not of the seed
    first = {c.ids for c in run.candidates("answers1")}
    assert {c.ids for c in run.candidates("answers2")} != first


def test_a_stopped_stage_asks_only_for_what_is_missing(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(50)]
    ids = [f"eft/{i}/0/0/vs/1" for i in range(50)]
    stage = eft(ranked_dataset=rows)
    whole = trainer_of(tmp_path / "whole", [stage], engine=Verdicts(ids, attempts=3))
    straight = whole(rehearse=False)
    stopped = Verdicts(ids, attempts=3, stop_after=100)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "run", [stage], engine=stopped)(rehearse=False)
    kept = {j.id for j in Run.open(tmp_path / "run").judgements("eft")}
    later = Verdicts(ids, attempts=3)
    run = trainer_of(tmp_path / "run", [stage], engine=later)(rehearse=False)
    assert len(kept) == 100 and len(later.told.asked) == 50
    assert not kept & set(later.told.asked)
    assert run.demonstrations("eft") == straight.demonstrations("eft")
    assert run.summary("eft")["metrics"] == straight.summary("eft")["metrics"]


MANY = [{"prompt": f"q{i}", "replies": ["good", "fair", "bad"][: 2 + i % 2]} for i in range(9)]
MANY_PAIRS = [
    f"eft/{i}/0/{a}/vs/{b}"
    for i in range(9)
    for a, b in ((0, 1), (0, 2), (1, 2))[: 1 + 2 * (i % 2)]
]


def main(folder: str) -> None:
    """What each of two processes runs, and one alone."""
    stages = [
        eft(ranked_dataset=MANY, max_score_share=0.5),
        sft(train_dataset=from_stage("eft")),
    ]
    engine = Verdicts(MANY_PAIRS, attempts=3)
    trainer_of(folder, stages, engine=engine, accelerate_kwargs=dict(cpu=True))(rehearse=False)


def test_two_processes_make_what_one_makes(tmp_path):
    main(str(tmp_path / "one"))
    two("-m", "tests.stages.test_eft_comparisons", tmp_path / "two")
    alone, together = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for records in ("prompts", "candidates", "judgements", "demonstrations"):
        found = getattr(alone, records)("eft")
        assert found and found == getattr(together, records)("eft")
    assert alone.metrics("eft") == together.metrics("eft")
    assert alone.rows("sft") == together.rows("sft")


if __name__ == "__main__":
    main(sys.argv[1])
