"""One row as token ids: prompts, supervised rows, preferences; and the forms they may have.

The tokenizer of these tests: a is 1, b is 2, ... and the end token is 0. The vocabulary has 30.
Its template writes u, s or a before a message of the user, the system or the assistant, and the
end token after an answer; so the message "b" of a user, to be answered, is "uba": 21, 2, 1.
"""

import numpy as np
import pytest
from torch import tensor

from self_rewarding_lm.data.chat import TEMPLATES
from self_rewarding_lm.data.ranked import ranked_row
from self_rewarding_lm.data.rows import (
    PromptRow,
    preference_row,
    prompt_and_completion,
    prompt_of,
    training_row,
    truncated,
)
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import DataError, TokenizerError
from self_rewarding_lm.records import Demonstration, PreferencePair, RankedReplies
from tests.support.hf_models import word_tokenizer

EOS = 0


def letters(text):
    return [ord(c) - 96 for c in text]


def text_of(ids):
    return "".join(chr(96 + i) for i in ids.tolist())


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}"
    "{% if m.role == 'assistant' %}`{% endif %}{% endfor %}"  # ` is token 0
    "{% if add_generation_prompt %}a{% endif %}"
)
TOKENIZER = CallableTokenizer(letters, text_of)
TOKENS = Tokens(TOKENIZER, eos_id=EOS, vocab=30)
WITHOUT_EOS = Tokens(TOKENIZER, eos_id=None, vocab=30)
WITHOUT_TEXT = Tokens(None, eos_id=EOS, vocab=30)
CHAT = Tokens(TOKENIZER, eos_id=EOS, vocab=30, chat_template=TEMPLATE)
T, F = True, False


# Supervised rows

SUPERVISED = {
    "ids and prompt_len": ((tensor([1, 2, 3, 4]), 2), (1, 2, 3, 4), (F, F, T, T)),
    "ids and prompt_len as a tensor": ((tensor([1, 2, 3]), tensor(1)), (1, 2, 3), (F, T, T)),
    "lists": (([1, 2, 3, 4], 2), (1, 2, 3, 4), (F, F, T, T)),
    "a pair from JSON": ([[1, 2, 3, 4], 3], (1, 2, 3, 4), (F, F, F, T)),
    "arrays": ((np.array([1, 2, 3]), np.array([T, T, F])), (1, 2, 3), (F, F, T)),
    "an array of ids and its number": ((np.array([1, 2, 3]), np.int64(1)), (1, 2, 3), (F, T, T)),
    "a text and prompt_len": (("abc", 1), (1, 2, 3), (F, T, T)),
    "no prompt: the first token has nothing before it": (([1, 2, 3], 0), (1, 2, 3), (F, T, T)),
    "ids and prompt_mask": ((tensor([1, 2, 3]), tensor([T, T, F])), (1, 2, 3), (F, F, T)),
    "prompt_mask as a list": (([1, 2, 3, 4], [T, F, T, F]), (1, 2, 3, 4), (F, T, F, T)),
    "prompt and completion": (
        {"prompt": "ab", "completion": "cd"},
        (1, 2, 3, 4, EOS),
        (F, F, T, T, T),
    ),
    "prompt and completion as ids": (
        {"prompt": [1, 2], "completion": tensor([3, 4])},
        (1, 2, 3, 4),
        (F, F, T, T),
    ),
    "other columns": ({"prompt": "a", "completion": "b", "id": 7}, (1, 2, EOS), (F, T, T)),
    "text": ({"text": "abc"}, (1, 2, 3, EOS), (F, T, T, T)),
    "text as ids": ({"text": [1, 2, 3]}, (1, 2, 3, EOS), (F, T, T, T)),
    "a pair of an earlier stage": (
        PreferencePair("dpo/0", (1, 2), (3, EOS), (4, EOS)),
        (1, 2, 3, EOS),
        (F, F, T, T),
    ),
}


@pytest.mark.parametrize(("row", "ids", "targets"), SUPERVISED.values(), ids=SUPERVISED)
def test_a_supervised_row_gives_these_ids_and_targets(row, ids, targets):
    assert training_row(row, "row", TOKENS) == (ids, targets)


def test_trap_18_the_end_token_is_put_behind_texts_and_is_the_last_target():
    for row in ({"prompt": "a", "completion": "b"}, {"text": "ab"}):
        ids, targets = training_row(row, "row", TOKENS)
        assert (ids[-1], targets[-1]) == (EOS, True)


def test_an_end_token_that_is_there_already_is_not_doubled():
    ids, _ = training_row({"prompt": "a", "completion": "b`"}, "row", TOKENS)  # ` is token 0
    assert ids == (1, 2, EOS)


def test_ids_get_no_end_token():
    assert training_row({"prompt": [1], "completion": [2, 3]}, "row", TOKENS)[0] == (1, 2, 3)
    assert training_row(([1, 2, 3], 1), "row", TOKENS)[0] == (1, 2, 3)


def test_texts_get_no_end_token_where_none_is_known():
    assert training_row({"text": "ab"}, "row", WITHOUT_EOS) == ((1, 2), (F, T))


def test_trap_22_token_0_in_the_ids_is_a_target_like_any_other():
    assert training_row(([0, 1, 0, 0], 2), "row", WITHOUT_EOS) == ((0, 1, 0, 0), (F, F, T, T))


NOT_SUPERVISED = {
    "ids alone": (tensor([1, 2, 3]), "a supervised row is"),
    "a text alone": ("abc", "a supervised row is"),
    "two letters": ("ab", "a supervised row is"),
    "a number": (3, "got int '3'"),
    "nothing": (None, "a supervised row is"),
    "three parts": (([1], 1, 1), "a supervised row is"),
    "no completion": ({"prompt": "a"}, "has no 'completion'; it has 'prompt'"),
    "other columns": ({"topic": "a"}, "has no 'prompt' and no 'completion'; it has 'topic'"),
    "a form with a column too few": ({"question": "a", "answer": "b"}, "has no 'choices'"),
    "an instruction without output": ({"instruction": "a", "input": "b"}, "has no 'output'"),
    "an empty dict": ({}, "it has nothing"),
    "prompt_len beyond the row": (([1, 2, 3], 4), "an int from 0 to 3"),
    "prompt_len below 0": (([1, 2, 3], -1), "an int from 0 to 3"),
    "prompt_len of float": (([1, 2, 3], 1.5), "an int from 0 to 3"),
    "prompt_len of bool": (([1, 2, 3], True), "an int from 0 to 3"),
    "a mask of another length": (([1, 2, 3], [True, False]), "3 booleans"),
    "a mask of numbers": (([1, 2, 3], [1, 0, 0]), "3 booleans"),
    "the prompt takes all": (([1, 2, 3], 3), "nothing to learn"),
    "the mask takes all": (([1, 2], [True, True]), "nothing to learn"),
    "one token": (([1], 0), "nothing to learn"),
    "no token": (([], 0), "nothing to learn"),
    "an empty completion of ids": ({"prompt": "a", "completion": []}, "the completion is empty"),
}


@pytest.mark.parametrize(("row", "words"), NOT_SUPERVISED.values(), ids=NOT_SUPERVISED)
def test_a_row_that_is_not_supervised_is_an_error_that_names_it(row, words):
    with pytest.raises(DataError, match=f"train_dataset, row 17.*{words}"):
        training_row(row, "train_dataset, row 17", TOKENS)


def test_an_empty_completion_text_teaches_the_end_token_alone():
    ids, targets = training_row({"prompt": "a", "completion": ""}, "row", TOKENS)
    assert (ids, targets) == ((1, EOS), (F, T))


# Preference rows


@pytest.mark.parametrize(
    ("row", "ids"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "cd"}, ((1,), (2, EOS), (3, 4, EOS))),
        ({"prompt": [1], "chosen": [2], "rejected": tensor([3, 4])}, ((1,), (2,), (3, 4))),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, ((1,), (2, EOS), (EOS,))),
    ],
    ids=["texts", "ids", "an empty answer ends at once"],
)
def test_a_preference_row_gives_these_ids(row, ids):
    pair = preference_row(row, "row", TOKENS)
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ids


def test_a_preference_row_of_texts_keeps_them_and_one_of_ids_has_none():
    pair = preference_row({"prompt": "a", "chosen": "b", "rejected": "c"}, "row", TOKENS)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("a", "b", "c")
    pair = preference_row({"prompt": [1], "chosen": [2], "rejected": [3]}, "row", TOKENS)
    assert (pair.prompt, pair.chosen, pair.rejected) == (None, None, None)


def test_a_pair_of_an_earlier_stage_is_taken_as_it_is():
    pair = PreferencePair("sr/0", (1,), (2,), (3,))
    assert preference_row(pair, "row", TOKENS) is pair


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("a", "b", "c"), "a preference row is"),
        ({"prompt": "a", "chosen": "b"}, "has no 'rejected'; it has 'prompt', 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        ({"prompt": [1], "chosen": [2], "rejected": []}, "rejected is empty"),
        ({"prompt": [], "chosen": [2], "rejected": [3]}, "the prompt is empty"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
        (PreferencePair("p", (), (1, 2), (3,)), "the prompt is empty"),
    ],
)
def test_a_row_that_is_no_preference_is_an_error_that_names_it(row, words):
    with pytest.raises(DataError, match=f"row 17.*{words}"):
        preference_row(row, "train_dataset, row 17", TOKENS)


# Prompt rows


@pytest.mark.parametrize(
    ("row", "ids", "text", "columns"),
    [
        ("ab", (1, 2), "ab", None),
        ({"prompt": "ab"}, (1, 2), "ab", None),
        ({"prompt": [1, 2], "topic": "x", "n": 3}, (1, 2), "ab", {"topic": "x", "n": 3}),
        ({"prompt": "a", "big": [1], "no": {1}}, (1,), "a", {"big": [1]}),
        ([1, 2], (1, 2), "ab", None),
        (tensor([1, 2]), (1, 2), "ab", None),
        (np.array([1, 2]), (1, 2), "ab", None),
        ((1, 2), (1, 2), "ab", None),
    ],
    ids=str,
)
def test_a_prompt_row_gives_its_text_its_ids_and_its_plain_columns(row, ids, text, columns):
    assert prompt_of(row, "row", TOKENS) == PromptRow(ids, text, None, columns)


def test_a_prompt_of_ids_has_no_text_without_a_tokenizer():
    assert prompt_of([1, 2], "row", WITHOUT_TEXT) == PromptRow((1, 2), None)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ({"text": "a"}, "has no 'prompt'; it has 'text'"),
    ],
)
def test_a_row_without_a_prompt_is_an_error_that_names_it(row, words):
    with pytest.raises(DataError, match=f"row 17.*{words}"):
        prompt_of(row, "prompt_dataset, row 17", TOKENS)


@pytest.mark.parametrize("row", [None, 3, 2.5, {"prompt": None}], ids=str)
def test_a_prompt_that_is_neither_text_nor_ids_is_an_error_that_names_its_row(row):
    with pytest.raises((TokenizerError, DataError), match="row 17"):
        prompt_of(row, "prompt_dataset, row 17", TOKENS)


@pytest.mark.parametrize(
    ("read", "row", "whose"),
    [
        (prompt_of, None, "the prompt"),
        (prompt_of, {"prompt": None}, "the prompt"),
        (training_row, {"prompt": "ab", "completion": None}, "the completion"),
        (preference_row, {"prompt": "ab", "chosen": None, "rejected": "b"}, "chosen"),
        (preference_row, {"prompt": "ab", "chosen": "b", "rejected": None}, "rejected"),
    ],
)
def test_what_is_null_is_told_so_with_its_row(read, row, whose):
    with pytest.raises(
        DataError, match=rf"row 17: {whose} must be .*it is None\. .*on_bad_row='skip'"
    ):
        read(row, "train_dataset, row 17", TOKENS)


# A prompt and its completion


@pytest.mark.parametrize(
    "row",
    [{"prompt": "ab", "completion": "c"}, ([1, 2, 3, EOS], 2), ([1, 2, 3, EOS], [T, T, F, F])],
    ids=str,
)
def test_a_supervised_row_is_cut_between_prompt_and_completion(row):
    prompt, completion = prompt_and_completion(row, "row", TOKENS)
    assert (prompt, completion) == (PromptRow((1, 2), "ab"), (3, EOS))


@pytest.mark.parametrize(
    "row", [{"text": "abc"}, ([1, 2, 3], [T, F, T]), ([1, 2, 3, 4], [T, F, T, F])], ids=str
)
def test_a_row_that_is_no_prompt_with_its_completion_is_an_error(row):
    with pytest.raises(DataError, match=r"row 17.* a prompt followed by a completion"):
        prompt_and_completion(row, "train_dataset, row 17", TOKENS)


def test_a_row_without_a_prompt_cannot_be_answered():
    with pytest.raises(DataError, match="a prompt followed by a completion"):
        prompt_and_completion(([1, 2, 3], 0), "row", TOKENS)


# Cutting


def test_a_row_is_cut_at_its_end():
    assert truncated((1, 2, 3, 4), 2, 3, "row") == ((1, 2, 3), True)


def test_a_row_that_fits_is_left_alone():
    for limit in (4, 9, None):
        assert truncated((1, 2, 3, 4), 4, limit, "row") == ((1, 2, 3, 4), False)


def test_a_prompt_that_leaves_no_room_for_a_response_is_an_error():
    assert truncated((1, 2, 3, 4), 2, 3, "row") == ((1, 2, 3), True)
    with pytest.raises(
        DataError,
        match=r"row 17.*3 tokens.*together may have 3: no room.*on_bad_row='skip'.*max_seq_len",
    ):
        truncated((1, 2, 3, 4), 3, 3, "train_dataset, row 17")


# Messages, and the template's ids


def said(role, text):
    return {"role": role, "content": text}


USER, BOT, SYSTEM = said("user", "b"), said("assistant", "c"), said("system", "d")
TALK = [SYSTEM, USER, BOT, said("user", "e"), said("assistant", "f")]
# s d u b a c ` u e a | f `
TALK_IDS, TALK_PROMPT = (19, 4, 21, 2, 1, 3, EOS, 21, 5, 1, 6, EOS), 10

CHATS = {
    "a text is a user's message": ({"prompt": "b", "completion": "c"}, (21, 2, 1, 3, EOS), 3),
    "messages as the prompt": (
        {"prompt": [SYSTEM, USER], "completion": "c"},
        (19, 4, 21, 2, 1, 3, EOS),
        5,
    ),
    "messages as both": ({"prompt": [USER], "completion": [BOT]}, (21, 2, 1, 3, EOS), 3),
    "a conversation": ({"messages": TALK}, TALK_IDS, TALK_PROMPT),
    "a bare conversation": (TALK, TALK_IDS, TALK_PROMPT),
    "two bare messages": ([USER, BOT], (21, 2, 1, 3, EOS), 3),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "d"},
                {"from": "human", "value": "b"},
                {"from": "gpt", "value": "c"},
                {"from": "user", "value": "e"},
                {"from": "assistant", "value": "f"},
            ]
        },
        TALK_IDS,
        TALK_PROMPT,
    ),
    "ids stay ids": ({"prompt": [2], "completion": [3]}, (2, 3), 1),
    "a text after ids": ({"prompt": [2], "completion": "c"}, (2, 3, EOS), 1),
    "a text alone goes through no template": ({"text": "bc"}, (2, 3, EOS), 0),
}


@pytest.mark.parametrize(("row", "ids", "prompt"), CHATS.values(), ids=CHATS)
def test_a_template_renders_texts_and_messages(row, ids, prompt):
    targets = tuple(i > 0 and i >= prompt for i in range(len(ids)))
    assert training_row(row, "row", CHAT) == (ids, targets)


PROMPTED = {name: case for name, case in CHATS.items() if case[2] > 0}


@pytest.mark.parametrize(("row", "ids", "prompt"), PROMPTED.values(), ids=PROMPTED)
def test_trap_7_what_is_generated_from_is_what_is_trained_on(row, ids, prompt):
    assert prompt_of(row, "row", CHAT).ids == ids[:prompt]
    assert prompt_and_completion(row, "row", CHAT)[0].ids == ids[:prompt]


def test_a_rendered_prompt_keeps_its_messages_and_a_text_for_people():
    assert prompt_of("b", "row", CHAT) == PromptRow((21, 2, 1), "b", (USER,))
    found = prompt_of({"messages": TALK[:4], "topic": "x"}, "row", CHAT)
    assert found.messages == tuple(TALK[:4])
    assert found.text == "System: d\n\nUser: b\n\nAssistant: c\n\nUser: e"
    assert found.columns == {"topic": "x"}
    assert prompt_of([2], "row", CHAT) == PromptRow((2,), "b")


def test_messages_of_a_prompt_row_that_end_in_an_answer_are_asked_again_without_it():
    for row in ({"messages": TALK}, {"messages": TALK[:4]}, TALK):
        assert prompt_of(row, "row", CHAT).ids == TALK_IDS[:TALK_PROMPT]


def test_a_text_that_was_rendered_before_gets_no_second_end_token():
    words = Tokens(
        CallableTokenizer(lambda text: [0 if c == "`" else ord(c) - 31 for c in text], spaced),
        eos_id=EOS,
        vocab=99,
        chat_template=TEMPLATE,
    )
    assert training_row({"text": "ab` "}, "row", words)[0] == (66, 67, EOS, 1)  # 1 is the space
    assert training_row({"text": "ab`c"}, "row", words)[0] == (66, 67, EOS, 68, EOS)


def spaced(ids):
    return "".join("`" if i == 0 else chr(31 + i) for i in ids.tolist())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [USER]}, "the last message must be the assistant's.*roles are user"),
        ({"messages": [USER, BOT, USER]}, "roles are user, assistant, user"),
        ({"messages": [BOT]}, "with a prompt before it"),
        ({"messages": []}, "messages are a list of at least one"),
        ({"messages": [{"role": "user"}]}, "a message is"),
        (
            {"prompt": [USER, BOT], "completion": "c"},
            "the prompt's last message is the assistant's",
        ),
        ({"prompt": "b", "completion": [USER]}, "must be one message, the assistant's; got user"),
        ({"prompt": "b", "completion": [BOT, BOT]}, "got assistant, assistant"),
        ({"conversations": [{"from": "bing", "value": "b"}]}, "a turn is .*human or user or gpt"),
        ({"conversations": "abc"}, "conversations are a list of turns"),
        ({"conversations": [{"from": "human", "value": "b"}]}, "the last message must be"),
    ],
    ids=str,
)
def test_messages_that_are_no_answered_prompt_are_an_error(row, words):
    with pytest.raises(DataError, match=f"row 17.*{words}"):
        training_row(row, "train_dataset, row 17", CHAT)


def test_a_prompt_that_renders_otherwise_once_it_is_answered_is_an_error():
    longer = "{% if messages | length > 1 %}x{% endif %}" + TEMPLATE
    tokens = Tokens(TOKENIZER, eos_id=EOS, vocab=30, chat_template=longer)
    with pytest.raises(DataError, match=r"row 17.*generate from one text and train on another"):
        training_row({"prompt": "b", "completion": "c"}, "row 17", tokens)


def test_a_record_of_an_earlier_stage_is_a_row_as_it_is():
    made = Demonstration("eft/0/1", (1, 2), (3, EOS), "ab", "c")
    assert training_row(made, "row", CHAT) == ((1, 2, 3, EOS), (F, F, T, T))
    assert prompt_and_completion(made, "row", CHAT) == (PromptRow((1, 2), "ab"), (3, EOS))
    assert prompt_of(made, "row", CHAT) == PromptRow((1, 2), "ab")
    pair = PreferencePair("sr/0/0", (1,), (2, EOS), (3,), "a", messages=(USER,))
    assert prompt_and_completion(pair, "row", CHAT) == (PromptRow((1,), "a", (USER,)), (2, EOS))
    assert prompt_of(pair, "row", CHAT) == PromptRow((1,), "a", (USER,))


# Alpaca and multiple choice. Their texts hold more than letters.

TEXTS = Tokens(
    CallableTokenizer(lambda text: [ord(c) for c in text], lambda ids: "".join(map(chr, ids))),
    eos_id=EOS,
    vocab=128,
)


def parts_of(row):
    prompt, completion = prompt_and_completion(row, "row", TEXTS)
    assert completion[-1] == EOS
    return prompt.text, TEXTS.decode(completion)


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}, {"input": " \n"}], ids=str)
def test_an_alpaca_row_without_input_asks_the_instruction_alone(empty):
    assert parts_of({"instruction": "Say hi", "output": "hi", **empty}) == ("Say hi", "hi")


def test_an_alpaca_row_with_input_has_it_below_a_blank_line():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "text": "Below is an instruction"}
    assert parts_of(row) == ("Add\n\n1 2", "3")
    found = prompt_of(row, "row", TEXTS)
    assert found.columns == {"output": "3", "text": "Below is an instruction"}


CAPITAL = {"question": "Capital of Peru?", "choices": ["Quito", "Lima", "La Paz"]}
ASKED = "Capital of Peru?\n\nA. Quito\nB. Lima\nC. La Paz"


@pytest.mark.parametrize("answer", [1, "B", "b", "Lima"])
def test_a_multiple_choice_row_is_answered_by_letter_and_text(answer):
    assert parts_of({**CAPITAL, "answer": answer}) == (ASKED, "B. Lima")


def test_a_multiple_choice_row_as_a_prompt_keeps_its_answer_as_a_column():
    found = prompt_of({**CAPITAL, "answer": 1, "subject": "geography"}, "row", TEXTS)
    assert found.text == ASKED
    assert found.columns == {
        "choices": CAPITAL["choices"],
        "answer": 1,
        "subject": "geography",
    }


def test_a_choice_that_is_a_letter_is_meant_by_its_text():
    row = {"question": "?", "choices": ["B", "A"], "answer": "A"}
    assert parts_of(row)[1] == "B. A"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer": 3}, "place from 0 to 2, a letter from A to C.*got 3"),
        ({"answer": -1}, "got -1"),
        ({"answer": True}, "got True"),
        ({"answer": "D"}, "got 'D'"),
        ({"answer": "Bogota"}, "got 'Bogota'"),
        ({"choices": ["Lima", "Lima"], "answer": "Lima"}, "the text of one choice"),
        ({"choices": ["Lima"], "answer": 0}, "a list of 2 to 26 texts"),
        ({"choices": [1, 2], "answer": 0}, "a list of 2 to 26 texts"),
        ({"choices": "ABC", "answer": 0}, "a list of 2 to 26 texts; got str 'ABC'"),
        ({"question": 3, "answer": 0}, "'question' must be a text; got int"),
    ],
    ids=str,
)
def test_a_multiple_choice_row_that_cannot_be_read_is_an_error(changes, words):
    with pytest.raises(DataError, match=f"row 17.*{words}"):
        training_row({**CAPITAL, **changes}, "row 17", TEXTS)


def test_columns_of_none_are_no_columns():
    """Rows of several forms in one table have all columns, most of them empty."""
    row = {"prompt": None, "completion": None, "messages": [USER, BOT], "text": None}
    assert training_row(row, "row", CHAT)[0] == (21, 2, 1, 3, EOS)
    assert prompt_of(row, "row", CHAT).ids == (21, 2, 1)


def test_an_unknown_row_is_told_the_forms_and_its_own_columns():
    with pytest.raises(DataError) as caught:
        training_row({"frage": "a", "antwort": "b"}, "rows.jsonl, line 3", TOKENS)
    for words in (
        "rows.jsonl, line 3",
        "'frage', 'antwort'",
        "(ids, prompt_len)",
        '{"prompt", "completion"}',
        '{"messages"}',
        '{"conversations"}',
        '{"instruction", "output"}',
        '{"question", "choices", "answer"}',
        '{"text"}',
    ):
        assert words in str(caught.value)


# Preferences of messages


SHARED = [SYSTEM, USER]
GOOD, BAD = said("assistant", "g"), said("assistant", "h")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": SHARED, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": SHARED, "chosen": "g", "rejected": "h"},
        {"chosen": [*SHARED, GOOD], "rejected": [*SHARED, BAD]},
        {"prompt": SHARED, "chosen": [*SHARED, GOOD], "rejected": [*SHARED, BAD]},
        {"prompt": "b", "chosen": [*SHARED, GOOD], "rejected": [*SHARED, BAD]},
        {"prompt": None, "chosen": [*SHARED, GOOD], "rejected": [*SHARED, BAD], "score": 1},
    ],
    ids=["messages", "texts", "implicit prompt", "both", "its last text", "an empty column"],
)
def test_preferences_of_messages_are_the_same_pair_in_every_form(row):
    pair = preference_row(row, "row", CHAT)
    assert pair.prompt_ids == (19, 4, 21, 2, 1)
    assert (pair.chosen_ids, pair.rejected_ids) == ((7, EOS), (8, EOS))
    assert (pair.chosen, pair.rejected) == ("g", "h")
    assert pair.messages == tuple(SHARED)
    assert pair.prompt == "System: d\n\nUser: b"
    assert prompt_of(row, "row", CHAT).ids == pair.prompt_ids


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "g", "rejected": "h"}, "without a prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "without a prompt"),
        (
            {"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]},
            "must share all messages but the last",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, BAD]}, "have 2 and 3 messages"),
        ({"chosen": [USER, USER], "rejected": [USER, USER]}, "must be the assistant's"),
        (
            {"prompt": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "a prompt of their own, which is not the row's",
        ),
        ({"prompt": "b", "chosen": [USER, GOOD], "rejected": "h"}, "chosen must be one message"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "the same"),
    ],
    ids=str,
)
def test_messages_that_are_no_preference_are_an_error(row, words):
    with pytest.raises(DataError, match=f"row 17.*{words}"):
        preference_row(row, "row 17", CHAT)


# Ranked rows


RANKINGS = {
    "best first": ({"prompt": "a", "replies": ["x", "y", "z"]}, "a", ("x", "y", "z"), (0, 1, 2)),
    "with ranks": (
        {"prompt": "a", "replies": ["x", "y"], "ranks": [3, 1.5]},
        "a",
        ("x", "y"),
        (3, 1.5),
    ),
    "some not ordered": (
        {"prompt": "a", "replies": ["x", "y", "z"], "ranks": [0, 1, 1]},
        "a",
        ("x", "y", "z"),
        (0, 1, 1),
    ),
    "messages": (
        {"prompt": [SYSTEM, USER], "replies": ["x", "y"]},
        (SYSTEM, USER),
        ("x", "y"),
        (0, 1),
    ),
    "multiple choice": (
        {**CAPITAL, "answer": "B"},
        ASKED,
        ("A. Quito", "B. Lima", "C. La Paz"),
        (1, 0, 1),
    ),
    "a preference": ({"prompt": "a", "chosen": "x", "rejected": "y"}, "a", ("x", "y"), (0, 1)),
    "a preference of messages": (
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        (USER,),
        ("g", "h"),
        (0, 1),
    ),
    "LLMBar, the first": (
        {"input": "a", "output_1": "x", "output_2": "y", "label": 1},
        "a",
        ("x", "y"),
        (0, 1),
    ),
    "LLMBar, the second": (
        {"input": "a", "output_1": "x", "output_2": "y", "label": 2},
        "a",
        ("x", "y"),
        (1, 0),
    ),
}


@pytest.mark.parametrize(("row", "prompt", "replies", "ranks"), RANKINGS.values(), ids=RANKINGS)
def test_a_ranked_row_gives_these_replies_and_ranks(row, prompt, replies, ranks):
    ranking = ranked_row(row, "row")
    assert (ranking.prompt, ranking.replies, ranking.ranks) == (prompt, replies, ranks)
    assert ranking.id == ""
    if isinstance(prompt, str):
        assert prompt_of(row, "row", TEXTS).text == prompt


def test_rows_of_one_prompt_are_one_group_unless_they_name_another():
    one, other = {"prompt": "a", "replies": ["x", "y"]}, {"prompt": "b", "replies": ["x", "y"]}
    again = {"prompt": "a", "chosen": "z", "rejected": "y"}
    assert ranked_row(one, "row").group == ranked_row(again, "row").group
    assert ranked_row(one, "row").group != ranked_row(other, "row").group
    assert ranked_row({**one, "group": 7}, "row").group == "7"


def test_a_ranking_that_is_one_is_taken_as_it_is():
    ranking = RankedReplies("id", "a", ("x", "y"), (0.0, 1.0), "tree")
    assert ranked_row(ranking, "row") is ranking
    assert prompt_of(ranking, "row", TOKENS) == PromptRow((1,), "a")
    with pytest.raises(DataError, match=r"row 17.*at least two replies"):
        ranked_row(RankedReplies("id", "a", ("x",), (0.0,), "tree"), "row 17")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a", "a ranked row is a dict"),
        ({"prompt": "a"}, r"has no 'replies'; it has 'prompt'\. A ranked row is"),
        ({"prompt": "a", "replies": ["x"]}, "at least two replies.*1 reply and 1 rank"),
        ({"prompt": "a", "replies": ["x", "y"], "ranks": [0]}, "2 replies and 1 rank"),
        ({"prompt": "a", "replies": ["x", "y"], "ranks": [1, 1]}, "all 2 replies have the rank 1;"),
        ({"prompt": "a", "replies": ["x", "y"], "ranks": [0, None]}, "ranks must be numbers"),
        (
            {"prompt": "a", "replies": ["x", "y"], "ranks": [0, float("nan")]},
            "ranks must be numbers",
        ),
        ({"prompt": "a", "replies": ["x", "y"], "ranks": [False, True]}, "ranks must be numbers"),
        ({"prompt": "a", "replies": "xy"}, "replies must be a list"),
        ({"prompt": "a", "replies": ["x", [1]]}, "a reply must be a text; got list"),
        ({"prompt": [1], "replies": ["x", "y"]}, "the prompt must be a text or a list of messages"),
        ({"prompt": "", "replies": ["x", "y"]}, "the prompt must be a text"),
        ({"prompt": [USER, BOT], "replies": ["x", "y"]}, "last message is the assistant's"),
        (
            {"input": "a", "output_1": "x", "output_2": "y", "label": 0},
            "label must be 1 or 2.*got 0",
        ),
    ],
    ids=str,
)
def test_a_row_that_is_no_ranking_is_an_error_that_names_it(row, words):
    with pytest.raises(DataError, match=f"row 17.*{words}"):
        ranked_row(row, "row 17")


# Tokenizers of transformers


def test_a_hugging_face_tokenizer_trains_on_what_is_generated_from():
    """By its own template, which ends turns with <|im_end|> and puts a newline after."""
    pytest.importorskip("transformers")
    tokenizer = word_tokenizer(TEMPLATES["chatml"], adds_bos=True)
    tokens = Tokens(tokenizer, eos_id=None, vocab=300)
    row = {"messages": [said("user", "b"), said("assistant", "c")]}
    prompt, completion = prompt_and_completion(row, "row", tokens)
    text = "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    assert list(prompt.ids) == tokenizer.encode(text, add_special_tokens=False)
    assert list(completion) == tokenizer.encode("c<|im_end|>", add_special_tokens=False)
    whole = training_row({"text": text + "c<|im_end|>\n"}, "row", tokens)[0]
    assert list(whole) == tokenizer.encode(text + "c<|im_end|>\n")  # begin token, no second end


@pytest.mark.parametrize("speaker", [[], {}, ["human"], 3])
def test_a_speaker_that_is_no_word_is_refused(speaker):
    with pytest.raises(DataError, match=r"^row: a turn is"):
        prompt_of({"conversations": [{"from": speaker, "value": "a"}]}, "row", TOKENS)


def test_a_rank_too_large_for_a_float_is_refused():
    row = {"prompt": "a", "replies": ["b", "c"], "ranks": [0, 10**400]}
    with pytest.raises(DataError, match=r"^row: ranks must be numbers"):
        ranked_row(row, "row")
