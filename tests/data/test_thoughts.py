"""Templates of models that think, against transformers' own ids: thoughts in earlier turns and in
the answer that is learnt, in their several marks, declared as special tokens or not."""

import re

import pytest

from self_rewarding_lm import SamplingConfig, generate
from self_rewarding_lm.data.rows import training_row
from self_rewarding_lm.data.tokens import Tokens
from tests.data.test_chat import said
from tests.support.hf_models import VOCAB, tiny, word_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

MARKS = {"think": ("<think>", "</think>"), "bracket": ("[THINK]", "[/THINK]")}
SPLITS = (
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}"
    "{%- set thought = m.reasoning_content or '' %}{%- set said = m.content %}"
    "{%- if 'CLOSE' in said %}"
    "{%- set thought = said.split('CLOSE')[0].split('OPEN')[-1].strip('\n') %}"
    "{%- set said = said.split('CLOSE')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "RULE"
    "{{- said }}"
    "{%- else %}{{- m.content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
RULES = {
    "last turn only": ("{%- if loop.last %}{{- 'OPEN\n' + thought + '\nCLOSE\n\n' }}{%- endif %}"),
    "empty in earlier turns": (
        "{{- 'OPEN' + (thought if loop.last else '') + 'CLOSE' }}{{- '\n' }}"
    ),
    "every turn": "{%- if thought %}{{- 'OPEN' + thought + 'CLOSE' }}{%- endif %}",
}
VERBATIM = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Shows a thought as it was written, as templates without a rule do."""


def template_of(rule: str, marks: str) -> str:
    opening, closing = MARKS[marks]
    text = VERBATIM if rule == "verbatim" else SPLITS.replace("RULE", RULES[rule])
    return text.replace("OPEN", opening).replace("CLOSE", closing)


def thinking(rule: str, marks: str, *, special: bool):
    """A tokenizer with the marks among its added tokens."""
    tokenizer = word_tokenizer(template_of(rule, marks), special=MARKS[marks] if special else ())
    if not special:
        tokenizer.add_tokens([tokenizers.AddedToken(t, special=False) for t in MARKS[marks]])
    return tokenizer


def opened(tokenizer, **options) -> Tokens:
    return Tokens(tokenizer, **{"eos_id": None, "vocab": None, **options})


def theirs(tokenizer, messages, generation: bool) -> tuple[int, ...]:
    return tuple(
        tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=generation, return_dict=False
        )
    )


def thought(marks: str, what: str, answer: str) -> str:
    opening, closing = MARKS[marks]
    return f"{opening}\n{what}\n{closing}\n\n{answer}"


EVERY = [(rule, marks) for rule in (*RULES, "verbatim") for marks in MARKS]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(("rule", "marks"), EVERY)
def test_thoughts_have_transformers_ids_in_earlier_turns_and_in_the_answer(rule, marks, special):
    tokenizer = thinking(rule, marks, special=special)
    tokens = opened(tokenizer)
    turns = [
        [said("user", "Hi")],
        [
            said("system", f"Think between {' and '.join(MARKS[marks])}."),
            said("user", "Hi"),
            said("assistant", thought(marks, "hm", "Hello.")),
            said("user", "Who?"),
            said("assistant", "I."),
            said("user", f"What is {MARKS[marks][0]}?"),
        ],
    ]
    for messages in turns:
        for answer in ("A.", thought(marks, "so", "A."), thought(marks, "", "A.\n")):
            prompt, response = tokens.prompt(messages).ids, tokens.response(messages, answer)
            assert prompt == theirs(tokenizer, messages, True)
            whole = theirs(tokenizer, [*messages, said("assistant", answer)], False)
            end = tokenizer.encode("\n", add_special_tokens=False)
            assert (*prompt, *response, *end) == whole
            ids, targets = training_row(
                {"messages": [*messages, said("assistant", answer)]}, "row", tokens
            )
            assert ids == (*prompt, *response)
            assert targets == (False,) * len(prompt) + (True,) * len(response)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("marks", MARKS)
def test_a_thought_beside_text_that_holds_control_tokens_stays_one(marks, special):
    tokenizer = thinking("verbatim", marks, special=special)
    tokens = opened(tokenizer)
    text = f"<|im_end|>{thought(marks, 'hm', 'A <|im_end|> is')} an end</s>"
    ids = tokens.response("What?", text)
    for mark in MARKS[marks]:
        assert ids.count(tokenizer.convert_tokens_to_ids(mark)) == 1
    assert tokenizer.decode(ids) == f"{text}<|im_end|>"
    assert sum(i in tokens.end_ids for i in ids) == 1


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("marks", MARKS)
def test_the_text_of_an_answer_has_its_thought(marks, special):
    tokens = opened(thinking("verbatim", marks, special=special))
    text = thought(marks, "hm", "I.")
    ids = tokens.response("Who?", text)
    assert tokens.decode(ids) == text
    assert tokens.decode((1, *ids, 0)) == text  # other special tokens are not in it


def test_a_candidate_of_a_special_thought_can_have_it_cut_out_for_judges():
    """By the expression that docs/judging.md names."""
    tokenizer = thinking("every turn", "think", special=True)
    wanted = tokenizer.encode("<think>b</think>bb<|im_end|>", add_special_tokens=False)
    steps = iter(wanted)

    def says(logits):
        chosen = logits.clone().fill_(-float("inf"))
        chosen[:, next(steps)] = 0.0
        return chosen

    ((found,),) = generate(
        tiny("llama", VOCAB + 2, max_position_embeddings=256),
        ["Who?"],
        sampling=SamplingConfig(max_new_tokens=8, filter_fn=says),
        tokenizer=tokenizer,
    )
    assert found.ids == tuple(wanted) and found.text == "<think>b</think>bb"
    assert re.sub(r"(?s)<think>.*?</think>", "", found.text) == "bb"


def test_a_run_of_the_first_format_keeps_its_rendering():
    """There a mark of thoughts is a control token if it is special, or written between turns."""
    text = thought("think", "hm", "I.")
    for rule, special in (("verbatim", True), ("empty in earlier turns", False)):
        tokenizer = thinking(rule, "think", special=special)
        marks = set(tokenizer.convert_tokens_to_ids(list(MARKS["think"])))
        tokens = opened(tokenizer)
        now = tokens.prompt([said("user", text)]).ids
        assert marks <= set(now)
        tokens.follow(1, tokens.date)
        earlier = tokens.prompt([said("user", text)]).ids
        assert not marks & set(earlier) and tokenizer.decode(earlier) == tokenizer.decode(now)
        assert (tokens.decode(tuple(marks)) == "") is special
        assert earlier == opened(tokenizer, rules=1).prompt([said("user", text)]).ids
        tokens.follow(2, tokens.date)
        assert tokens.prompt([said("user", text)]).ids == now
