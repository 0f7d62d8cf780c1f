"""Columns beside role and content, and beside a form's own: passed on, named, or refused."""

import json

import pytest

from self_rewarding_lm.data.files import read_rows
from self_rewarding_lm.data.ranked import as_candidates, ranked_row
from self_rewarding_lm.data.rows import preference_row, prompt_of, training_row
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import DataError
from self_rewarding_lm.records import VARIABLES, columns_of, from_json
from self_rewarding_lm.report.export import write_rows
from tests.data.test_chat import said
from tests.support.hf_models import word_tokenizer

transformers = pytest.importorskip("transformers")

READS = (
    "{%- if tools %}{{- '<|im_start|>tools\n' }}{%- for tool in tools %}{{- tool | tojson }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for d in documents or [] %}{{- '<|im_start|>document\n' + d.text + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role }}"
    "{%- if m.role == 'tool' and m.name %}{{- ' ' + m.name }}{%- endif %}{{- '\n' }}"
    "{%- if m.reasoning_content and loop.last %}"
    "{{- '<think>' + m.reasoning_content + '</think>\n' }}{%- endif %}"
    "{%- if m.content is string %}{{- m.content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if quiet is defined and quiet %}{{- '<think></think>\n' }}{%- endif %}{%- endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}]
ASKED = said("user", "Rain in Bonn?")
CALLED = {"role": "assistant", "content": None, "tool_calls": CALLS}
TOLD = {"role": "tool", "name": "weather", "content": "no"}
ANSWERED = {"role": "assistant", "content": "No.", "reasoning_content": "It said no."}


def opened(template: str = READS, **options) -> Tokens:
    return Tokens(word_tokenizer(template), eos_id=None, vocab=None, **options)


def theirs(tokens: Tokens, messages, generation: bool, **variables) -> tuple[int, ...]:
    """What transformers makes of all that was given."""
    return tuple(
        tokens.source.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=generation,
            return_dict=False,
            **variables,
        )
    )


def learnt(row, tokens: Tokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and completion of a supervised row."""
    ids, targets = training_row(row, "data, row 0", tokens)
    count = targets.index(True)
    assert all(targets[count:])
    return ids[:count], ids[count:]


TALKS = {
    "a call": [ASKED, CALLED],
    "a call with words": [ASKED, {**CALLED, "content": "I look."}],
    "an answer": [ASKED, CALLED, TOLD, ANSWERED],
    "a thought in an earlier turn": [
        ASKED,
        ANSWERED,
        said("user", "Sure?"),
        said("assistant", "Y"),
    ],
    "thinking": [ASKED, {"role": "assistant", "content": "No.", "thinking": "It said no."}],
}


@pytest.mark.parametrize("tools", [None, [WEATHER]])
@pytest.mark.parametrize("talk", TALKS)
def test_what_a_template_reads_reaches_it_from_rows_of_every_form(talk, tools):
    tokens, (*asked, answer) = opened(), TALKS[talk]
    given = {} if tools is None else {"tools": tools}
    prompt = theirs(tokens, asked, True, **given)
    whole = theirs(tokens, [*asked, answer], False, **given)
    newline = tokens.source.encode("\n", add_special_tokens=False)
    columns = given if tools is None else {"tools": json.dumps(tools)}
    for row in (
        {"messages": [*asked, answer], **given},
        {"messages": [*asked, answer], **columns},
        {"conversations": [*asked, answer], **given},
        {"prompt": asked, "completion": [answer], **columns},
    ):
        found = learnt(row, tokens)
        assert found[0] == prompt and (*found[0], *found[1], *newline) == whole
        asked_again = prompt_of(row, "prompts, row 0", tokens)
        assert asked_again.ids == prompt
        kept = json.loads(json.dumps(asked_again.messages))  # as records keep it
        assert tokens.prompt(kept).ids == prompt
    other = said("assistant", "Who knows?")
    for row in (
        {"prompt": asked, "chosen": [answer], "rejected": [other], **given},
        {"chosen": [*asked, answer], "rejected": [*asked, other], **columns},
    ):
        pair = preference_row(row, "pairs, row 0", tokens)
        assert pair.prompt_ids == prompt
        assert (*prompt, *pair.chosen_ids, *newline) == whole
        assert pair.chosen == tokens.decode(pair.chosen_ids) and pair.rejected == "Who knows?"
        again = columns_of(from_json(type(pair), json.loads(json.dumps(_plain(pair)))))
        assert again.get("tools") == tools and VARIABLES not in again
        assert prompt_of({k: again[k] for k in ("prompt", *given)}, "again", tokens).ids == prompt


def _plain(pair) -> dict:
    from dataclasses import fields

    return {field.name: getattr(pair, field.name) for field in fields(pair)}


def test_variables_of_the_template_are_columns_too():
    tokens = opened()
    documents = [{"title": "a", "text": "It rains in Bonn."}]
    row = {"prompt": "Rain?", "documents": documents, VARIABLES: {"quiet": True}}
    wanted = theirs(tokens, [said("user", "Rain?")], True, documents=documents, quiet=True)
    assert prompt_of(row, "row", tokens).ids == wanted
    assert prompt_of({**row, VARIABLES: json.dumps({"quiet": True})}, "row", tokens).ids == wanted


LEAD = [said("system", "Be kind."), said("user", "Hi"), said("assistant", "Hello.")]
COLUMNS = {"system": "Be kind.", "history": [["Hi", "Hello."]]}
FORMS = {
    "prompt": {"prompt": "Who?", "completion": "I."},
    "messages": {"messages": [said("user", "Who?"), said("assistant", "I.")]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]
    },
    "alpaca": {"instruction": "Who?", "output": "I."},
    "dolly": {"instruction": "Who?", "response": "I."},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_system_text_and_earlier_turns_stand_before_a_prompt_of_any_form(form):
    tokens = opened(CHATML)
    row = FORMS[form]
    wanted = learnt({"messages": [*LEAD, said("user", "Who?"), said("assistant", "I.")]}, tokens)
    assert learnt({**row, **COLUMNS}, tokens) == wanted
    assert prompt_of({**row, **COLUMNS}, "row", tokens).ids == wanted[0]
    bare = learnt(row, tokens)
    for empty in (None, "", []):
        for media in ("images", "audio"):
            more = {"system": empty, "history": empty, media: empty, "tools": empty}
            assert learnt({**row, **more, "label": None, "weight": None}, tokens) == bare
    assert learnt({**row, "label": True, "weight": 1.0}, tokens) == bare


def test_they_stand_before_preference_and_ranked_rows():
    tokens = opened(CHATML)
    wanted = tokens.prompt([*LEAD, said("user", "Who?")]).ids
    sides = {"chosen": "I.", "rejected": "You."}
    assert (
        preference_row({"prompt": "Who?", **sides, **COLUMNS}, "row", tokens).prompt_ids == wanted
    )
    for row in ({"replies": ["I.", "You."]}, sides):
        ranked = ranked_row({"prompt": "Who?", **row, **COLUMNS}, "row")
        assert as_candidates(_named(ranked), tokens)[0].ids == wanted


def _named(ranked):
    from dataclasses import replace

    return replace(ranked, id="rank/0")


@pytest.mark.parametrize("form", ["alpaca", "dolly"])
def test_an_instruction_that_is_nowhere_is_named(form):
    row = {**FORMS[form], "instruction": None, "input": None, "context": None}
    with pytest.raises(DataError, match="'instruction' must be a text"):
        training_row(row, "row", opened())
    with pytest.raises(DataError, match="'instruction' must be a text"):
        prompt_of(row, "row", opened())


def test_dollys_context_follows_its_instruction():
    tokens = opened(CHATML)
    row = {"instruction": "Who?", "context": "Ann is here.", "response": "Ann.", "category": "qa"}
    wanted = learnt({"prompt": "Who?\n\nAnn is here.", "completion": "Ann."}, tokens)
    assert learnt(row, tokens) == wanted and prompt_of(row, "row", tokens).ids == wanted[0]
    assert prompt_of({**row, "context": ""}, "row", tokens).text == "Who?"


REFUSED = {
    "an image": ({"images": ["a.png"]}, r"has 'images', which the model does not read"),
    "a sound": ({"audio": {"path": "a.wav"}}, r"has 'audio'"),
    "label": ({"label": False}, "label False: its completion is unwanted"),
    "weight": ({"weight": 0}, "the weight 0, but all supervised rows count equally"),
    "half a weight": ({"weight": 0.5}, r"the weight 0\.5"),
    "tools": ({"tools": "[{"}, "'tools' is not valid JSON"),
    "tools in words": ({"tools": ["weather"]}, "'tools' must be a list of dicts"),
    "history": ({"history": ["Hi"]}, r"history is a list of \[question, answer\]"),
    "system": ({"system": 3}, "'system' must be a text"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_the_meaning_is_refused_in_words(case, form):
    columns, words = REFUSED[case]
    with pytest.raises(DataError, match=f"^data, row 0: .*{words}"):
        learnt({**FORMS[form], **columns}, opened())


PARTS = [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]
MESSAGES = {
    "weight": ({**said("assistant", "I."), "weight": 0}, "has the weight 0"),
    "image": ({**said("assistant", "I."), "images": ["a.png"]}, "'images', which"),
    "empty": ({**said("assistant", ""), "tool_calls": CALLS}, "an empty answer would be learnt"),
    "nothing": ({**said("assistant", None), "tool_calls": CALLS}, "does not read its 'tool_calls'"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_what_changes_the_meaning_of_a_message_is_refused_in_words(case):
    answer, words = MESSAGES[case]
    tokens = opened(CHATML)
    for row in ({"messages": [ASKED, answer]}, {"prompt": [ASKED], "completion": [answer]}):
        with pytest.raises(DataError, match=f"^data, row 0: .*{words}"):
            learnt(row, tokens)
    sides = {"chosen": [ASKED, answer], "rejected": [ASKED, said("assistant", "No.")]}
    with pytest.raises(DataError, match=f"^data, row 0: .*{words}"):
        preference_row(sides, "data, row 0", tokens)


def test_parts_of_text_are_the_text_and_parts_of_images_are_refused():
    tokens = opened(CHATML)
    wanted = tokens.prompt("What is it?").ids
    assert prompt_of([{"role": "user", "content": PARTS}], "row", tokens).ids == wanted
    for kind in ("image", "image_url", "input_audio", "video"):
        seen = [{"role": "user", "content": [{"type": kind, kind: "x"}, *PARTS]}]
        with pytest.raises(DataError, match=f"^row: .*has '{kind}', which the model does not read"):
            prompt_of(seen, "row", tokens)


def test_what_nothing_reads_is_named_once_with_its_column(caplog):
    tokens = opened(CHATML)
    row = {"messages": [ASKED, {**ANSWERED, "name": "Ann"}], "source": "web", "none": None}
    for _ in range(3):
        learnt(row, tokens)
    prompt_of({"prompt": "Who?", "tools": [WEATHER], "url": "x"}, "prompts, row 4", tokens)
    preference_row({"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}, "row 2", tokens)
    words = [record.message for record in caplog.records]
    assert len(words) == 5 and all("nothing reads" in each for each in words)
    for name in ("'source'", "'name'", "'reasoning_content'", "'tools'", "'score'"):
        assert sum(name in each for each in words) == 1
    assert "messages of the role assistant" in next(w for w in words if "'name'" in w)
    assert not any("none" in each or "url" in each for each in words)


def test_what_a_template_reads_is_not_named(caplog):
    tokens = opened()
    for talk in TALKS.values():
        learnt({"messages": talk, "tools": [WEATHER]}, tokens)
    assert not caplog.records


def test_without_a_template_texts_stay_texts_and_tools_are_named(caplog):
    tokens = opened(chat_template="raw")
    row = {"prompt": "Who?", "completion": "I.", "tools": [WEATHER]}
    assert learnt(row, tokens) == learnt({"prompt": "Who?", "completion": "I."}, tokens)
    assert ["'tools'" in record.message for record in caplog.records] == [True]


def test_control_tokens_in_calls_and_tools_are_text():
    tokens = opened()
    end = tokens.source.convert_tokens_to_ids("<|im_end|>")
    for attack in ("<|im_end|>", "</s>"):
        calls = [
            {"type": "function", "function": {"name": attack, "arguments": {attack: [attack]}}}
        ]
        tool = {"type": "function", "function": {"name": "weather", "description": attack}}
        talk = [ASKED, {**CALLED, "tool_calls": calls}]
        calm = learnt({"messages": TALKS["a call"], "tools": [WEATHER]}, tokens)
        prompt, response = learnt({"messages": talk, "tools": [tool]}, tokens)
        assert prompt.count(end) == calm[0].count(end) and response.count(end) == 1
        assert 2 not in (*prompt, *response)
        assert tokens.source.decode(response).count(attack) == 3 + (attack == "<|im_end|>")


def test_prompts_of_ids_have_nothing_before_them():
    tokens = opened()
    for columns in ({"system": "Be kind."}, {"tools": [WEATHER]}):
        with pytest.raises(DataError, match="this prompt is token ids"):
            prompt_of({"prompt": [9, 8], **columns}, "row", tokens)
    with pytest.raises(DataError, match="a message needs a prompt of texts or messages"):
        learnt({"prompt": [9, 8], "completion": [CALLED]}, tokens)


def test_a_run_of_the_first_format_reads_what_it_read():
    tokens = opened(CHATML, rules=1)
    for form, row in FORMS.items():
        if form == "dolly":
            continue
        more = {**COLUMNS, "tools": [WEATHER], "label": False, "images": ["a.png"]}
        assert learnt({**row, **more}, tokens) == learnt(row, tokens)
        assert prompt_of({**row, **more}, "row", tokens).ids == learnt(row, tokens)[0]
        assert prompt_of({**row, **more}, "row", tokens).columns["system"] == "Be kind."
    talk = {"messages": [ASKED, {**ANSWERED, "weight": 0}]}
    assert learnt(talk, tokens) == learnt({"messages": [ASKED, said("assistant", "No.")]}, tokens)


def test_exports_have_tools_as_a_column_though_the_first_row_has_none(tmp_path):
    pytest.importorskip("pyarrow")
    tokens = opened()
    rows = [
        {"prompt": [ASKED], "chosen": "Yes.", "rejected": "No."},
        {"prompt": [ASKED], "chosen": "I look.", "rejected": "No.", "tools": [WEATHER]},
    ]
    pairs = [preference_row(row, "row", tokens) for row in rows]
    for name in ("rows.parquet", "rows.jsonl"):
        write_rows(tmp_path / name, [columns_of(pair) for pair in pairs])
        again = read_rows(tmp_path / name, "rows")
        for pair, row in zip(pairs, again, strict=True):
            assert preference_row(row, "again", tokens) == pair
