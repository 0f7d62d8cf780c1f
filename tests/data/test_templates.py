"""Templates with a will of their own: contents as parts, the date, thoughts that an answer loses."""

import json
from datetime import UTC, datetime

import pytest

from self_rewarding_lm import SelfRewardingTrainer, SFTConfig
from self_rewarding_lm.data.chat import TEMPLATES
from self_rewarding_lm.data.rows import prompt_of, training_row
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, DataError
from tests.data.test_chat import said
from tests.support.hf_models import VOCAB, tiny, word_tokenizer

transformers = pytest.importorskip("transformers")

PARTS = (
    "{% for m in messages %}{{ m.role | capitalize }}: "
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""In the manner of SmolVLM's and Idefics3's: of a text it shows nothing."""
STRICT = "{% if messages[0].content is string %}{{ raise_exception('parts!') }}{% endif %}" + PARTS
DATED = (
    "{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else 'some day' %}"
    "{{- bos_token }}{{- '<|im_start|>system\nToday: ' + today + '<|im_end|>\n' }}"
) + TEMPLATES["chatml"]
"""In the manner of Llama 3.2's and GPT-OSS'."""
THOUGHT_LESS = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if thinking is not defined or thinking %}{{- '<think>\n' }}{%- endif %}{%- endif %}"
)
"""In the manner of DeepSeek-R1's and Nemotron's: an answer loses its thought, also the last one."""
TALK = [said("system", "Be kind."), said("user", "Who?")]


class ADayIn2024:
    """In place of the module `time`."""

    @staticmethod
    def strftime(form: str) -> str:
        return datetime(2024, 7, 26, 12, tzinfo=UTC).strftime(form)


def opened(template: str, **options) -> Tokens:
    return Tokens(word_tokenizer(template), eos_id=None, vocab=None, **options)


def theirs(tokens: Tokens, messages, generation: bool) -> tuple[int, ...]:
    return tuple(
        tokens.source.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=generation, return_dict=False
        )
    )


@pytest.mark.parametrize("template", [PARTS, STRICT], ids=["shows nothing", "refuses"])
def test_a_template_that_wants_parts_is_given_them(template):
    tokens = opened(template)
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "I."}]}
    prompt, response = tokens.prompt(TALK).ids, tokens.response(TALK, "I.")
    assert prompt == theirs(tokens, parts, True)
    newline = tokens.encode_part("\n")
    assert (*prompt, *response, *newline) == theirs(tokens, [*parts, answer], False)
    assert prompt_of(parts, "row", tokens).ids == prompt
    assert tokens.source.decode(response) == "I.<|im_end|>"
    assert tokens.source.decode(tokens.response("Who?", "a</s>b")) == "a</s>b<|im_end|>"


@pytest.mark.parametrize("template", ["<|im_start|><|im_end|>", "{{ messages[0].content }}: "])
def test_a_template_that_shows_nothing_of_a_message_is_refused_when_it_is_opened(template):
    with pytest.raises(ConfigError, match=r"what messages say: it renders 'A question\.'"):
        opened(template)
    assert opened(template, chat_template="raw").prompt("Who?").ids
    assert opened(template, chat_template="chatml").prompt("Who?").ids


def test_the_date_is_that_of_the_tokens_and_else_the_ids_are_transformers():
    tokens = opened(DATED)
    today = datetime.now().strftime("%d %b %Y")
    if tokens.date.strftime("%d %b %Y") == today:  # the day may end between two lines
        assert tokens.prompt(TALK).ids == theirs(tokens, TALK, True)
    for template, chat_template in ((DATED, None), (None, DATED)):
        options = {"date": datetime(2024, 7, 26), "chat_template": chat_template}
        then = opened(template, **options)
        text = tokens.source.decode(then.prompt(TALK).ids)
        assert text.startswith("<s><|im_start|>system\nToday: 26 Jul 2024<|im_end|>\n")
        whole = tokens.source.decode((*then.prompt(TALK).ids, *then.response(TALK, "I.")))
        assert whole == text + "I.<|im_end|>"
        then.follow(then.rules, datetime(2025, 1, 2))
        assert "02 Jan 2025" in tokens.source.decode(then.prompt(TALK).ids)


def test_a_run_has_one_date_however_often_it_goes_on(tmp_path, monkeypatch):
    """The second stage begins on another day."""

    def trainer(stages: int):
        rows = [{"prompt": "Who?", "completion": "I."}]
        stage = dict(train_dataset=rows, num_train_steps=1)
        return SelfRewardingTrainer(
            tiny("llama", VOCAB, max_position_embeddings=256),
            finetune_configs=[SFTConfig(**stage) for _ in range(stages)],
            tokenizer=word_tokenizer(DATED),
            checkpoints_folder=tmp_path / "run",
            report=False,
            quiet=True,
        )

    with monkeypatch.context() as patched:
        patched.setattr("self_rewarding_lm.runs.resume.time", ADayIn2024)
        trainer(1)(rehearse=False)
    again = trainer(2)
    run = again(rehearse=False)
    for stage in range(2):
        text = again.tokens.source.decode(run.rows(stage)[0].ids)
        assert "Today: 26 Jul 2024" in text and text.endswith("I.<|im_end|>")
    assert json.loads((run.folder / "run.json").read_text())["created"].startswith("2024-07-26")
    assert run.begun == datetime.fromisoformat("2024-07-26T12:00:00+00:00")


def remedied(template: str) -> str:
    """The template as the error asks for it."""
    return template.replace(
        "{{- '<|im_start|>assistant\n' + m.content.split('</think>')[-1]",
        "{{- '<|im_start|>assistant\n' + ('<think>\n' + m.content if loop.last else "
        "m.content.split('</think>')[-1])",
    )


def test_a_template_that_drops_the_thought_of_an_answer_says_what_can_be_done():
    tokens = opened(THOUGHT_LESS)
    answer = "It is me.\n</think>\n\nI."
    with pytest.raises(DataError) as refused:
        training_row({"prompt": "Who?", "completion": answer}, "data, row 0", tokens)
    words = str(refused.value)
    assert words.startswith("data, row 0: ") and r"puts '<think>\n' before an answer" in words
    assert "chat_template=" in words and "token ids" in words
    assert '{"thinking": false}' in words
    # 1. the template, changed as the error says
    changed = opened(THOUGHT_LESS, chat_template=remedied(THOUGHT_LESS))
    assert changed.prompt("Who?").ids == tokens.prompt("Who?").ids
    assert tokens.source.decode(changed.response("Who?", answer)) == f"{answer}<|im_end|>"
    # 2. token ids
    ids = tokens.prompt("Who?").ids
    response = changed.response("Who?", answer)
    row = {"prompt": list(ids), "completion": list(response)}
    assert training_row(row, "row", tokens)[0] == (*ids, *response)
    # 3. the template's own variable
    row = {"prompt": "Who?", "completion": "I.", "chat_template_kwargs": {"thinking": False}}
    whole, targets = training_row(row, "row", tokens)
    learnt = [i for i, is_target in zip(whole, targets, strict=True) if is_target]
    assert tokens.source.decode(learnt) == "I.<|im_end|>"
