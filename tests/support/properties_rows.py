"""What holds for any row of a dataset: JSON values of every kind in every place."""

import copy
import math
from unittest.mock import patch

from hypothesis import strategies as st

from self_rewarding_lm.data.chat import without_nones
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import DataError, TokenizerError
from self_rewarding_lm.records import VARIABLES, PreferencePair, from_json, to_json
from tests.support.mutants import over

VOCAB = 30
TEXT = st.text(st.characters(), max_size=6) | st.sampled_from(["a question", "", " ", "B", "1"])
NUMBER = st.integers(-2, 31) | st.integers() | st.floats() | st.sampled_from([10**400, -0.0])
SCALAR = st.none() | st.booleans() | NUMBER | TEXT
KEY = (
    st.sampled_from(
        [
            "prompt",
            "completion",
            "messages",
            "text",
            "role",
            "content",
            "from",
            "value",
            "chosen",
            "rejected",
        ]
    )
    | TEXT
)
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=6,
)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
OTHER = {"role": "assistant", "content": "no"}
IDS = [3, 4]
SUPERVISED = [
    [IDS * 2, 2],
    [IDS, [True, False]],
    {"prompt": "a", "completion": "b"},
    {"prompt": [USER], "completion": [ANSWER], "n": 1},
    {"prompt": IDS, "completion": IDS},
    {"messages": [USER, ANSWER]},
    [USER, ANSWER],
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "do", "input": "it", "output": "done"},
    {"question": "which", "choices": ["a", "b"], "answer": 1},
    {"question": "which", "choices": ["a", "b"], "answer": "B"},
    {"text": "abc"},
    [IDS, [True, False, False]],  # and nearly right ones
    [IDS, [False]],
    [IDS, -1],
    [IDS, 3],
]
PREFERENCES = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": IDS, "chosen": IDS, "rejected": [5]},
    {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    {"prompt": "a", "chosen": "b", "rejected": "b"},
    {"chosen": [USER, ANSWER], "rejected": [{"role": "user", "content": "hu"}, OTHER]},
]
RANKED = [
    {"prompt": "a", "replies": ["b", "c", "d"]},
    {"prompt": [USER], "replies": ["b", "c"], "ranks": [1, 0], "group": "g"},
    {"input": "a", "output_1": "b", "output_2": "c", "label": 2},
    {"question": "which", "choices": ["a", "b"], "answer": "a"},
    {"prompt": "a", "replies": ["b", "c"], "ranks": [1, 1]},
    {"prompt": "a", "replies": ["b", "c"], "ranks": [0, 1, 2]},
    {"prompt": "a", "replies": ["b", "c"], "ranks": [0, 10**400]},
]


def _places(value, path=()):
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in items:
        yield from _places(child, (*path, key))


def _changed(value, path, new):
    if not path:
        return new
    target = value
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = new
    return value


@st.composite
def damaged(draw, valid):
    """A row of a known form with another value in some places, or without some."""
    row = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(list(_places(row))))
        row = _changed(row, path, draw(JSON))
    return row


def any_row(*valid):
    known = damaged([row for rows in valid for row in rows])
    return st.integers(0, 3).flatmap(lambda n: JSON if n == 3 else known)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENIZER = CallableTokenizer(
    lambda text: [1 + ord(c) % (VOCAB - 1) for c in text],
    lambda ids: "".join(chr(64 + i) for i in ids.tolist()),
)
TOKENS = {
    "texts": Tokens(TOKENIZER, eos_id=0, vocab=VOCAB),
    "messages": Tokens(TOKENIZER, eos_id=0, vocab=VOCAB, chat_template=TEMPLATE),
    "no end": Tokens(TOKENIZER, eos_id=None, vocab=VOCAB),
}
OURS = (DataError, TokenizerError)
WAY = st.sampled_from(sorted(TOKENS))


def _are_ids(ids):
    return len(ids) > 0 and all(type(i) is int and 0 <= i < VOCAB for i in ids)


@over(
    "data.rows",
    st.tuples(any_row(SUPERVISED, PREFERENCES, RANKED), WAY),
    mutants={
        "_check_not_empty(() if is_empty else prompt.ids,": "_check_not_empty((1,),",
        "k not in part.columns and _is_plain(v)": "_is_plain(k)",
    },
    examples=750,
)
def any_prompt_row_is_ids_or_refused(rows, case):
    row, way = case
    try:
        found = rows.prompt_of(row, "a row", TOKENS[way])
    except OURS as error:
        assert "a row" in str(error)
        return
    assert _are_ids(found.ids)
    assert all(rows._is_plain(v) for v in (found.columns or {}).values())
    assert not isinstance(row, str) or found.text == row


@over(
    "data.rows",
    st.tuples(any_row(SUPERVISED), WAY),
    mutants={
        "i > 0 and not p for i, p": "i >= 0 and not p for i, p",
        "if not any(targets):": "if False:",
        "if not 0 < length < len(flags) or not all(flags[:length]):": "if False:",
        "if 0 <= value <= len(ids):": "if True:",
        "if len(value) == len(ids):": "if True:",
        "return tokens.ended(ids)\n\n\ndef _ids": "return ids\n\n\ndef _ids",
    },
    examples=750,
)
def any_supervised_row_has_something_to_learn_or_is_refused(rows, case):
    row, way = case
    tokens = TOKENS[way]
    try:
        ids, targets = rows.training_row(row, "a row", tokens)
    except OURS as error:
        assert "a row" in str(error)
        return
    assert _are_ids(ids) and len(targets) == len(ids) and any(targets) and not targets[0]
    if isinstance(row, dict) and isinstance(row.get("text"), str) and len(row) == 1:
        assert tokens.eos_id is None or ids[-1] == tokens.eos_id
    if isinstance(row, list) and isinstance(row[1], int):
        assert row[1] >= 0 and sum(targets) == len(ids) - max(1, row[1])
    try:
        prompt, completion = rows.prompt_and_completion(row, "a row", tokens)
    except OURS:
        return
    assert _are_ids(completion) and (*prompt.ids, *completion) == ids and prompt.ids


@over(
    "data.rows",
    st.tuples(any_row(PREFERENCES), WAY),
    mutants={
        '_check_not_empty(prompt.ids, f"{where}: the prompt")': "pass",
        'if ids["chosen"] == ids["rejected"]:': "if False:",
        'rejected_ids=ids["rejected"]': 'rejected_ids=ids["chosen"]',
        'raise DataError(f"{whose} is empty': 'pass; str(f"{whose} is empty',
    },
    examples=600,
)
def any_preference_row_prefers_something_or_is_refused(rows, case):
    row, way = case
    try:
        pair = rows.preference_row(row, "a row", TOKENS[way])
    except OURS as error:
        assert "a row" in str(error)
        return
    assert (
        _are_ids(pair.chosen_ids)
        and _are_ids(pair.rejected_ids)
        and pair.chosen_ids != pair.rejected_ids
    )
    assert pair.prompt_ids and all(type(i) is int and 0 <= i < VOCAB for i in pair.prompt_ids)
    assert from_json(PreferencePair, to_json(pair)) == pair


@over(
    "data.ranked",
    any_row(RANKED, PREFERENCES, SUPERVISED),
    mutants={
        "if len(set(ranks)) < 2:": "if False:",
        "len(replies) < 2 or len(replies) != len(ranks)": "len(replies) < 2",
        "map(is_number, ranks)": "(isinstance(r, int | float) for r in ranks)",
        "wrong = [reply for reply in replies if not isinstance(reply, str)]": "wrong = []",
        'ranks = [0, 1] if row["label"] == 1 else [1, 0]': "ranks = [0, 1]",
    },
    examples=750,
)
def any_ranked_row_ranks_texts_or_is_refused(ranked, row):
    try:
        found = ranked.ranked_row(row, "a row")
    except DataError as error:
        assert "a row" in str(error)
        return
    assert len(found.replies) == len(found.ranks) >= 2 and len(set(found.ranks)) > 1
    assert all(math.isfinite(rank) for rank in found.ranks) and all(
        isinstance(r, str) for r in found.replies
    )
    assert found.group
    if (
        row.get("label") == 2
        and "replies" not in row
        and "choices" not in row
        and "chosen" not in row
    ):
        assert found.replies[found.ranks.index(0.0)] == row["output_2"]


@over(
    "data.forms",
    any_row(SUPERVISED, PREFERENCES, RANKED).filter(lambda row: isinstance(row, dict)),
    mutants={
        "if len(places) != 1:": "if False:",
        "shared != others or": "",
        "if columns >= set(needs):": "if columns & set(needs):",
        "if not is_messages(turns):": "if False:",
        "SPEAKERS.get(speaker) if isinstance(speaker, str) else None": "SPEAKERS.get(speaker)",
        'if messages[-1]["role"] == "assistant":\n        raise': "if False:\n        raise",
    },
    examples=750,
)
def any_row_has_a_form_or_is_refused(forms, row):
    for read in (forms.supervised_form, forms.prompt_form, forms.preference_form):
        try:
            found = read(row, "a row")
        except DataError as error:
            assert "a row" in str(error)
            continue
        if (
            isinstance(found, forms.Exchange)
            and "answer" in row
            and "choices" in row
            and found.prompt is not None
        ):
            if not {"prompt", "messages", "conversations", "instruction"} & set(row):
                assert found.completion[3:] in row["choices"]
        if isinstance(found, forms.Preference) and found.prompt is not row.get("prompt"):
            said = [(m["role"], m["content"]) for m in found.prompt]
            assert said[-len(row["rejected"][:-1]) :] == [
                (m["role"], m["content"]) for m in row["rejected"][:-1]
            ]
        if (
            isinstance(found, forms.Exchange)
            and "conversations" in row
            and isinstance(found.prompt, tuple)
        ):
            assert all(isinstance(m["content"], str) for m in found.prompt)
            answer = found.completion
            assert isinstance(answer, str) or (answer["role"] == "assistant" and len(answer) > 2)
    for messages in (row.get("messages"), row.get("prompt")):
        try:
            assert forms.open_messages(messages, "a row")[-1]["role"] != "assistant"
        except DataError:
            continue


TURN = st.lists(TEXT, min_size=2, max_size=2)
SAID = st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXT})


@over(
    "data.forms",
    st.tuples(
        TEXT | st.lists(SAID, min_size=1, max_size=3),
        st.fixed_dictionaries(
            {},
            optional={
                "system": st.none() | TEXT,
                "history": st.none() | st.lists(TURN, max_size=2) | JSON,
                "tools": st.none() | st.lists(st.dictionaries(TEXT, SCALAR), max_size=2) | JSON,
            },
        ),
    ),
    mutants={
        'if messages[0]["role"] != "system":': "if True:",
        "messages = [*lead, *messages]": "messages = [*messages, *lead]",
        "messages[0] = {**messages[0], VARIABLES: variables}": "pass",
        "value = without_nones(value)": "pass",
    },
    examples=500,
)
def what_stands_before_a_prompt_stands_there_in_order(forms, case):
    prompt, columns = case
    try:
        found = forms.with_beginning(prompt, columns, "a row")
    except DataError as error:
        assert "a row" in str(error)
        return
    given = {name: value for name, value in columns.items() if value not in (None, "", [], {}, ())}
    if not given:
        assert found is prompt
        return
    said = [(m["role"], m["content"]) for m in found]
    own = (
        [("user", prompt)]
        if isinstance(prompt, str)
        else [(m["role"], m["content"]) for m in prompt]
    )
    pairs = given.get("history", [])
    turns = [turn for q, a in pairs for turn in (("user", q), ("assistant", a))]
    system = [("system", given["system"])] if "system" in given and own[0][0] != "system" else []
    assert said == [*system, *turns, *own]
    kept = [m[VARIABLES]["tools"] for m in found if VARIABLES in m]
    assert bool(kept) == ("tools" in given)
    if kept and not isinstance(given["tools"], str):
        assert kept[0] == without_nones(given["tools"])


@over(
    "data.datasets",
    st.tuples(
        st.lists(any_row(SUPERVISED), max_size=6), st.lists(any_row(SUPERVISED), max_size=3), WAY
    ),
    mutants={
        "self.count += 1": "self.count += 0",
        "place -= len(part)": "place -= len(part) + 1",
        "total.count += part.count": "total.count = part.count",
        "if 0 < total <= self.count:": "if False:",
        "if index == 0 and self._first:": "if False:",
        "except (DataError, TokenizerError) as error:": "except DataError as error:",
    },
    examples=500,
)
def rows_are_used_or_counted(datasets, case):
    """Of two datasets one after the other: kept + left out = there are; none is read twice."""
    one, other, way = case
    parts = [datasets.create_mock_dataset(len(part), None) for part in (one, other)]
    reads = []
    for part, values in zip(parts, (one, other), strict=True):
        type(part).__getitem__ = lambda self, i, values=values: reads.append(i) or values[i]
    rows = datasets.Rows(parts, "prompts", lambda _: [])
    assert len(rows) == len(one) + len(other)
    total = len(rows)
    kept, bad = [], [datasets.BadRows("skip"), datasets.BadRows("skip")]
    if total:
        assert list(rows.preview()) == [0] and rows.peek(0) is [*one, *other][0]
    for i, wanted in enumerate([*one, *other]):
        assert (
            rows.where(i)
            == f"prompts, part {int(i >= len(one))}, row {i - len(one) if i >= len(one) else i}"
        )
        with bad[i % 2].tolerated(rows.where(i)):
            row = rows.read(i)
            assert row is wanted
            kept.append(datasets.prompt_of(row, rows.where(i), TOKENS[way]))
    assert len(reads) == total
    together = bad[0].together(bad)
    assert len(kept) + together.count == total and len(together.reasons) <= min(
        together.count, datasets.SHOWN_REASONS
    )
    try:
        together.report("prompts", total, warn=False)
        assert kept or not total
        again = datasets.Rows(parts, "prompts", lambda _: [])
        assert _prompt_texts(datasets, again, TOKENS[way]) == [p.text or "" for p in kept]
    except DataError:
        assert not kept and total


def _prompt_texts(datasets, rows, tokens):
    """The texts of all prompts, without bad rows."""
    bad, texts = datasets.BadRows("skip"), []
    for index in range(len(rows)):
        where = rows.where(index)
        with bad.tolerated(where):
            texts.append(datasets.prompt_of(rows.read(index), where, tokens).text or "")
    bad.report(rows.name, len(rows))
    return texts


QUALITY = st.sampled_from(
    [
        {},
        {"labels": {"quality": {"value": 0.8}}},
        {"labels": {"quality": {"value": 0.2}}},
        {"labels": None},
    ]
)
FAULT = st.sampled_from([{}, {}, {}, {"deleted": True}, {"review_result": False}, {"lang": "de"}])


@st.composite
def _message(draw, depth=2, role="prompter"):
    own = {
        "message_id": f"m{draw(st.integers(0, 99))}",
        "text": draw(TEXT),
        "role": role,
        "lang": "en",
    }
    own |= draw(QUALITY) | draw(FAULT)
    if role == "assistant":
        own["rank"] = draw(st.none() | st.integers(0, 2))
    other = "assistant" if role == "prompter" else "prompter"
    own |= {28: {"rank": math.nan}, 29: {"rank": 10**400}, 30: {"role": other}}.get(
        draw(st.integers(0, 30)), {}
    )
    own["replies"] = [
        draw(_message(depth - 1, other)) for _ in range(draw(st.integers(0, 3)) if depth else 0)
    ]
    return own


@st.composite
def _tree(draw):
    name = draw(
        st.sampled_from(
            [{"message_tree_id": "t"}, {"message_tree_id": "u"}, {"message_tree_id": "\ud800"}, {}]
        )
    )
    state = draw(
        st.sampled_from([{}, {"tree_state": "ready_for_export"}, {"tree_state": "growing"}])
    )
    tree = copy.deepcopy(name | state | {"prompt": draw(_message())})  # some of it is shared
    if draw(st.integers(0, 9)) == 9:
        tree = _changed(tree, draw(st.sampled_from(list(_places(tree)))), draw(JSON))
    return tree


def _ranked_tree(tree_id, *ranks):
    """A tree whose first message has replies of these ranks, each with its own text."""
    message = {"message_id": tree_id, "text": "ask", "role": "prompter", "lang": "en"}
    replies = [
        message | {"message_id": f"m{k}", "text": f"reply {k}", "role": "assistant", "rank": rank}
        for k, rank in enumerate(ranks)
    ]
    return {"message_tree_id": tree_id, "prompt": message | {"replies": replies}}


@over(
    "data.oasst",
    st.tuples(
        st.lists(_tree(), min_size=1, max_size=4),
        st.sampled_from(["first", "any"]),
        st.none() | st.just(0.5),
        st.integers(0, 3),
    ),
    mutants={
        'if not isinstance(tree, Mapping) or not isinstance(tree.get("prompt"), Mapping):': "if not isinstance(tree, Mapping):",
        'if message["role"] != role:': "if False:",
        "if len(set(ranks)) > 1 and": "if",
        "elif name not in seen and": "elif",
        "self.left_out[reason] += 1": "pass",
        'if reply["rank"] <= worst and': "if",
        "is_rank = rank is None or is_number(rank)": "is_rank = True",
        'return "other_language" if is_other else None': "return None",
    },
    examples=500,
    built=[
        ([_ranked_tree("t", 0, 1), _ranked_tree("u", 0, 1)], "first", None, 0),
        ([_ranked_tree("t", 0, 10**400)], "first", None, 0),
        ([_ranked_tree("t", 0, math.nan)], "first", None, 0),
    ],
)
def any_trees_are_read_or_refused(oasst, case):
    trees, depth, quality, seed = case
    rows = patch.object(oasst, "read_rows", lambda path, name: trees)
    try:
        with rows:
            found = oasst.open_assistant(
                "trees.jsonl",
                shares=(0.4, 0.3, 0.1),
                seed=seed,
                depth=depth,
                ift_depth=depth,
                min_quality=quality,
            )
    except DataError as error:
        assert "trees.jsonl" in str(error)
        return
    assert _alternate([tree["prompt"] for tree in trees], "prompter")
    ready = [t for t in trees if (t.get("tree_state") or "ready_for_export") == "ready_for_export"]
    assert found.left_out.get("tree_not_ready", 0) == len(trees) - len(ready)
    names = {str(t.get("message_tree_id") or t["prompt"]["message_id"]) for t in ready}
    firsts = {}
    for tree in trees:
        firsts.setdefault(str(tree.get("message_tree_id") or tree["prompt"]["message_id"]), tree)
    used = [tree["prompt"] for tree in firsts.values() if any(tree is t for t in ready)]
    deleted = sum(bool(m.get("deleted")) for root in used for m in _walk(root))
    roots = sum(bool(root.get("deleted")) for root in used)
    assert roots <= found.left_out.get("deleted", 0) <= deleted
    seen = [r for r in used if not r.get("deleted") and r.get("review_result") is not False]
    foreign = sum(root.get("lang") != "en" for root in seen)
    assert foreign <= found.left_out.get("other_language", 0)
    groups = [{r.group for r in found.eft_train}, {r.group for r in found.eft_eval}]
    assert not groups[0] & groups[1] and groups[0] | groups[1] <= names
    assert len(found.prompts) <= round(0.2 * len(names) + 1)
    for ranked in (*found.eft_train, *found.eft_eval):
        assert len(ranked.replies) == len(ranked.ranks) >= 2 and len(set(ranked.ranks)) > 1
        assert list(ranked.ranks) == sorted(ranked.ranks) and all(map(math.isfinite, ranked.ranks))
    best = {
        m["text"]
        for tree in trees
        for m in _walk(tree["prompt"])
        if m.get("rank") == 0 and m.get("lang") == "en" and not m.get("deleted")
    }
    assert all(row["completion"] in best for row in found.ift)


def _alternate(messages, role):
    other = "assistant" if role == "prompter" else "prompter"
    return all(m["role"] == role and _alternate(m.get("replies") or [], other) for m in messages)


def _walk(message):
    yield message
    for reply in message.get("replies") or []:
        yield from _walk(reply)
