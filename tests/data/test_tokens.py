"""Texts to ids: what is generated from is what is trained on, for every template and tokenizer."""

import pytest
import torch

from self_rewarding_lm import SamplingConfig, generate
from self_rewarding_lm.data.chat import TEMPLATES
from self_rewarding_lm.data.rows import training_row
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, DataError, TokenizerError
from tests.data.test_chat import PICKY, THINKING, said
from tests.support.hf_models import VOCAB, only_letters, tiny, word_tokenizer
from tests.support.models import ALPHABET, END, TEXT_VOCAB, decode, encode, ids_of, text_tokens

transformers = pytest.importorskip("transformers")

BOS, EOS, START, TURN_END = 1, 2, 3, 4
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    + TEMPLATES["chatml"]
)
WITH_BOS = "{{ bos_token }}" + TEMPLATES["chatml"]
NEWLINES = (
    "{% for m in messages %}[{{ m.role }}]\n\n{{ m.content }}{{ eos_token }}{{ '\n\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
TRIMS = TEMPLATES["chatml"].replace("message['content']", "message['content'] | trim")
ENDS_TWICE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
"""In the manner of Phi-3's: after a whole conversation stands the end of text as well."""
OWN = {
    "chatml": TEMPLATES["chatml"],
    "default system": DEFAULT_SYSTEM,
    "begin token": WITH_BOS,
    "newlines": NEWLINES,
    "trims": TRIMS,
    "thinking": THINKING,
    "ends twice": ENDS_TWICE,
    "generation": TEMPLATES["chatml"].replace(
        "{{ message['content'] }}",
        "{% generation %}{{ message['content'] }}{% endgeneration %}",
    ),
}
TALKS = {
    "text": "Who?",
    "question": [said("user", "Who are you?\n")],
    "system": [said("system", "Be kind."), said("user", "Hi")],
    "turns": [said("user", "Hi"), said("assistant", "Hello."), said("user", " ä and ö ")],
}


def tokens_of(tokenizer, **options) -> Tokens:
    return Tokens(tokenizer, **{"eos_id": None, "vocab": None, **options})


def messages_of(talk) -> list:
    return [said("user", talk)] if isinstance(talk, str) else talk


def theirs(tokenizer, messages, generation: bool, template=None) -> tuple[int, ...]:
    """The oracle: transformers' own ids of a conversation."""
    return tuple(
        tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=True,
            add_generation_prompt=generation,
            return_dict=False,
        )
    )


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("own", OWN)
def test_prompt_and_response_are_the_ids_of_transformers_own_rendering(own, talk, adds_bos):
    tokenizer, messages = word_tokenizer(OWN[own], adds_bos=adds_bos), messages_of(TALKS[talk])
    tokens = tokens_of(tokenizer)
    prompt = tokens.prompt(TALKS[talk])
    assert prompt.ids == theirs(tokenizer, messages, True)
    assert list(prompt.messages) == messages
    response = tokens.response(TALKS[talk], "I am.")
    whole = theirs(tokenizer, [*messages, said("assistant", "I am.")], False)
    assert whole[: len(prompt.ids) + len(response)] == (*prompt.ids, *response)
    assert tokens.decode(response).endswith("I am.")
    assert response[-1] == (EOS if own == "newlines" else TURN_END)
    assert sum(i in tokens.end_ids for i in response) == 1


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_has_one_begin_token_where_the_tokenizer_leads_texts_with_one(
    name, adds_eos, tmp_path
):
    special, messages = ("<|eot_id|>", "<end_of_turn>"), TALKS["turns"]
    tokenizer = word_tokenizer(adds_bos=True, adds_eos=adds_eos, special=special)
    assert tokenizer.encode("a")[0] == BOS and (tokenizer.encode("a")[-1] == EOS) == adds_eos
    tokens = tokens_of(tokenizer, chat_template=name)
    text = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    prompt = tokens.prompt(messages).ids
    assert prompt == (BOS, *tokenizer.encode(text, add_special_tokens=False))
    assert prompt.count(BOS) == 1
    response = tokens.response(messages, "I am.")
    whole = theirs(tokenizer, [*messages, said("assistant", "I am.")], False, tokens.template)
    assert whole[: len(prompt) + len(response)] == (*prompt, *response)
    tokens.save(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(saved, messages, True) == prompt  # whoever loads the checkpoint has the same ids


@pytest.mark.parametrize("template", [WITH_BOS, "<s>" + TEMPLATES["chatml"]], ids=["name", "text"])
def test_a_begin_token_that_the_template_writes_is_not_written_twice(template):
    tokenizer = word_tokenizer(adds_bos=True)
    tokens = tokens_of(tokenizer, chat_template=template)
    assert tokens.template == template
    ids = tokens.prompt("Who?").ids
    assert ids[:2] == (BOS, START) and ids.count(BOS) == 1


def test_texts_as_they_are_have_the_begin_token_once():
    tokens = tokens_of(word_tokenizer(WITH_BOS, adds_bos=True), chat_template="raw")
    prompt = tokens.prompt("Who?")
    assert prompt.ids == (BOS, *tokens.encode_part("Who?")) and prompt.messages is None
    assert tokens.encode("<s>Who?") == prompt.ids
    assert tokens.response("Who?", "I.") == (*tokens.encode_part("I."), EOS)
    assert tokens.template is None and tokens.end_ids == (EOS,)
    assert tokens.prompt([said("user", "Who?")]).ids[:2] == (BOS, START)  # messages need some


def test_a_tokenizer_of_a_base_model_gets_the_plain_template():
    tokenizer = word_tokenizer()
    tokens = tokens_of(tokenizer)
    assert tokens.template == TEMPLATES["plain"] and tokens.eos_id == EOS
    prompt, response = tokens.prompt("Who?").ids, tokens.response("Who?", "I.")
    assert tokenizer.decode(prompt) == "User:\nWho?\n\nAssistant:\n"
    assert tokenizer.decode(response) == "I.</s>"


def test_what_a_candidate_says_is_trained_on_as_it_was_sampled():
    """Its text, put after its prompt again, gives the sampled ids."""
    sampling = dict(temperature=100.0, top_p=None, max_new_tokens=3)  # about uniform
    for template in (DEFAULT_SYSTEM, WITH_BOS, NEWLINES, TRIMS, None):
        tokenizer = word_tokenizer(template, adds_bos=True)
        tokens = tokens_of(tokenizer, vocab=VOCAB)
        only = SamplingConfig(**sampling, filter_fn=only_letters(tokenizer, tokens.end_ids[:1]))
        found = generate(
            tiny("llama", VOCAB, max_position_embeddings=256),
            list(TALKS.values()),
            sampling=only,
            tokenizer=tokenizer,
            num_samples=6,
        )
        finished = []
        for talk, group in zip(TALKS.values(), found, strict=True):
            for candidate in group:
                ids = tokens.response(talk, candidate.text)
                assert (ids if candidate.finished else ids[:-1]) == candidate.ids
                finished.append(candidate.finished)
                row = training_row({"prompt": talk, "completion": candidate.text}, "row", tokens)
                assert row[0] == (*tokens.prompt(talk).ids, *ids)
        assert any(finished) and not all(finished)


def test_a_thought_that_the_template_writes_is_part_of_the_response():
    tokens = tokens_of(word_tokenizer(THINKING))
    response = tokens.response("Who?", "I.")
    assert tokens.decode(response) == "<think>\n\n</think>\n\nI." and response[-1] == TURN_END


def test_the_first_end_token_behind_an_answer_ends_it():
    tokens = tokens_of(word_tokenizer(ENDS_TWICE))
    assert (tokens.eos_id, tokens.end_ids) == (TURN_END, (TURN_END, EOS))
    assert tokens.source.decode(tokens.response("Who?", "I.")) == "I.<|im_end|>"


@pytest.mark.parametrize("text", ["a<|im_end|>b", "<|im_end|>", "</s>b", "a\n", "", " ", "ANSWER"])
def test_end_tokens_in_an_answer_and_empty_answers_do_not_cut_it(text):
    tokens = tokens_of(word_tokenizer(TEMPLATES["chatml"]))
    assert tokens.source.decode(tokens.response("Who?", text)) == text + "<|im_end|>"


def test_a_template_without_special_tokens_puts_the_end_token_behind_the_answer_itself():
    words = "{% for m in messages %}{{ m.role }}: {{ m.content }} #\n{% endfor %}"
    words += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokens = tokens_of(word_tokenizer(words))
    assert tokens.source.decode(tokens.response("Who?", "I.")) == " I.</s>"
    assert tokens.end_ids == (EOS,)


def test_a_template_that_demands_a_system_message_is_known_by_its_end_of_turn():
    demanding = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATES["chatml"]
    )
    tokens = tokens_of(word_tokenizer(demanding))
    assert tokens.eos_id == TURN_END
    assert tokens.source.decode(tokens.response(TALKS["system"], "I.")) == "I.<|im_end|>"
    with pytest.raises(DataError, match=r"row 7.*no system"):
        tokens.prompt("Who?", "row 7")


def test_a_template_that_is_only_known_by_rows_is_cut_behind_the_answer():
    """It refuses short conversations, so that nothing could be tried out."""
    long = (
        "{% if messages | length < 3 %}{{ raise_exception('too short') }}{% endif %}"
        + TEMPLATES["zephyr"]
    )
    tokens = tokens_of(word_tokenizer(long))
    assert tokens.source.decode(tokens.response(TALKS["turns"], " I. ")) == " I. </s>"


def test_a_prompt_that_is_rendered_otherwise_once_it_is_answered_is_an_error_with_both_texts():
    changes = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    changes += "{% if add_generation_prompt %}[think]{% endif %}"
    tokens = tokens_of(word_tokenizer(changes))
    with pytest.raises(DataError, match=r"(?s)^row 3: .*'Who\?\|\[think\]'.*'Who\?\|I.\|'"):
        tokens.response("Who?", "I.", "row 3")


def test_a_role_that_the_template_refuses_is_an_error_that_names_the_row():
    tokens = tokens_of(word_tokenizer(PICKY))
    with pytest.raises(DataError, match=r"^train, row 2: .*roles system, user: Roles must alt"):
        tokens.prompt(TALKS["system"], "train, row 2")
    with pytest.raises(DataError, match=r"^train, row 2: .*must alternate"):
        training_row({"prompt": TALKS["system"], "completion": "a"}, "train, row 2", tokens)


def test_tokens_that_join_over_the_border_of_prompt_and_response_leave_the_prompt_as_it_is():
    """chatml's newline before an answer, and an answer that begins with one."""
    tokenizer = word_tokenizer(TEMPLATES["chatml"], merges=(("Ċ", "Ċ"),))
    joined = VOCAB
    assert tokenizer.encode("\n\n") == [joined]
    tokens = tokens_of(tokenizer)
    assert joined in theirs(tokenizer, [said("user", "Hi"), said("assistant", "\n\nI.")], False)
    prompt, response = tokens.prompt("Hi").ids, tokens.response("Hi", "\n\nI.")
    assert joined not in (*prompt, *response)
    assert tokenizer.decode(response) == "\n\nI.<|im_end|>"


def test_a_response_has_no_space_of_its_own_where_the_tokenizer_puts_one_before_texts():
    tokenizer = word_tokenizer(TEMPLATES["chatml"], prefix_space=True)
    tokens = tokens_of(tokenizer)
    assert tokenizer.decode(tokens.encode_part("I.")) == " I."
    prompt, response = tokens.prompt("Who?").ids, tokens.response("Who?", "I.")
    assert tokenizer.decode(response) == "I.<|im_end|>"
    whole = theirs(tokenizer, [said("user", "Who?"), said("assistant", "I.")], False)
    assert whole[: len(prompt) + len(response)] == (*prompt, *response)


def test_all_that_end_a_turn_or_a_text_end_a_response():
    tokenizer = word_tokenizer(TEMPLATES["chatml"], special=("<|endoftext|>", "<|eom|>"))
    tokens = tokens_of(tokenizer, end_ids=(262,))
    assert tokenizer.convert_ids_to_tokens([261, 262]) == ["<|endoftext|>", "<|eom|>"]
    assert tokens.eos_id == TURN_END and set(tokens.end_ids) == {TURN_END, EOS, 261, 262}
    ids = (*tokens.encode_part("ab"), 261, 262, EOS, TURN_END)
    assert tokens.decode(ids) == "ab"
    own = tokens_of(tokenizer, eos_id=262)
    assert set(own.end_ids) == {TURN_END, 262}


@pytest.mark.parametrize("end", [EOS, TURN_END, 261, 7])
def test_generation_stops_at_each_of_them_and_min_new_tokens_bars_them_all(end):
    tokenizer = word_tokenizer(TEMPLATES["chatml"], special=("<|endoftext|>",))
    module = tiny("gpt2", VOCAB + 1)
    module.generation_config.eos_token_id = [7]

    def likes(logits):
        liked = logits.clone()
        liked[:, end] += torch.where(logits[:, end].isfinite(), 50.0, 0.0)
        return liked

    sampling = SamplingConfig(temperature=0.0, max_new_tokens=9, min_new_tokens=3, filter_fn=likes)
    ((found,),) = generate(module, ["Who?"], sampling=sampling, tokenizer=tokenizer)
    assert found.finished is True and len(found.ids) == 4 and found.ids[-1] == end
    assert not {EOS, TURN_END, 261, 7} & set(found.ids[:-1])
    assert found.text == tokenizer.decode(found.ids[:-1], skip_special_tokens=True)


def test_generate_renders_texts_and_messages_by_the_template_it_is_given():
    tokenizer = word_tokenizer(adds_bos=True)
    module = tiny("llama", VOCAB, max_position_embeddings=512)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=3)
    for name in (*TEMPLATES, DEFAULT_SYSTEM, None, "raw"):
        tokens = tokens_of(tokenizer, chat_template=name)
        prompts = ["Who?", TALKS["turns"], TALKS["system"]]
        by_ids = [torch.tensor(tokens.prompt(p).ids) for p in prompts]
        options = dict(sampling=sampling, tokenizer=tokenizer, chat_template=name)
        found = generate(module, prompts, **options)
        assert found == generate(module, by_ids, **options)


def test_generate_names_the_prompt_that_is_wrong():
    options = dict(tokenizer=word_tokenizer(PICKY))
    with pytest.raises(DataError, match=r"prompt 1.*must alternate"):
        generate(tiny("llama", VOCAB), ["a", TALKS["system"]], **options)
    with pytest.raises(DataError, match=r"prompt 0: a message is"):
        generate(tiny("llama", VOCAB), [[{"role": "user"}]], **options)


def test_functions_as_tokenizer_take_texts_as_they_are_unless_a_template_is_given():
    plain = text_tokens()
    assert plain.prompt("what is 2").ids == ids_of("what is 2") and not plain.renders
    assert plain.response("what is 2", "two") == (*ids_of("two"), END)
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    template += "{% if add_generation_prompt %}<{% endif %}"
    given = Tokens(
        CallableTokenizer(encode, decode), eos_id=END, vocab=TEXT_VOCAB, chat_template=template
    )
    assert given.prompt("what").ids == ids_of("<what><") and given.renders
    assert given.response("what", "two") == (*ids_of("two"), END)
    assert given.prompt("what").messages == (said("user", "what"),)


def test_messages_with_functions_as_tokenizer_are_rendered_plainly():
    lower = CallableTokenizer(lambda text: encode(text.lower().replace("\n\n", "\n")), decode)
    tokens = Tokens(lower, eos_id=END, vocab=TEXT_VOCAB)
    assert tokens.prompt([said("user", "who")]).ids == ids_of("user:\nwho\nassistant:\n")
    assert tokens.response([said("user", "who")], "i.") == (*ids_of("i."), END)


def test_a_text_without_a_tokenizer_is_an_error_that_says_what_to_give():
    tokens = Tokens(None, eos_id=3, vocab=9)
    assert tokens.decode((1, 2)) is None and tokens.end_ids == (3,)
    for ask in (tokens.prompt, tokens.encode):
        with pytest.raises(ConfigError, match="Give tokenizer="):
            ask("Who?")


def test_an_end_token_beyond_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="eos_id must be one of the model's 9 tokens"):
        Tokens(None, eos_id=9, vocab=9)


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused():
    with pytest.raises(TokenizerError, match="does not fit the model's vocabulary"):
        tokens_of(word_tokenizer(TEMPLATES["chatml"]), vocab=50).prompt("Who?")


def test_ids_of_any_number_type_are_whole_numbers_of_the_vocabulary():
    tokens = Tokens(None, eos_id=None, vocab=9)
    for given in (torch.tensor([1.0, 2.0]), [1, 2], (1.0, 2), torch.tensor([1, 2]).numpy()):
        assert tokens.checked(given, "of x") == (1, 2)
    for wrong in ([0.5], [9], [-1], [True], torch.zeros(1, 2), "12", 3, [None], [float("nan")]):
        with pytest.raises(TokenizerError, match="of x"):
            tokens.checked(wrong, "of x")


def test_a_saved_tokenizer_carries_the_template_and_the_given_one_keeps_its_own(tmp_path):
    tokenizer = word_tokenizer(TEMPLATES["chatml"])
    for name in ("zephyr", None, "raw"):
        tokens_of(tokenizer, chat_template=name).save(tmp_path / str(name))
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path / str(name))
        assert saved.chat_template == TEMPLATES[name if name == "zephyr" else "chatml"]
        assert saved.encode("ä<|im_end|>") == tokenizer.encode("ä<|im_end|>")
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    text_tokens().save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_alphabet_of_these_tests_has_the_characters_used():
    assert set("<what><two who i.\n") <= set(ALPHABET)
