"""Chat templates: the texts of the named ones, and ours against transformers' rendering."""

import pytest

from self_rewarding_lm.data.chat import (
    TEMPLATES,
    is_messages,
    messages_of,
    renderer,
    template_text,
    transcript,
)
from self_rewarding_lm.errors import ConfigError, DataError


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [said("system", "Be kind."), said("user", " Hi? "), said("assistant", "Yes.\n")]
EXPECTED = {
    "plain": (
        "System:\nBe kind.\n\nUser:\n Hi? \n\nAssistant:\nYes.\n</s>\n\n",
        "User:\nWho?\n\nAssistant:\n",
    ),
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Hi? <|im_end|>\n"
        "<|im_start|>assistant\nYes.\n<|im_end|>\n",
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama-3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": (
        "<start_of_turn>user\nBe kind.\n\nHi?<end_of_turn>\n"
        "<start_of_turn>model\nYes.<end_of_turn>\n",
        "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "zephyr": (
        "<|system|>\nBe kind.</s>\n<|user|>\n Hi? </s>\n<|assistant|>\nYes.\n</s>\n",
        "<|user|>\nWho?</s>\n<|assistant|>\n",
    ),
}
THINKING = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content | trim }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""In the manner of Qwen3's: the last answer gets an empty thought in front."""
PICKY = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m | tojson }}"
    "{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{% generation %}\n{{ m.content }}{% endgeneration %}\n"
    "{% endfor %}{{ bos_token }}"
)
ALL = {**TEMPLATES, "thinking": THINKING, "picky": PICKY, "tools": TOOLS}


def test_every_named_template_is_written_out_here():
    assert EXPECTED.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_named_template_writes_these_texts(name):
    render = renderer(name, bos_token="<s>", eos_token="</s>")
    answered, asked = EXPECTED[name]
    assert render(TALK, False) == answered
    assert render([said("user", "Who?")], True) == asked


@pytest.mark.parametrize("name", EXPECTED)
def test_in_a_named_template_the_question_is_the_beginning_of_question_and_answer(name):
    render = renderer(name, eos_token="</s>")
    for before in (TALK[:2], TALK[1:2], [*TALK, said("user", "So?")]):
        asked, answered = render(before, True), render([*before, TALK[2]], False)
        assert answered.startswith(asked) and "Yes." in answered[len(asked) :]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("generation", [True, False])
def test_a_text_is_rendered_as_transformers_renders_it(name, generation):
    pytest.importorskip("transformers")
    from tests.support.hf_models import word_tokenizer

    tokenizer = word_tokenizer()
    mine = renderer(ALL[name], bos_token="<s>", eos_token="</s>")
    for messages in (TALK[1:], TALK[1:2], [said("user", 'a < "b" & ä'), TALK[2], TALK[1]]):
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, chat_template=ALL[name]
        )
        assert mine(messages, generation) == theirs
        through = renderer(ALL[name], tokenizer=tokenizer)
        assert through(messages, generation) == theirs


def test_a_tokenizer_without_a_template_of_its_own_is_rendered_plainly():
    pytest.importorskip("transformers")
    from tests.support.hf_models import word_tokenizer

    own = renderer(None, tokenizer=word_tokenizer("{{ messages[0]['content'] }}!"))
    assert own([said("user", "Who?")], True) == "Who?!"
    for absent in (None, ""):
        plain = renderer(None, tokenizer=word_tokenizer(absent))
        assert plain([said("user", "Who?")], True) == EXPECTED["plain"][1]
    assert renderer(None)([said("user", "Who?")], True) == EXPECTED["plain"][1]


def test_a_refusal_of_the_template_names_the_roles_and_its_words():
    with pytest.raises(DataError, match=r"roles system, user: Roles must alternate"):
        renderer(PICKY)(TALK[:2], True)


def test_a_name_that_is_none_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match="plain, chatml, llama-3, gemma, zephyr, raw"):
        template_text("llama3")
    assert template_text("{{ messages }}") == "{{ messages }}"
    assert template_text("chatml") == TEMPLATES["chatml"] and template_text(None) is None


def test_text_that_is_no_jinja_is_refused():
    with pytest.raises(ConfigError, match="not a valid jinja2"):
        renderer("{% for message in messages %}{{ message }}")


def test_templates_cannot_reach_the_interpreter():
    with pytest.raises(DataError, match="unsafe"):
        renderer("{{ messages.__class__.__mro__ }}")([said("user", "a")], True)


def test_messages_are_checked_and_a_text_is_one_message_of_the_user():
    assert messages_of("Who?", "row 3") == (said("user", "Who?"),)
    extra = {**said("user", "a"), "name": "x"}
    assert messages_of([{**extra, "tool_calls": None}], "row 3") == (extra,)
    for wrong in ([{"role": "user"}], [said("user", None)], ["a"], [said(1, "a")], [], 7):
        with pytest.raises(DataError, match=r"^row 3: (a message is|messages are)"):
            messages_of(wrong, "row 3")


def test_messages_are_told_from_ids_and_texts():
    assert is_messages(TALK) and is_messages(tuple(TALK))
    assert not any(map(is_messages, ("text", [1, 2], [], {"role": "user"}, None)))


def test_a_transcript_names_the_roles_unless_there_is_one_question():
    assert transcript([said("user", "Who?")]) == "Who?"
    assert transcript(TALK[:2]) == "System: Be kind.\n\nUser:  Hi? "


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ range(10 ** 9) }}"]
)
def test_a_template_that_breaks_is_refused_in_words(template):
    with pytest.raises(DataError, match="the chat template refuses messages with the roles user"):
        renderer(template)([said("user", "a")], True)
