"""Examples of every kind of stage: the page, the terminal and the records say the same."""

import json
import re

import pytest

from self_rewarding_lm import (
    ContrastiveDPOConfig,
    EnsembleJudge,
    OptimConfig,
    SelfPlayConfig,
    SelfRewardSFTConfig,
)
from self_rewarding_lm.judges.consistency import ConsistencyConfig
from self_rewarding_lm.records import Candidate, Demonstration, Judgement, PreferencePair, Prompt
from self_rewarding_lm.report.examples import SAMPLE, examples, sample_rows
from self_rewarding_lm.report.figures import stage_figures
from self_rewarding_lm.report.page import write_report
from self_rewarding_lm.report.terminal import show_run
from self_rewarding_lm.stages.contrastive import Contrast
from self_rewarding_lm.stages.pairing import PairingConfig
from tests.report.test_report import Page, made_run
from tests.stages.test_temporal import temporal
from tests.test_trainer import PROMPTS, QUICK, ROWS, SHORT, external, self_reward, sft, trainer_of


def responses_of(run, stage) -> dict[str, dict]:
    """The page's responses, by the ids of their candidates."""
    found = {}
    for example in Page(write_report([run])).examples:
        if example["s"] == stage:
            found |= {f"{example['id']}/{c['n']}": c for c in example["c"]}
    return found


def prompt(name: str) -> Prompt:
    return Prompt(name, 0, (1,), "asked")


def candidate(name: str, prompt_id: str) -> Candidate:
    return Candidate(name, prompt_id, (2,), f"text of {name}", True, 8)


def judged(candidate_id: str, rest: str, score: float | None, judge: str = "j") -> Judgement:
    return Judgement(
        f"{candidate_id}/{rest}", (candidate_id,), judge, score, text=f"{score}, {judge}"
    )


def pair(prompt_id: str, chosen: str, rejected: str, scores, rest: str = "") -> PreferencePair:
    return PreferencePair(
        f"{prompt_id}{rest}", (1,), (2,), (2,), "asked", f"text of {chosen}", f"text of {rejected}",
        chosen, rejected, *scores,
    )  # fmt: skip


def one_prompt(folder, names, judgements, pairs, **more):
    """A run with a prompt s/0/0 and candidates with these names after it."""
    candidates = [candidate(f"s/0/0/{name}", "s/0/0") for name in names]
    held = {"prompts.jsonl": [prompt("s/0/0")], "candidates.jsonl": candidates}
    held |= {"judgements.jsonl": judgements, "pairs.jsonl": pairs, **more}
    return made_run(folder, {"s": held})


def test_responses_of_an_earlier_model_have_score_role_and_judgements(tmp_path):
    names = ["0", "anchor/0", "next/0"]
    judgements = [
        judged(f"s/0/0/{n}", "j0", score) for n, score in zip(names, (3.0, 1.0, 5.0), strict=True)
    ]
    pairs = [pair("s/0/0", "s/0/0/next/0", "s/0/0/anchor/0", (5.0, 1.0))]
    run = one_prompt(tmp_path / "run", names, judgements, pairs)
    [example] = Page(write_report([run])).examples
    found = [(c["n"], c["x"], c["l"], [j["x"] for j in c["j"]]) for c in example["c"]]
    assert found == [
        ("0", 3.0, None, [3.0]),
        ("anchor/0", 1.0, "rejected", [1.0]),
        ("next/0", 5.0, "chosen", [5.0]),
    ]
    assert example["m"] == 4.0
    text = show_run(run)
    assert "chosen    text of s/0/0/next/0\n          score 5 (" in text
    assert "rejected  text of s/0/0/anchor/0\n          score 1 (" in text


def test_a_filter_is_not_averaged_with_the_score_beside_it(tmp_path):
    """A member's 4 beside a filter's 100 was shown as 52."""
    judgements = [
        judged(f"s/0/0/{k}", f"{label}/j0", score, f"{label}:judge")
        for k, scores in ((0, (4.0, 100.0)), (1, (2.0, 90.0)), (2, (3.0, 100.0)))
        for label, score in zip(("m0", "m1"), scores, strict=True)
    ]
    pairs = [pair("s/0/0", "s/0/0/0", "s/0/0/1", (4.0, 2.0))]
    run = one_prompt(tmp_path / "run", "012", judgements, pairs)
    [example] = Page(write_report([run])).examples
    assert [(c["x"], c.get("w")) for c in example["c"]] == [
        (4.0, None), (2.0, None), (None, "parts of a score"),
    ]  # fmt: skip
    text = show_run(run)
    assert "score 4 of 4 (m0:judge, given), 100 (m1:judge, given)" in text
    assert "parts of a score of 3 (m0:judge, given), 100 (m1:judge, given)" in text


def test_scores_of_members_stand_apart(tmp_path):
    judgements = [
        judged("s/0/0/0", "m0/j0", 4.0, "m0:a"),
        judged("s/0/0/0", "m1/j0", 100.0, "m1:b"),
        judged("s/0/0/1", "j0", 2.0),
    ]
    run = one_prompt(tmp_path / "run", "01", judgements, [])
    histograms = stage_figures(run, "s").histograms
    assert {who: h.values for who, h in histograms.items()} == {
        "": (2.0,), "m0:a": (4.0,), "m1:b": (100.0,),
    }  # fmt: skip
    text = Page(write_report([run])).text
    assert all(f"Scores{who}" in text for who in ("", " by m0:a", " by m1:b"))


def test_what_an_earlier_model_said_counts_not(tmp_path):
    judgements = [
        judged("s/0/0/0", "j0", 4.0),
        judged("s/0/0/0", "previous/j0", 0.0, "previous:j"),
        judged("s/0/0/0", "current/j0", -9.0, "current:implicit"),
    ]
    run = one_prompt(tmp_path / "run", "0", judgements, [])
    assert [c["x"] for c in responses_of(run, "s").values()] == [4.0]
    assert "score 4 of 4 (j, given), 0 (previous:j, given), -9 (current:" in show_run(run)


def test_two_that_a_member_compared_are_each_judged(tmp_path):
    ids = ("s/0/0/0", "s/0/0/1")
    judgements = [
        Judgement(f"{ids[0]}/m0/vs/1", ids, "m0:c", 1.0, source="compared"),
        Judgement(f"{ids[1]}/m0/vs/0", ids[::-1], "m0:c", 0.0, source="compared"),
    ]
    pairs = [pair("s/0/0", *ids, (1.0, 0.0))]
    run = one_prompt(tmp_path / "run", "01", judgements, pairs)
    found = responses_of(run, "s").values()
    assert [(c["x"], c["l"], sorted(j["x"] for j in c["j"])) for c in found] == [
        (1.0, "chosen", [1.0, 1.0]),
        (0.0, "rejected", [0.0, 0.0]),
    ]
    assert [j["b"] for c in found for j in c["j"]] == [
        "m0:c, compared with 1, shown first", "m0:c, compared with 1, shown second",
        "m0:c, compared with 0, shown second", "m0:c, compared with 0, shown first",
    ]  # fmt: skip
    assert "score 1 of 1, 1" in show_run(run) and "score 0 of 0, 0" in show_run(run)


def test_pairs_of_judgements_are_shown_at_the_judgements(tmp_path):
    judgements = [judged("s/0/0/0", "j0", 5.0, "one"), judged("s/0/0/0", "j1", 1.0, "other")]
    judge_pair = pair("s/0/0", "s/0/0/0/j1", "s/0/0/0/j0", (0.5, -0.5), rest="/judge")
    run = one_prompt(tmp_path / "run", "01", judgements, [judge_pair])
    [example] = Page(write_report([run])).examples
    assert [(c["x"], c["l"]) for c in example["c"]] == [(3.0, None), (None, None)]
    assert [j.get("l") for j in example["c"][0]["j"]] == ["rejected", "chosen"]
    assert example["m"] is None  # strengths of judgements are no scores of responses
    text = show_run(run)
    assert "chosen judgement:  1.0, other" in text and "rejected judgement:  5.0, one" in text
    assert "no pair" not in text


def test_each_of_several_pairs_gives_roles(tmp_path):
    """Twelve candidates: 10 stands behind 9, not behind 1."""
    names = [str(k) for k in range(12)]
    judgements = [judged(f"s/0/0/{k}", "j0", float(k)) for k in names]
    pairs = [
        pair("s/0/0", "s/0/0/11", "s/0/0/0", (11.0, 0.0)),
        pair("s/0/0", "s/0/0/10", "s/0/0/1", (10.0, 1.0), rest="/p1"),
    ]
    run = one_prompt(tmp_path / "run", names, judgements, pairs)
    [example] = Page(write_report([run])).examples
    assert [c["n"] for c in example["c"]] == names and example["m"] == 11.0
    roles = {c["n"]: c["l"] for c in example["c"] if c["l"]}
    assert roles == {"0": "rejected", "1": "rejected", "10": "chosen", "11": "chosen"}
    assert re.findall(r"(?m)^(chosen|rejected)", show_run(run)) == [
        "rejected", "rejected", "chosen", "chosen",
    ]  # fmt: skip


def test_demonstrations_stand_behind_the_replies_that_were_judged_for_them(tmp_path):
    made = Demonstration("s/0/0", (1,), (2,), "judge this", "score: 5", ("s/0", "s/0/0/0"))
    answer = Demonstration("s/0/0/1", (1,), (2,), "asked", "text of s/0/0/1")
    judgements = [judged("s/0/0/0", "j0", 5.0)]
    more = {"demonstrations.jsonl": [made, answer]}
    run = one_prompt(tmp_path / "run", "01", judgements, [], **more)
    first, second = Page(write_report([run])).examples
    assert [c["l"] for c in first["c"]] == [None, "learnt"]
    assert (second["p"], [c["t"] for c in second["c"]]) == ("judge this", ["score: 5"])
    text = show_run(run)
    assert "learnt    text of s/0/0/1" in text and "learnt    score: 5" in text


def test_a_pair_whose_responses_another_stage_sampled_is_shown_whole(tmp_path):
    pairs = [pair("dpo/0", "other/0/0/1", "other/0/0/0", (2.0, 1.0))]
    run = made_run(tmp_path / "run", {"dpo": {"pairs.jsonl": pairs}})
    [example] = Page(write_report([run])).examples
    assert [(c["n"], c["x"], c["l"]) for c in example["c"]] == [
        ("other/0/0/1", 2.0, "chosen"),
        ("other/0/0/0", 1.0, "rejected"),
    ]
    text = show_run(run)
    assert "chosen    text of other/0/0/1" in text and "rejected  text of other/0/0/0" in text


def test_samples_for_trackers_say_what_the_page_says(tmp_path):
    judgements = [judged("s/0/0/anchor/0", "j0", 1.0)]
    pairs = [pair("s/0/0", "s/0/0/0", "s/0/0/anchor/0", (2.0, 1.0))]
    run = one_prompt(tmp_path / "run", ["0", "anchor/0"], judgements, pairs)
    rows = [dict(zip(SAMPLE, row, strict=True)) for row in sample_rows(run, "s", 8)]
    assert [(r["role"], r["score"], r["judge"]) for r in rows] == [
        ("chosen", "2.0", ""),
        ("rejected", "1.0", "1.0, j"),
    ]


def total(ids):
    return ids.double().sum(dim=-1)


def letters(prompts, completions):
    return [float(len(set(text))) for text in completions]


def even(prompts, completions):
    return [100.0 - len(set(text)) % 2 for text in completions]


def ensemble():
    return EnsembleJudge([(total, 2), letters], filters=[(even, 100)])


CONTRAST = Contrast(kind="prefix", positive="say aa ", negative="say bb ")
QUIET = dict(generation=SHORT, dropout=0.0, optim=QUICK)
STAGES = {
    "temporal": lambda: [sft(), temporal()],
    "temporal of an ensemble": lambda: [temporal(judge=ensemble(), optim=OptimConfig(batch_size=64))],
    "ensemble": lambda: [external(reward_model=ensemble())],
    "several judgements": lambda: [self_reward(num_sampled_reward_responses=3)],
    "rounds": lambda: [self_reward(rounds=2)],
    "several pairs": lambda: [
        external(
            pairing=PairingConfig(pick="top_bottom", pairs_per_prompt=2), num_candidate_responses=12
        )
    ],
    "consistency": lambda: [
        sft(), external(reward_model=ensemble(), consistency=ConsistencyConfig(by="implicit")),
    ],
    "contrastive": lambda: [
        ContrastiveDPOConfig(prompt_dataset=PROMPTS, contrasts=(CONTRAST,), **QUIET)
    ],
    "spin": lambda: [SelfPlayConfig(train_dataset=ROWS, iterations=2, **QUIET)],
    "top-scored": lambda: [
        SelfRewardSFTConfig(prompt_dataset=PROMPTS, judging=SHORT, min_score=3.0, **QUIET)
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", STAGES)
def test_page_and_terminal_show_the_pairs_and_judgements_on_disk(tmp_path, kind):
    run = trainer_of(tmp_path, STAGES[kind]())(rehearse=False)
    stage = run.stages[-1]
    shown = responses_of(run, stage)
    candidates = {c.id for c in run.candidates(stage)}
    assert candidates <= set(shown)
    told = {name: [] for name in candidates}
    for judgement in run.judgements(stage):
        for name in judgement.candidate_ids:
            told[name].append(judgement.text)
    for name in candidates:
        assert sorted(map(str, told[name])) == sorted(str(j["t"]) for j in shown[name]["j"])
    learnt = {made.id for made in run.demonstrations(stage)}
    assert {name for name, c in shown.items() if c["l"] == "learnt"} == learnt
    pairs, seen = run.pairs(stage), set()
    assert len(pairs) or learnt
    text = show_run(run, stage=stage, prompts=len(run.prompts(stage)))
    for made in pairs:
        for name, role, score in (
            (made.chosen_id, "chosen", made.chosen_score),
            (made.rejected_id, "rejected", made.rejected_score),
        ):
            if name is None or name in seen:
                continue
            seen.add(name)
            assert shown[name]["l"] == role
            assert shown[name]["x"] == (None if score is None else pytest.approx(score, rel=1e-5))
    assert len(re.findall(r"(?m)^(chosen|rejected)  ", text)) == sum(
        c["l"] in ("chosen", "rejected") for c in shown.values()
    )


def test_examples_are_read_when_they_are_asked_for(tmp_path):
    run = trainer_of(tmp_path, [self_reward()])(rehearse=False)
    found = examples(run, "self_reward")
    assert len(found) == len(run.prompts("self_reward"))
    assert [e.id for e in found[:2]] == [p.id for p in run.prompts("self_reward")[:2]]
    page = Page(write_report([run])).examples
    assert json.dumps([e["id"] for e in page]) == json.dumps([e.id for e in found])
