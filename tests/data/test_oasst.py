"""Open Assistant message trees as seed data: what is taken, what is left out, how it is split."""

import gzip
import json
from pathlib import Path

import pytest

from self_rewarding_lm.data.oasst import open_assistant
from self_rewarding_lm.errors import ConfigError, DataError
from self_rewarding_lm.records import RankedReplies

REAL = Path(__file__).parents[3] / "shared" / "data" / "oasst_en_100_trees.jsonl"
ALL_EVAL = (0.0, 0.0, 1.0)
ALL_IFT = (1.0, 0.0, 0.0)


def message(text, *replies, role, **fields):
    return {
        "message_id": f"id-{text}",
        "text": text,
        "role": role,
        "lang": "en",
        "deleted": False,
        "review_result": True,
        **fields,
        "replies": list(replies),
    }


def asked(text, *replies, **fields):
    return message(text, *replies, role="prompter", **fields)


def said(text, rank, *replies, **fields):
    ranked = {} if rank is None else {"rank": rank}
    return message(text, *replies, role="assistant", **ranked, **fields)


def tree(name, root, **fields):
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": root, **fields}


def write(path, trees):
    path.write_text("".join(json.dumps(t) + "\n" for t in trees))
    return path


DEEP = tree(
    "deep",
    asked(
        "q",
        said("a1", 1, asked("q1", said("b1", 0), said("b2", 1))),
        said("a0", 0, asked("q0", said("c0", None))),
        said("a2", 2),
    ),
)


def many(count):
    return [
        tree(f"t{i}", asked(f"q{i}", said(f"good {i}", 0), said(f"bad {i}", 1)))
        for i in range(count)
    ]


def test_ift_takes_the_best_first_reply_and_nothing_deeper(tmp_path):
    found = open_assistant(write(tmp_path / "x.jsonl", [DEEP]), shares=ALL_IFT)
    assert found.ift == [{"prompt": "q", "completion": "a0"}]
    assert (found.eft_train, found.eft_eval, found.prompts) == ([], [], [])


def test_ift_at_any_depth_has_the_conversation_before_as_messages(tmp_path):
    path = write(tmp_path / "x.jsonl", [DEEP])
    found = open_assistant(path, shares=ALL_IFT, ift_depth="any")
    talk = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q1"},
    )
    assert found.ift == [
        {"prompt": "q", "completion": "a0"},
        {"prompt": talk, "completion": "b1"},
    ]
    assert found.left_out == {"no_rank": 1}  # c0 was compared with nothing


def test_ift_may_take_other_ranks_too(tmp_path):
    path = write(tmp_path / "x.jsonl", [DEEP])
    found = open_assistant(path, shares=ALL_IFT, ift_rank=1)
    assert [row["completion"] for row in found.ift] == ["a0", "a1"]


def test_ranked_replies_come_best_first_with_their_tree_as_the_group(tmp_path):
    path = write(tmp_path / "x.jsonl", [DEEP])
    first = RankedReplies("id-q", "q", ("a0", "a1", "a2"), (0.0, 1.0, 2.0), "deep")
    assert open_assistant(path, shares=ALL_EVAL).eft_eval == [first]
    talk = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q1"},
    )
    second = RankedReplies("id-q1", talk, ("b1", "b2"), (0.0, 1.0), "deep")
    assert open_assistant(path, shares=ALL_EVAL, depth="any").eft_eval == [first, second]


@pytest.mark.parametrize(
    ("replies", "ranked", "left_out"),
    [
        ([said("x", 0), said("y", 1), said("z", None)], ("x", "y"), {"no_rank": 1}),
        ([said("x", 0), said("y", None)], None, {"no_rank": 1}),
        ([said("x", 0)], None, {}),
        ([said("x", 0), said("y", 0)], None, {}),
        ([said("x", 0, deleted=True), said("y", 1), said("z", 2)], ("y", "z"), {"deleted": 1}),
        ([said("x", 0, review_result=False), said("y", 1)], None, {"rejected_in_review": 1}),
        ([said("x", 0, review_result=None), said("y", 1)], ("x", "y"), {}),
        ([said("x", 0, lang="de"), said("y", 1)], None, {"other_language": 1}),
    ],
    ids=["unranked", "one ranked", "one", "equal", "deleted", "rejected", "not reviewed", "German"],
)
def test_replies_that_cannot_be_used_are_left_out_and_counted(replies, ranked, left_out, tmp_path):
    path = write(tmp_path / "x.jsonl", [tree("t", asked("q", *replies))])
    found = open_assistant(path, shares=ALL_EVAL)
    assert [r.replies for r in found.eft_eval] == ([] if ranked is None else [ranked])
    assert found.left_out == left_out


def test_what_follows_a_message_that_is_left_out_is_left_out_with_it(tmp_path):
    below = asked("q1", said("b0", 0), said("b1", 1))
    trees = [
        tree(
            "t", asked("q", said("a0", 0, below, deleted=True), said("a1", 1, below), said("a2", 2))
        )
    ]
    found = open_assistant(write(tmp_path / "x.jsonl", trees), shares=ALL_EVAL, depth="any")
    assert [
        r.prompt if isinstance(r.prompt, str) else r.prompt[1]["content"] for r in found.eft_eval
    ] == ["q", "a1"]
    assert found.left_out == {"deleted": 1}


def test_trees_that_are_not_ready_or_in_another_language_are_left_out(tmp_path):
    [good, other, german, gone, stateless] = many(5)
    other["tree_state"] = "aborted_low_grade"
    german["prompt"]["lang"] = "de"
    gone["prompt"]["deleted"] = True
    del stateless["tree_state"]
    path = write(tmp_path / "x.jsonl", [good, other, german, gone, stateless])
    found = open_assistant(path, shares=ALL_EVAL)
    assert {r.group for r in found.eft_eval} == {"t0", "t4"}
    assert found.left_out == {"tree_not_ready": 1, "other_language": 1, "deleted": 1}
    assert [r.group for r in open_assistant(path, shares=ALL_EVAL, lang="de").eft_eval] == []
    every = open_assistant(path, shares=ALL_EVAL, lang=None)
    assert {r.group for r in every.eft_eval} == {"t0", "t2", "t4"}


def quality(value):
    return {"labels": {"quality": {"value": value, "count": 3}, "toxicity": {"value": 0.0}}}


def test_quality_is_asked_of_prompts_and_of_what_is_learnt_not_of_ranked_replies(tmp_path):
    trees = [
        tree(
            "good",
            asked("g", said("x", 0, **quality(0.8)), said("y", 1, **quality(0.1)), **quality(0.6)),
        ),
        tree("bad reply", asked("r", said("x", 0, **quality(0.4)), said("y", 1), **quality(0.6))),
        tree("bad prompt", asked("p", said("x", 0, **quality(0.8)), said("y", 1), **quality(0.4))),
        tree("not known", asked("n", said("x", 0, **quality(0.8)), said("y", 1))),
    ]
    path = write(tmp_path / "x.jsonl", trees)
    learnt = open_assistant(path, shares=ALL_IFT, min_quality=0.5)
    assert learnt.ift == [{"prompt": "g", "completion": "x"}]
    assert learnt.left_out == {"low_quality": 3}
    ranked = open_assistant(path, shares=ALL_EVAL, min_quality=0.5)
    assert {r.group for r in ranked.eft_eval} == {"good", "bad reply"}
    assert len(open_assistant(path, shares=ALL_IFT).ift) == 4


# The split


def parts_of(found):
    """Numbers of the trees in each part, by their prompts q<i>."""
    ift = {row["prompt"] for row in found.ift}
    train = {r.prompt for r in found.eft_train}
    evaluation = {r.prompt for r in found.eft_eval}
    return ift, train, evaluation, {row["prompt"] for row in found.prompts}


def test_every_tree_is_in_one_part_and_the_shares_are_kept(tmp_path):
    path = write(tmp_path / "x.jsonl", many(20))
    parts = parts_of(open_assistant(path, shares=(0.5, 0.25, 0.1)))
    assert [len(part) for part in parts] == [10, 5, 2, 3]
    assert set().union(*parts) == {f"q{i}" for i in range(20)}  # and 20 in all: disjoint


@pytest.mark.parametrize("count", [1, 2, 3, 7, 19])
def test_no_tree_is_lost_or_doubled_by_rounding(count, tmp_path):
    path = write(tmp_path / "x.jsonl", many(count))
    for shares in ((0.6, 0.3, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.1, 0.2, 0.7)):
        parts = parts_of(open_assistant(path, shares=shares))
        assert sum(map(len, parts)) == len(set().union(*parts)) == count
        assert not parts[3]  # the shares are 1 in all


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_lines(tmp_path):
    path = write(tmp_path / "x.jsonl", many(20))
    turned = write(tmp_path / "turned.jsonl", many(20)[::-1])
    assert open_assistant(path) == open_assistant(path) == open_assistant(turned)
    assert parts_of(open_assistant(path, seed=1)) != parts_of(open_assistant(path, seed=0))


def test_options_of_the_replies_move_no_tree_to_another_part(tmp_path):
    """Else a prompt could be learnt in one run and evaluated on in the next."""
    trees = many(20)
    for i in range(0, 20, 3):
        trees[i]["prompt"].update(quality(0.9))
    path = write(tmp_path / "x.jsonl", trees)
    before = parts_of(open_assistant(path))
    after = parts_of(open_assistant(path, min_quality=0.5, depth="any", max_eft_train=2))
    assert all(less <= more for less, more in zip(after, before, strict=True))
    assert len(after[1]) <= 2


def test_the_parts_can_be_capped(tmp_path):
    path = write(tmp_path / "x.jsonl", many(20))
    whole = open_assistant(path)
    found = open_assistant(path, max_ift=3, max_eft_train=2, max_eft_eval=1)
    assert found.ift == whole.ift[:3]
    assert found.eft_train == whole.eft_train[:2]
    assert found.eft_eval == whole.eft_eval[:1]


def test_trees_are_chosen_by_their_lines(tmp_path):
    path = write(tmp_path / "x.jsonl", many(10))
    found = open_assistant(path, trees=range(3, 5), shares=ALL_EVAL)
    assert {r.prompt for r in found.eft_eval} == {"q3", "q4"}
    with pytest.raises(DataError, match=r"from 0 to 9; got 10"):
        open_assistant(path, trees=range(8, 12))


def test_a_tree_that_is_there_twice_is_in_one_part(tmp_path):
    path = write(tmp_path / "x.jsonl", many(4) * 2)
    assert sum(map(len, parts_of(open_assistant(path)))) == 4
    assert len(open_assistant(path, shares=ALL_IFT).ift) == 4


def test_a_packed_file_holds_the_same_trees(tmp_path):
    path = write(tmp_path / "x.jsonl", many(5))
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert open_assistant(packed) == open_assistant(path)


# Errors


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": ', "is not valid JSON"),
        ('"a"', "a message tree is"),
        ('{"message_tree_id": "t"}', "a message tree is"),
        (json.dumps(asked("q")), r"a single message; take the file \*\.trees\.jsonl"),
        (json.dumps(tree("t", {"text": "q"})), "a message has message_id, text and role"),
        (json.dumps(tree("t", said("a", 0))), "must have the role 'prompter'; it has 'assistant'"),
        (json.dumps(tree("t", asked("q", asked("p")))), "must have the role 'assistant'"),
        (json.dumps(tree("t", asked("q", said("a", "best")))), "a number as rank"),
        (json.dumps(tree("t", asked("q", said("a", 0)) | {"replies": "no"})), "a list of replies"),
    ],
)
def test_a_line_that_is_no_tree_is_named(line, words, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(many(1)[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2.*{words}"):
        open_assistant(path)


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5), (-0.1, 0.5, 0.5), (0.0, 0.0, 0.0)], ids=str)
def test_shares_that_are_none_are_refused(shares, tmp_path):
    with pytest.raises(ConfigError, match="shares must be"):
        open_assistant(write(tmp_path / "x.jsonl", many(2)), shares=shares)


def test_a_file_without_a_tree_of_use_is_an_error_that_says_why(tmp_path):
    path = write(tmp_path / "x.jsonl", many(2))
    with pytest.raises(DataError, match=r"no tree that can be used\. Left out: 2 other_language"):
        open_assistant(path, lang="de")
    with pytest.raises(DataError, match="there is no file"):
        open_assistant(tmp_path / "y.jsonl")


# Real trees


@pytest.fixture
def real():
    if not REAL.is_file():
        pytest.skip(f"the data set {REAL.name} is not here")
    return REAL


def test_real_trees_give_their_known_numbers(real):
    """333 first replies, 330 of them ranked; 641 ranked replies at any depth.

    In 211 sets every reply is ranked, in one three of four are.
    """
    first = open_assistant(real, shares=ALL_EVAL)
    assert sum(len(r.replies) for r in first.eft_eval) == 330
    assert first.left_out == {"no_rank": 3}
    every = open_assistant(real, shares=ALL_EVAL, depth="any")
    assert len(every.eft_eval) == 212
    assert sum(len(r.replies) for r in every.eft_eval) == 641
    assert len({r.id for r in every.eft_eval}) == 212
    assert all(list(r.ranks) == sorted(set(r.ranks)) for r in every.eft_eval)


def test_real_trees_give_disjoint_parts(real):
    found = open_assistant(real, trees=range(70), shares=(0.4, 0.3, 0.2), depth="any")
    groups = [{r.group for r in part} for part in (found.eft_train, found.eft_eval)]
    assert not groups[0] & groups[1]
    roots = {json.loads(line)["prompt"]["text"] for line in real.read_text().splitlines()[:70]}
    prompts = [row["prompt"] for row in (*found.ift, *found.prompts)]
    assert len(set(prompts)) == len(prompts)
    assert set(prompts) <= roots
    ranked = {
        r.prompt if isinstance(r.prompt, str) else r.prompt[0]["content"]
        for r in (*found.eft_train, *found.eft_eval)
    }
    assert not ranked & set(prompts)


@pytest.mark.parametrize(
    "labels", [None, [], "good", {"quality": 3}, {"quality": {"value": "high"}}]
)
def test_a_label_of_another_form_is_no_quality(tmp_path, labels):
    path = write(tmp_path / "t.jsonl", [tree("t", asked("q", said("a", 0), labels=labels))])
    found = open_assistant(path, shares=ALL_IFT, min_quality=0.5)
    assert found.ift == [] and found.left_out == {"low_quality": 1}


@pytest.mark.parametrize("rank", [10**400, float("nan"), float("inf"), True])
def test_a_rank_that_is_no_finite_number_is_refused(tmp_path, rank):
    path = write(tmp_path / "t.jsonl", [tree("t", asked("q", said("a", rank), said("b", 0)))])
    with pytest.raises(DataError, match="line 1: message id-a must have a number as rank"):
        open_assistant(path, shares=ALL_EVAL)


def test_an_id_with_half_a_character_is_an_id(tmp_path):
    path = write(tmp_path / "t.jsonl", [tree("\ud800", asked("q", said("a", 0)))])
    assert len(open_assistant(path, shares=ALL_IFT).ift) == 1
