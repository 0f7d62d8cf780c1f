"""Judge examples from human rankings: what is accepted, thinned and taught, and whole runs on it."""

import itertools
import sys
from collections import Counter
from fractions import Fraction

import pytest
import torch

from self_rewarding_lm import (
    BuildEFTConfig,
    OptimConfig,
    RewardConfig,
    Run,
    SamplingConfig,
    SelfRewardingTrainer,
    SFTConfig,
    from_stage,
)
from self_rewarding_lm.errors import ConfigError, DataError, JudgeError
from self_rewarding_lm.generation.engine import Completion
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.records import Demonstration, RankedReplies, stable_hash
from self_rewarding_lm.stages.eft import first_agreeing, score_targets, scores_of_ranks, thinned
from tests.support.models import (
    ALPHABET,
    END,
    TEXT_VOCAB,
    Recurrent,
    encode,
    ids_of,
    lively,
    untrained,
)
from tests.support.processes import two

REWARD = RewardConfig(
    prompt_template="rate <{{ prompt }}> and <{{ response }}>:",
    reward_regex_template="Score: {{ reward }}",
    score_range=(0, 5),
)
QUICK = OptimConfig(batch_size=4, learning_rate=1e-2)
IFT = [{"prompt": f"say {i}", "completion": f"i say {i}"} for i in range(3)]
RANKED = [
    {"prompt": "one", "replies": ["a", "b"]},
    {"prompt": "two", "replies": ["c", "d", "e"]},
    {"prompt": "six", "replies": ["f", "g"]},
]
SAID = {
    # the first attempt is a tie, the second agrees, the third would too
    "eft/0/0/0": ["Score: 4", "fine. Score: 4", "Score: 5"],
    "eft/0/0/1": ["Score: 4", "short. Score: 3", "Score: 0"],
    # the first attempt agrees
    "eft/1/0/0": ["best. Score: 5", "no", "no"],
    "eft/1/0/1": ["well. Score: 4", "no", "no"],
    "eft/1/0/2": ["Score: 3", "no", "no"],
    # once against people, once without a score, once a tie
    "eft/2/0/0": ["Score: 1", "Score: 4", "Score: 2"],
    "eft/2/0/1": ["Score: 2", "who knows", "Score: 2"],
}


def decode(ids):
    """The end token, a token like any other where none is named, is read as a space."""
    return "".join((ALPHABET + " ")[i] for i in ids.tolist())


class Told(LocalEngine):
    """An engine that answers with the text of the judgement whose noise is asked for.

    stop_after: it fails after so many answers, as a machine that is switched off. cut: judgements
    that are cut off at the end of their text.
    """

    def __init__(
        self, said, *, stop_after: int | None = None, encode=encode, end=END, cut=()
    ) -> None:
        super().__init__()
        self.cut = cut
        names = [(f"{c}/j{k}", text) for c, texts in said.items() for k, text in enumerate(texts)]
        self.texts = {stable_hash(0, name): (name, text) for name, text in names}
        self.stop_after, self.encode, self.end = stop_after, encode, end
        self.asked: dict[str, tuple[int, ...]] = {}

    def generate(self, model, requests, decoding):
        for i, request in enumerate(requests):
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            name, text = self.texts[request.key]
            assert name not in self.asked
            self.asked[name] = request.ids
            ids, is_whole = self.encode(text).tolist(), name not in self.cut
            yield i, Completion((*ids, self.end) if is_whole else tuple(ids), is_whole)


def model64(seed: int = 0) -> torch.nn.Module:
    return lively(Recurrent(TEXT_VOCAB).double(), seed)


def trainer_of(folder, stages, model=None, **options):
    settings = dict(
        tokenizer_encode=encode,
        tokenizer_decode=decode,
        self_reward_prompt_config=REWARD,
        checkpoints_folder=folder,
        eos_id=END,
        quiet=True,
    )
    model = model64() if model is None else model
    return SelfRewardingTrainer(model, finetune_configs=stages, **{**settings, **options})


def eft(**options):
    return BuildEFTConfig(**{**dict(ranked_dataset=RANKED, max_score_share=None), **options})


def ranks(**options):
    return eft(**{**dict(method="ranks"), **options})


def sft(**options):
    return SFTConfig(**{**dict(train_dataset=IFT, dropout=0.0, optim=QUICK), **options})


def counted(run, stage="eft") -> dict:
    found = run.summary(stage)["metrics"]
    return {k.removeprefix("eft/"): v for k, v in found.items() if k.startswith("eft/")}


# --- which judgements agree with people ---


def naive_order_agrees(ranks, scores) -> bool:
    """Sorting by rank, then asking every pair."""
    if None in scores:
        return False
    pairs = itertools.combinations(sorted(zip(ranks, scores, strict=True)), 2)
    return all(a[0] == b[0] or a[1] > b[1] for a, b in pairs)


@pytest.mark.parametrize("ranks", [(0, 1, 2), (0, 1, 1), (2, 0, 1), (1, 0, 0)])
def test_an_attempt_counts_for_all_replies_or_for_none(ranks):
    for scores in itertools.product((None, 1.0, 2.0, 3.0), repeat=3):
        picked = first_agreeing(ranks, [scores], accept="instruction")
        assert picked == ([0] * 3 if naive_order_agrees(ranks, scores) else [None] * 3)


@pytest.mark.parametrize("ranks", [(0, 1, 2), (0, 1, 1), (2, 0, 1), (1, 0, 0)])
def test_leniently_each_reply_is_compared_with_the_others_that_have_a_score(ranks):
    for scores in itertools.product((None, 1.0, 2.0, 3.0), repeat=3):
        picked = first_agreeing(ranks, [scores], accept="reply")
        for i, place in enumerate(picked):
            rivals = [
                j for j in range(3) if scores[j] is not None and ranks[j] != ranks[i] and j != i
            ]
            right = (
                [(scores[i] - scores[j]) * (ranks[j] - ranks[i]) > 0 for j in rivals]
                if (scores[i] is not None)
                else []
            )
            assert place == (0 if right and all(right) else None), (scores, picked)


def test_the_first_attempt_that_agrees_is_taken():
    attempts = [(1.0, 2.0), (3.0, 3.0), (4.0, 1.0), (5.0, 0.0)]
    assert first_agreeing((0, 1), attempts, accept="instruction") == [2, 2]
    assert first_agreeing((0, 1), attempts[:2], accept="instruction") == [None, None]
    lenient = first_agreeing((0, 1, 2), [(None, 3.0, 3.0), (4.0, 2.0, 2.0)], accept="reply")
    assert lenient == [1, None, None]
    assert first_agreeing((0, 1, 2), [(4.0, 2.0, 3.0), (1.0, 5.0, 0.0)], accept="reply") == [
        0,
        None,
        1,
    ]


# --- thinning ---


def brute_cap(counts, share) -> int:
    """The highest cap with which no score has more than its share, by trying all."""
    share = max(share, Fraction(1, len(counts)))
    caps = range(max(counts), 0, -1)
    return next(c for c in caps if min(c, max(counts)) <= share * sum(min(n, c) for n in counts))


def test_thinning_keeps_as_much_as_the_share_lets_it():
    for counts in itertools.product(range(1, 9, 2), range(0, 9, 2), range(0, 5)):
        scores = {f"s/{s}/{i}": float(s) for s, n in enumerate(counts) for i in range(n)}
        there = [n for n in counts if n]
        for share in (Fraction(1, 10), Fraction(1, 3), Fraction(2, 5), Fraction(1, 2), Fraction(1)):
            kept = thinned(scores, seed=0, max_share=float(share), max_per_score=None)
            cap = brute_cap(there, share)
            found = Counter(scores[i] for i in kept)
            assert [found[s] for s in range(3)] == [min(n, cap) for n in counts], (counts, share)


def test_thinning_by_hand():
    scores = {f"4/{i}": 4.0 for i in range(6)} | {"3/0": 3.0, "3/1": 3.0, "1/0": 1.0}

    def kept(share, most=None):
        found = thinned(scores, seed=0, max_share=share, max_per_score=most)
        return sorted(Counter(scores[i] for i in found).items())

    assert kept(None) == [(1.0, 1), (3.0, 2), (4.0, 6)]
    assert kept(0.5) == [(1.0, 1), (3.0, 2), (4.0, 3)]  # 3 of 6
    assert kept(0.4) == [(1.0, 1), (3.0, 2), (4.0, 2)]  # 2 of 5
    assert kept(0.1) == [(1.0, 1), (3.0, 1), (4.0, 1)]  # three scores: at least a third each
    assert kept(None, 1) == kept(0.1)  # equal caps
    assert kept(0.5, 2) == kept(0.4)
    same = {f"s/{i}": 4.0 for i in range(5)}
    assert thinned(same, seed=0, max_share=0.5, max_per_score=None) == set(same)
    assert thinned({}, seed=0, max_share=0.5, max_per_score=2) == set()


def test_which_ones_are_discarded_depends_on_seed_and_id_alone():
    scores = {f"s/{i}": float(i % 3 > 0) for i in range(30)}
    backwards = dict(reversed(scores.items()))
    options = dict(max_share=None, max_per_score=5)
    kept = thinned(scores, seed=0, **options)
    assert kept == thinned(backwards, seed=0, **options) and len(kept) == 10
    assert len({frozenset(thinned(scores, seed=s, **options)) for s in range(5)}) == 5
    more = thinned(scores, seed=0, max_share=None, max_per_score=6)
    assert kept < more  # a higher cap takes nothing away


# --- scores of ranks ---


def test_ranks_are_spread_over_the_scores_from_best_to_worst():
    allowed = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    assert scores_of_ranks((0, 1), allowed) == [5, 0]
    assert scores_of_ranks((0, 1, 2), allowed) == [5, 3, 0]  # 2.5 is rounded up
    assert scores_of_ranks((0, 1, 2, 3), allowed) == [5, 3, 2, 0]  # 3.33 and 1.67
    assert scores_of_ranks((0, 1, 2, 3, 4, 5), allowed) == [5, 4, 3, 2, 1, 0]
    assert scores_of_ranks((2, 0, 0, 7), allowed) == [3, 5, 5, 0]  # places count, not distances
    assert scores_of_ranks((0, 1, 1, 1), allowed) == [5, 0, 0, 0]
    assert scores_of_ranks((0, 1, 2), (1, 3, 10)) == [10, 3, 1]  # 5.5 is nearer to 3
    assert scores_of_ranks((0, 1, 2), (1, 100)) == [100, 100, 1]  # more ranks than scores


def test_scores_of_ranks_against_exact_fractions():
    for allowed in ((0, 1, 2, 3, 4, 5), tuple(range(1, 101)), (0.0, 0.5, 1.0), (5, 1, 3)):
        exact = sorted(map(Fraction, allowed), reverse=True)
        for count in range(2, 9):
            found = scores_of_ranks(tuple(range(count)), allowed)
            for place, score in enumerate(found):
                wanted = exact[0] - Fraction(place, count - 1) * (exact[0] - exact[-1])
                nearest = min(exact, key=lambda s: abs(s - wanted))  # of two the first, higher
                assert score == float(nearest)


def test_targets_are_the_reward_template_with_the_score_in_it():
    assert score_targets(REWARD, "eft") == {float(k): f"Score: {k}" for k in range(6)}
    halves = RewardConfig(
        prompt_template="", reward_regex_template="I say {{reward}}!", allowed_scores=(0.5, 1)
    )
    assert score_targets(halves, "eft") == {0.5: "I say 0.5!", 1.0: "I say 1!"}
    hundred = RewardConfig(
        prompt_template="", reward_regex_template="Score: {{ reward }}", score_range=(1, 100)
    )
    assert list(score_targets(hundred, "eft")) == [float(k) for k in range(1, 101)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(reward_regex_template="Score: {{ reward }}"), "at least two scores"),
        (dict(parse_reward=len, score_range=(0, 5)), "reward_regex_template"),
        (
            dict(
                reward_regex_template="Score: {{ reward }}",
                parse_reward=lambda text: 1,
                score_range=(0, 5),
            ),
            "would teach 'Score: 0' for the score 0, but the reward prompt reads 1",
        ),
    ],
)
def test_a_reward_prompt_that_cannot_state_its_scores_is_refused(options, words):
    with pytest.raises(ConfigError, match="method='ranks'") as caught:
        score_targets(RewardConfig(prompt_template="", **options), "eft")
    assert words in str(caught.value)


# --- the stage ---


def test_judgements_in_the_human_order_become_demonstrations(tmp_path):
    engine = Told(SAID)
    run = trainer_of(tmp_path, [eft()], engine=engine)(rehearse=False)
    made = {d.id: d for d in run.demonstrations("eft")}
    assert {name: d.completion for name, d in made.items()} == {
        "eft/0/0": "fine. Score: 4",
        "eft/0/1": "short. Score: 3",
        "eft/1/0": "best. Score: 5",
        "eft/1/1": "well. Score: 4",
        "eft/1/2": "Score: 3",
    }
    assert all(d.completion_ids == (*ids_of(d.completion), END) for d in made.values())
    assert made["eft/0/1"].prompt == "rate <one> and <b>:"
    assert made["eft/0/1"].parents == ("eft/0", "eft/0/0/1", "eft/0/0/1/j1")
    assert made["eft/1/2"].parents == ("eft/1", "eft/1/0/2", "eft/1/0/2/j0")
    assert len(engine.asked) == 7 * 3


def test_a_judgement_that_was_cut_off_is_not_taught(tmp_path):
    """Its score is right, and whole, but an end after its text would be none of the judge's."""
    said = {**SAID, "eft/0/0/0": ["Score: 4", "Score: 4. as", "Score: 5"]}
    engine = Told(said, cut={"eft/0/0/0/j1"})
    run = trainer_of(tmp_path, [eft()], engine=engine)(rehearse=False)
    cut = {j.id: j.score for j in run.judgements("eft") if j.finished is False}
    assert cut == {"eft/0/0/0/j1": 4.0}
    made = {d.id: d.completion for d in run.demonstrations("eft")}
    assert (made["eft/0/0"], made["eft/0/1"]) == ("Score: 5", "Score: 0")  # the third attempt


def test_what_is_learnt_is_what_the_judge_was_asked(tmp_path):
    engine = Told(SAID)
    run = trainer_of(tmp_path, [eft()], engine=engine)(rehearse=False)
    for made in run.demonstrations("eft"):
        assert made.prompt_ids == engine.asked[made.parents[-1]]


TURNS = (
    "{% for m in messages %}<{{ m['role'] }}: {{ m['content'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant: {% endif %}"
)


def to_ascii(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode("ascii")))


def from_ascii(ids) -> str:
    return bytes(i for i in torch.as_tensor(ids).tolist() if i < 128).decode("ascii")


def test_under_a_chat_template_too_it_is_what_the_judge_was_asked(tmp_path):
    said = {
        "eft/0/0/0": ["best. Score: 5"],
        "eft/0/0/1": ["Score: 4"],
        "eft/1/0/0": ["Score: 3"],
        "eft/1/0/1": ["Score: 1"],
    }
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "two"}]
    stage = eft(
        ranked_dataset=[RANKED[0], {"prompt": talk, "replies": ["c", "d"]}], num_judgements=1
    )
    engine = Told(said, encode=to_ascii, end=128)
    run = trainer_of(
        tmp_path,
        [stage],
        lively(Recurrent(129).double()),
        engine=engine,
        chat_template=TURNS,
        tokenizer_encode=to_ascii,
        tokenizer_decode=from_ascii,
        eos_id=128,
    )(rehearse=False)
    first, *_, last = made = run.demonstrations("eft")
    assert from_ascii(first.prompt_ids) == "<user: rate <one> and <a>:><assistant: "
    assert from_ascii(first.completion_ids).startswith("best. Score: 5")
    assert all(d.prompt_ids == engine.asked[d.parents[-1]] for d in made)
    assert all(d.completion_ids[-1] == 128 for d in made)
    assert first.messages == ({"role": "user", "content": "rate <one> and <a>:"},)
    assert "be kind" in last.prompt and "two" in last.prompt and "> and <d>:" in last.prompt
    reply = from_ascii(run.candidates("eft")[0].ids)
    assert reply.startswith("a") and "user" not in reply  # what comes after the prompt


def test_every_record_of_the_making_is_kept(tmp_path):
    run = trainer_of(tmp_path, [eft()], engine=Told(SAID))(rehearse=False)
    stage = run.stage("eft")
    ranked = stage.read(RankedReplies)
    assert [(r.id, r.prompt, r.replies, r.ranks) for r in ranked] == [
        (
            f"eft/{i}",
            row["prompt"],
            tuple(row["replies"]),
            tuple(map(float, range(len(row["replies"])))),
        )
        for i, row in enumerate(RANKED)
    ]
    assert [p.id for p in run.prompts("eft")] == ["eft/0/0", "eft/1/0", "eft/2/0"]
    assert {c.id: c.text for c in run.candidates("eft")} == dict(zip(SAID, "abcdefg", strict=True))
    assert {j.id: j.text for j in run.judgements("eft")} == {
        f"{c}/j{k}": text for c, texts in SAID.items() for k, text in enumerate(texts)
    }
    known = {r.id for kind in (ranked, run.candidates("eft"), run.judgements("eft")) for r in kind}
    assert all(set(d.parents) <= known for d in run.demonstrations("eft"))


def test_the_counts_and_the_scores_before_and_after_are_reported(tmp_path, caplog):
    caplog.set_level("INFO", "self_rewarding_lm")
    run = trainer_of(tmp_path, [eft(max_per_score=1)], engine=Told(SAID), quiet=False)(
        rehearse=False
    )
    assert counted(run) == {
        "instructions": 3,
        "replies": 7,
        "parsed": 7,  # each has a score in one attempt at least
        "agreed": 5,
        "too_long": 0,
        "kept": 3,
        "scores_before": {"3": 2, "4": 2, "5": 1},
        "scores_after": {"3": 1, "4": 1, "5": 1},
    }
    line = run.metrics("eft")[-1]
    assert line == {"step": 0, **run.summary("eft")["metrics"]}
    assert line["judge/parse_rate"] == 14 / 21
    assert (
        "eft: 7 replies to 3 instructions, 7 with a score that could be read, 5 in agreement with "
        "people; 3 kept. Scores before thinning: 2 x 3, 2 x 4, 1 x 5; after: 1 x 3, 1 x 4, 1 x 5"
    ) in caplog.text


def test_a_reply_can_be_accepted_by_itself(tmp_path):
    said = {
        "eft/0/0/0": ["Score: 2"],
        "eft/0/0/1": ["Score: 2"],
        # c stands over both others, d and e tie
        "eft/1/0/0": ["Score: 5"],
        "eft/1/0/1": ["Score: 1"],
        "eft/1/0/2": ["Score: 1"],
        # nothing to compare f with
        "eft/2/0/0": ["Score: 5"],
        "eft/2/0/1": ["hm"],
    }
    lenient = eft(accept="reply", num_judgements=1)
    run = trainer_of(tmp_path / "lenient", [lenient], engine=Told(said))(rehearse=False)
    assert [d.id for d in run.demonstrations("eft")] == ["eft/1/0"]
    with pytest.raises(JudgeError):
        trainer_of(tmp_path / "strict", [eft(num_judgements=1)], engine=Told(said))(rehearse=False)


@pytest.mark.parametrize("forced_ending", [False, True, "at_once"])
def test_judgements_are_written_out_whatever_way_scores_come_in_other_stages(
    tmp_path, forced_ending
):
    settings = dict(score_mode="expected", forced_ending=forced_ending)
    reward = RewardConfig(**{**dict(REWARD), **settings})
    run = trainer_of(tmp_path, [eft()], engine=Told(SAID), self_reward_prompt_config=reward)(
        rehearse=False
    )
    written = trainer_of(tmp_path / "written", [eft()], engine=Told(SAID))(rehearse=False)
    assert run.demonstrations("eft") == written.demonstrations("eft")
    assert run.judgements("eft") == written.judgements("eft")
    assert {j.source for j in run.judgements("eft")} == {"sampled"}


def test_no_score_has_more_than_half_of_what_is_kept_unless_asked_otherwise(tmp_path):
    rows = [{"prompt": f"q{i}", "replies": ["good", "bad"]} for i in range(12)]
    # everything good is a 4; bad replies have 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1
    bad = [3] * 6 + [2] * 4 + [1] * 2
    said = {f"eft/{i}/0/0": ["Score: 4"] for i in range(12)}
    said |= {f"eft/{i}/0/1": [f"Score: {bad[i]}"] for i in range(12)}
    stages = [BuildEFTConfig(ranked_dataset=rows, num_judgements=1)]
    run = trainer_of(tmp_path, stages, engine=Told(said))(rehearse=False)
    assert counted(run)["scores_before"] == {"1": 2, "2": 4, "3": 6, "4": 12}
    assert counted(run)["scores_after"] == {"1": 2, "2": 4, "3": 6, "4": 12}  # 12 of 24 is half
    third = eft(ranked_dataset=rows, num_judgements=1, max_score_share=0.4)
    run = trainer_of(tmp_path / "third", [third], engine=Told(said))(rehearse=False)
    assert counted(run)["scores_after"] == {"1": 2, "2": 4, "3": 6, "4": 8}  # 8 of 20
    assert len(run.demonstrations("eft")) == counted(run)["kept"] == 20


def test_ranks_alone_ask_no_model(tmp_path):
    class NoEngine(LocalEngine):
        def generate(self, model, requests, decoding):
            raise AssertionError("asked")

    rows = [*RANKED[:2], {"prompt": "mmm", "replies": ["a", "b", "c"], "ranks": [1, 0, 1]}]
    run = trainer_of(tmp_path, [ranks(ranked_dataset=rows)], engine=NoEngine())(rehearse=False)
    made = run.demonstrations("eft")
    assert [(d.id, d.completion) for d in made] == [
        ("eft/0/0", "Score: 5"),
        ("eft/0/1", "Score: 0"),
        ("eft/1/0", "Score: 5"),
        ("eft/1/1", "Score: 3"),
        ("eft/1/2", "Score: 0"),
        ("eft/2/0", "Score: 0"),
        ("eft/2/1", "Score: 5"),
        ("eft/2/2", "Score: 0"),
    ]
    assert made[3].prompt_ids == ids_of("rate <two> and <d>:")
    assert made[3].completion_ids == (*ids_of("Score: 3"), END)
    assert made[3].parents == ("eft/1", "eft/1/0/1")
    assert counted(run) == {
        "instructions": 3,
        "replies": 8,
        "too_long": 0,
        "kept": 8,
        "scores_before": {"0": 4, "3": 1, "5": 3},
        "scores_after": {"0": 4, "3": 1, "5": 3},
    }
    assert not (tmp_path / "01-eft" / "judgements.jsonl").exists()


def test_examples_that_do_not_fit_the_model_are_left_out_and_counted(tmp_path):
    model = model64()
    model.max_seq_len = 40
    room = 40 - len("rate <one> and <>:") - len("Score: 0") - 1
    replies = ["a" * room, "b", "c", "d" * (room + 1)]
    rows = [{"prompt": "one", "replies": replies[i : i + 2]} for i in (0, 2)]
    run = trainer_of(tmp_path, [ranks(ranked_dataset=rows)], model)()
    assert [d.id for d in run.demonstrations("eft")] == ["eft/0/0", "eft/0/1", "eft/1/0"]
    assert counted(run)["too_long"] == 1 and counted(run)["kept"] == 3


# --- runs ---


def test_a_later_stage_trains_m0_on_instructions_and_judgements(tmp_path):
    stages = [
        sft(name="baseline"),
        eft(),
        sft(name="M1", init_from="initial", train_dataset=[IFT, from_stage("eft")]),
    ]
    model = model64()
    run = trainer_of(tmp_path, stages, model, engine=Told(SAID))(rehearse=False)
    demonstrations = run.demonstrations("eft")
    rows = run.rows("M1")
    assert len(rows) == len(IFT) + len(demonstrations) == 8
    for row, made in zip(rows[len(IFT) :], demonstrations, strict=True):
        assert row.ids == (*made.prompt_ids, *made.completion_ids)
        learnt = [i for i, is_target in zip(row.ids, row.targets, strict=True) if is_target]
        assert tuple(learnt) == made.completion_ids

    # M1 is M0 trained on those rows: the stages before it leave no trace in the weights
    by_hand = [(torch.tensor(r.ids), torch.tensor([not t for t in r.targets])) for r in rows]
    alone = model64()
    trainer_of(tmp_path / "alone", [sft(name="M1", train_dataset=by_hand)], alone)()
    for name, value in model.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name


def test_a_model_that_cannot_judge_learns_to_from_ranks(tmp_path):
    """After training on scores made of ranks it states those scores, by greedy decoding."""
    rows = [{"prompt": "x", "replies": ["a", "b"]}]
    judging = SamplingConfig(temperature=0, max_new_tokens=12)
    judged = eft(ranked_dataset=rows, num_judgements=1, judging=judging)
    taught = sft(train_dataset=from_stage("ranked"), num_train_steps=100, optim=QUICK)
    stages = [ranks(ranked_dataset=rows, name="ranked"), taught, judged]
    model = untrained("rotary", vocab=TEXT_VOCAB, max_seq_len=64)
    run = trainer_of(tmp_path, stages, model)()
    assert [d.completion for d in run.demonstrations("eft")] == ["Score: 5", "Score: 0"]
    with pytest.raises(JudgeError):
        model = untrained("rotary", vocab=TEXT_VOCAB, max_seq_len=64)
        trainer_of(tmp_path / "before", [judged], model)()


def test_the_stage_trains_nothing(tmp_path):
    model = model64()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer_of(tmp_path, [ranks()], model)()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = model64(seed=1)
    run.load_weights(again, "eft")
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_a_stopped_stage_asks_only_for_what_is_missing(tmp_path):
    straight = trainer_of(tmp_path / "straight", [eft()], engine=Told(SAID))(rehearse=False)
    rows = [*RANKED, *({"prompt": f"p{i}", "replies": ["h", "i"]} for i in range(30))]
    said = dict(SAID)
    for i in range(3, 33):
        said |= {f"eft/{i}/0/0": ["Score: 4"] * 3, f"eft/{i}/0/1": ["Score: 2"] * 3}
    stopped = Told(said, stop_after=150)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "run", [eft(ranked_dataset=rows)], engine=stopped)(rehearse=False)
    kept = {j.id for j in Run.open(tmp_path / "run").judgements("eft")}
    assert 0 < len(kept) <= 150 and kept <= set(stopped.asked)
    later = Told(said)
    run = trainer_of(tmp_path / "run", [eft(ranked_dataset=rows)], engine=later)(rehearse=False)
    judged = {name.rsplit("/", 1)[0] for name in later.asked}
    in_full = [c for c in said if all(f"{c}/j{k}" in kept for k in range(3))]
    assert judged == set(said) - set(in_full) and in_full
    assert len(run.judgements("eft")) == 3 * len(said)
    first = [d for d in run.demonstrations("eft") if int(d.id.split("/")[1]) < 3]
    assert first == straight.demonstrations("eft")


def test_a_stage_that_is_done_is_not_done_again(tmp_path):
    trainer_of(tmp_path, [eft()], engine=Told(SAID))(rehearse=False)
    silent = Told({})
    run = trainer_of(tmp_path, [eft()], engine=silent)(rehearse=False)
    assert len(run.demonstrations("eft")) == 5 and not silent.asked


def test_starting_anew_removes_every_record_of_the_stage(tmp_path):
    trainer_of(tmp_path, [eft()], engine=Told(SAID))(rehearse=False)
    run = trainer_of(tmp_path, [ranks()])(overwrite_checkpoints=True)
    assert {d.completion for d in run.demonstrations("eft")} == {"Score: 5", "Score: 3", "Score: 0"}
    assert not run.judgements("eft")


def test_nothing_kept_is_an_error_that_says_what_to_try_and_keeps_the_records(tmp_path):
    said = {name: ["as you like it"] * 3 for name in SAID} | {"eft/0/0/0": ["Score: 9"] * 3}
    with pytest.raises(JudgeError) as caught:
        trainer_of(tmp_path, [eft()], engine=Told(said))(rehearse=False)
    words = str(caught.value)
    for hint in ("method='ranks'", "num_judgements", "accept='reply'", "max_new_tokens"):
        assert hint in words
    assert "7 replies to 3 instructions, 0 with a score" in words
    assert "0 kept, and min_kept is 1" in words
    assert "out_of_range: 'Score: 9'" in words and "no_score: 'as you like it'" in words
    run = Run.open(tmp_path)
    assert len(run.judgements("eft")) == 21 and not run.is_done("eft")
    assert run.metrics("eft")[-1]["eft/kept"] == 0


def test_fewer_than_asked_for_is_an_error_and_none_can_be_allowed(tmp_path, caplog):
    with pytest.raises(JudgeError, match=r"5 kept\. Scores before .*, and min_kept is 6"):
        trainer_of(tmp_path / "few", [eft(min_kept=6)], engine=Told(SAID))(rehearse=False)
    silent = Told({name: ["no idea"] * 3 for name in SAID})
    stages = [eft(min_kept=0), sft(train_dataset=[IFT, from_stage("eft")])]
    run = trainer_of(tmp_path / "none", stages, engine=silent)(rehearse=False)
    assert run.demonstrations("eft") == [] and len(run.rows("sft")) == len(IFT)
    assert "eft: 7 replies to 3 instructions, 0 with a score" in caplog.text


def test_nothing_that_fits_is_an_error_of_the_data(tmp_path):
    model = model64()
    model.max_seq_len = len("rate <> and <>:") + 17  # the least that a judge prompt needs
    rows = [{"prompt": "a long question", "replies": ["a long reply", "a short one"]}]
    with pytest.raises(DataError, match="2 of them too long for the model; 0 kept"):
        trainer_of(tmp_path, [ranks(ranked_dataset=rows)], model)()


def test_from_stage_is_the_demonstrations_of_one_stage_and_the_pairs_of_another(tmp_path):
    run = trainer_of(tmp_path, [ranks(), sft(train_dataset=from_stage("eft"))])()
    assert run.training_data("eft") == run.demonstrations("eft")
    assert all(isinstance(d, Demonstration) for d in run.training_data("eft"))
    assert run.training_data("sft") == [] and run.demonstrations("sft") == []


# --- what is refused before any work ---


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(self_reward_config_keyname="other"), ConfigError, "'other' is not one of"),
        (dict(ranked_dataset=[]), DataError, "empty"),
        (dict(ranked_dataset=[*RANKED, {"prompt": "p"}]), DataError, "row 3"),
        (dict(ranked_dataset=[{"prompt": "p", "replies": ["a"]}]), DataError, "at least two"),
        (
            dict(ranked_dataset=[{"prompt": "p", "replies": ["a", "b"], "ranks": [0, 0]}]),
            DataError,
            "nothing is preferred",
        ),
        (dict(ranked_dataset="missing.jsonl"), DataError, "missing.jsonl"),
        (dict(ranked_dataset=from_stage("sft")), ConfigError, "must name an earlier stage"),
    ],
)
def test_what_cannot_be_used_is_refused_when_the_trainer_is_built(tmp_path, options, error, words):
    with pytest.raises(error) as caught:
        trainer_of(tmp_path, [eft(**options)])
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_reward_prompt_that_does_not_fit_is_refused_when_the_trainer_is_built(tmp_path):
    model = model64()
    model.max_seq_len = 20
    with pytest.raises(JudgeError, match="no room"):
        trainer_of(tmp_path, [eft()], model)
    free = RewardConfig(prompt_template=REWARD.prompt_template, parse_reward=len)
    with pytest.raises(ConfigError, match="reward_regex_template"):
        trainer_of(tmp_path, [ranks()], self_reward_prompt_config=free)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        trainer_of(tmp_path, [ranks()], tokenizer_encode=None, tokenizer_decode=None)


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path):
    rows = [RANKED[0], {"prompt": "p", "replies": ["a"]}, RANKED[2]]
    run = trainer_of(tmp_path, [ranks(ranked_dataset=rows, on_bad_row="skip")])()
    assert [d.id for d in run.demonstrations("eft")] == ["eft/0/0", "eft/0/1", "eft/2/0", "eft/2/1"]
    assert {"step": 0, "rows/skipped": 1} in run.metrics("eft")


@pytest.mark.parametrize(
    "options",
    [
        dict(num_judgements=0),
        dict(accept="some"),
        dict(method="guess"),
        dict(max_score_share=0.0),
        dict(max_score_share=1.5),
        dict(max_per_score=0),
        dict(acept="reply"),
    ],
)
def test_settings_out_of_their_range_are_refused(options):
    with pytest.raises(ConfigError):
        eft(**options)


# --- two processes ---

BY_LENGTH = RewardConfig(
    prompt_template="{{ prompt }}>{{ response }}:",
    parse_reward=lambda text: float(len(set(text)) // 8),
)
MANY = [
    {"prompt": f"tell {i}", "replies": [f"{w} {i}" for w in ("good", "fair", "bad")[: 2 + i % 2]]}
    for i in range(9)
]


def main(folder: str) -> None:
    """What each of two processes runs, and one alone; a real model is the judge."""
    short = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=60)
    stages = [
        eft(ranked_dataset=MANY, judging=short, accept="reply", max_per_score=1),
        sft(train_dataset=from_stage("eft")),
    ]
    trainer_of(
        folder,
        stages,
        self_reward_prompt_config=BY_LENGTH,
        accelerate_kwargs=dict(cpu=True),
    )()


def test_two_processes_make_what_one_makes(tmp_path):
    main(str(tmp_path / "one"))
    two("-m", "tests.stages.test_eft", tmp_path / "two")
    alone, together = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    for records in ("prompts", "candidates", "judgements", "demonstrations"):
        found = getattr(alone, records)("eft")
        assert found and found == getattr(together, records)("eft")
    before, after = (sum(counted(alone)[f"scores_{w}"].values()) for w in ("before", "after"))
    assert before > after == len(alone.demonstrations("eft"))  # something was thinned
    assert alone.metrics("eft") == together.metrics("eft")
    assert alone.rows("sft") == together.rows("sft")
    assert not list((tmp_path / "two").glob("*/*.[0-9]*.jsonl"))


if __name__ == "__main__":
    main(sys.argv[1])
