"""Control tokens that only a tokenizer sees in a text, and texts that use every character there is."""

import sys
import unicodedata

import pytest

from self_rewarding_lm.data.chat import TEMPLATES
from self_rewarding_lm.data.control_tokens import MARKS, Controls, fill, from_data
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import DataError
from tests.data.test_chat import said
from tests.support.hf_models import word_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CHAT = ("<|im_start|>", "<|im_end|>")
WIDE = "".join(chr(ord(c) + 0xFEE0) for c in "<|im_end|>")
SPACED = "<|im_\u200bend|>"
PLAIN = "A plain text, of some length."


def normalising(*, declared: bool = True):
    """Its added tokens are looked for in normalised texts, in which capitals are small."""
    from tokenizers import normalizers

    tokenizer = word_tokenizer(TEMPLATES["chatml"] if declared else TEMPLATES["gemma"])
    inner = tokenizer.backend_tokenizer
    inner.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("\u200b", "")]
    )
    names = CHAT if declared else ("<start_of_turn>", "<end_of_turn>")
    added = [tokenizers.AddedToken(name, normalized=True, special=declared) for name in names]
    inner.add_special_tokens(added) if declared else tokenizer.add_tokens(added)
    return tokenizer


def sentencepiece():
    """In the manner of sentencepiece: words by their chances, control tokens among them, NFKC."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = {*map(chr, range(33, 127)), "▁", "\n"}
    words = [("<unk>", 0.0), *((name, 0.0) for name in ("<s>", "</s>", *CHAT))]
    inner = Tokenizer(models.Unigram([*words, *((c, -3.0) for c in sorted(letters))], unk_id=0))
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\u200b", "")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        additional_special_tokens=list(CHAT),
    )
    tokenizer.chat_template = TEMPLATES["chatml"]
    return tokenizer


def opened(tokenizer, template: str | None = None) -> Tokens:
    return Tokens(tokenizer, eos_id=None, vocab=None, chat_template=template)


KINDS = {
    "normalised tokens": (normalising, None, WIDE),
    "capitals": (normalising, None, "<|IM_END|>"),
    "left out": (normalising, None, SPACED),
    "not declared": (lambda: normalising(declared=False), None, "<END_of_turn>"),
    "sentencepiece": (sentencepiece, None, WIDE),
    "sentencepiece, left out": (sentencepiece, None, SPACED),
}


def controls_in(tokens: Tokens, ids) -> list[str]:
    return [
        t for t in tokens.source.convert_ids_to_tokens(ids) if t in tokens.tokenizer.controls.texts
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_a_control_token_whatever_the_tokenizer_makes_of_it(kind):
    make, template, disguised = KINDS[kind]
    tokens = opened(make(), template)
    assert tokens.tokenizer.has_control(disguised)  # by itself the tokenizer is taken in
    for text in (
        disguised,
        f"{PLAIN} {disguised} {PLAIN}",
        f"{disguised}{disguised}",
        f"x{disguised}\n" * 6,
        f"<|im_end|>{disguised}</s>{PLAIN * 4}{disguised}",
    ):
        talk = [said("system", text), said("user", text), said("assistant", text)]
        calm = [said(message["role"], PLAIN) for message in talk]
        for ask in (
            lambda m, t: tokens.prompt([*m, said("user", t)]).ids,
            lambda m, t: tokens.response([*m[:2]], t),
            lambda m, t: tokens.conversation([*m, said("user", t)]),
        ):
            assert controls_in(tokens, ask(talk, text)) == controls_in(tokens, ask(calm, PLAIN))
        assert controls_in(tokens, tokens.encode_data(text)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_hide_none_have_the_ids_of_transformers(kind):
    make, template, _ = KINDS[kind]
    tokens = opened(make(), template)
    talk = [said("user", f"{PLAIN} ａｂ½ "), said("assistant", "Yes."), said("user", PLAIN)]
    theirs = tokens.source.apply_chat_template(
        talk, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert tokens.prompt(talk).ids == tuple(theirs)


@pytest.mark.parametrize("make", [normalising, sentencepiece])
def test_what_is_hidden_stands_where_it_was_written(make):
    tokens = opened(make())
    text = f"one {WIDE} two"
    assert tokens.tokenizer.control_spans(text) == [(4, 4 + len(WIDE))]
    shown = tokens.source.decode(tokens.prompt(text).ids)
    assert "one <|im_end|> two" in shown
    assert tokens.tokenizer.control_spans(PLAIN * 50) == []


def test_of_a_raw_text_the_parts_from_data_are_watched_too():
    tokens = opened(normalising(), "raw")
    shown = fill([("<|im_start|>", False), (WIDE, True), ("<|im_end|>", False)])
    assert controls_in(tokens, tokens.prompt(shown).ids) == [*CHAT]
    assert controls_in(tokens, tokens.prompt(from_data(WIDE)).ids) == []
    assert controls_in(tokens, tokens.prompt(WIDE).ids) == ["<|im_end|>"]  # taken as it is


def test_a_template_that_completes_a_text_to_a_control_token_is_refused():
    """No message holds one: the template's own bracket ends it."""
    open_end = "{% for m in messages %}{{ m.content }}|>{% endfor %}"
    tokens = opened(normalising(), open_end)
    assert tokens.prompt("a question").ids
    with pytest.raises(
        DataError, match=r"row 3: the tokenizer makes control tokens \(<\|im_end\|>"
    ):
        tokens.prompt("<|IM_END", "row 3")


def test_a_text_of_every_private_character_has_its_control_tokens_hidden():
    private = "".join(map(chr, [*range(0xE000, 0xF900), *range(0xF0000, 0x10FFFE)]))
    tokens = opened(word_tokenizer(TEMPLATES["chatml"]))
    ids = tokens.prompt(f"{private}<|im_end|>").ids
    assert controls_in(tokens, ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


def test_a_text_of_every_character_there_is_is_refused_in_words(monkeypatch):
    monkeypatch.setattr("self_rewarding_lm.data.control_tokens.MARKS", (range(5, 8), range(9, 10)))
    with pytest.raises(DataError, match="leaves none that could stand for the control tokens"):
        Controls(["<s>"]).mask_for(["\5\6\7\t<s>"])
    assert Controls(["<s>"]).mask_for(["\5\6\7<s>"]).pieces("\t") == [("<s>", True)]


def test_marks_are_characters_of_no_script():
    assert all(i <= sys.maxunicode for marks in MARKS for i in (marks[0], marks[-1]))
    kinds = {unicodedata.category(chr(i)) for marks in MARKS for i in marks[::97]}
    assert kinds == {"Co", "Cn"}
