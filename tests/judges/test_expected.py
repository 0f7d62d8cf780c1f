"""Expected scores: where a score stands in a judge's ids, and how probable each number is there.

The oracle knows each tokenizer's tokens by hand and asks the bare model one whole row at a time.
"""

import math
import string
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from self_rewarding_lm import TEN_POINT_REWARD_CONFIG
from self_rewarding_lm.data.tokenizers import CallableTokenizer
from self_rewarding_lm.data.tokens import Rendered, Tokens
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.judges.expected import VerdictReader, expected_scores
from self_rewarding_lm.judges.parsing import comparison_form, score_form
from self_rewarding_lm.judges.self_judge import form_of
from self_rewarding_lm.models.families import adapt
from tests.support.hf_models import tiny, word_tokenizer
from tests.support.models import Fixed, Recurrent, last_logits, lively, transformer64

CHARACTERS = [*string.ascii_letters, *string.digits, *" :.,/*[]()+-=\n"]
DIGITS = string.digits
RANGES = {"0-5": range(6), "0-10": range(11), "1-100": range(1, 101), "10-19": range(10, 20)}


@dataclass(frozen=True)
class Pieces:
    """A tokenizer whose tokens are texts; the longest that fits is taken. `unused` are decoded and
    never encoded."""

    texts: tuple[str, ...]
    unused: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.texts, *self.unused)

    def encode(self, text: str) -> list[int]:
        ids, place = [], 0
        while place < len(text):
            fits = [i for i, t in enumerate(self.texts) if text.startswith(t, place)]
            ids.append(max(fits, key=lambda i: len(self.texts[i])))
            place += len(self.texts[ids[-1]])
        return ids

    def decode(self, ids) -> str:
        return "".join(self.all[i] for i in ids)

    def id(self, text: str) -> int:
        return self.all.index(text)


def pieces(*more: str, unused: tuple[str, ...] = ()) -> Pieces:
    return Pieces((*CHARACTERS, *more), unused)


# per tokenizer: the tokens of a number after "score:", by hand
TOKENIZERS = {
    "a token a character": (pieces(), lambda n: [" ", *n]),
    "space joined to the digit": (
        pieces(*(" " + d for d in DIGITS)),
        lambda n: [" " + n[0], *n[1:]],
    ),
    "numbers whole": (pieces(*map(str, range(10, 101))), lambda n: [" ", n]),
    "numbers whole, joined": (pieces(*(f" {n}" for n in range(101))), lambda n: [" " + n]),
    "three digits at most": (
        pieces(*(f" {n}" for n in range(10)), "00", "10"),
        lambda n: [" " + n[0], *({"100": ["00"]}.get(n) or n[1:])],
    ),
}


def tokens_of(pieces: Pieces, eos_id: int | None = None) -> Tokens:
    vocab = len(pieces.all) + 1
    return Tokens(pieces, eos_id=eos_id, vocab=vocab)


def form(numbers, template="score: {{ reward }}"):
    return score_form(template, numbers=[float(n) for n in numbers])


def begins_with_digit(text: str) -> bool:
    return text[:1] in tuple(DIGITS)


def oracle(module, before: list[int], paths: dict[int, list[int]], texts) -> tuple[float, float]:
    """The expected score and the mass: every path enumerated, a whole forward for each token."""

    @cache  # numbers share beginnings
    def following(*ids):
        return last_logits(module, list(ids)).double().softmax(dim=-1).tolist()

    chances = {}
    for number, path in paths.items():
        p = math.prod(following(*before, *path[:n])[token] for n, token in enumerate(path))
        if any(other[: len(path)] == path for n, other in paths.items() if n != number):
            after = following(*before, *path)
            p *= 1 - sum(
                q for q, text in zip(after, texts, strict=False) if begins_with_digit(text)
            )
        chances[number] = p
    mass = sum(chances.values())
    return sum(n * p for n, p in chances.items()) / mass, mass


def scores_at(module, places, reader, **limits):
    found = dict(expected_scores(adapt(module), places, reader, LocalEngine(**limits)))
    return [found[i] for i in range(len(places))]


class Leaning(torch.nn.Module):
    """Logits with more weight on some tokens."""

    def __init__(self, inner, favoured, vocab):
        super().__init__()
        self.inner = inner
        self.register_buffer("more", torch.zeros(vocab, dtype=torch.float64))
        self.more[list(favoured)] = 5.0

    def forward(self, hidden):
        return self.inner(hidden) + self.more


def leaning(module, favoured):
    """The model with more weight on the tokens of numbers, so that they have mass."""
    name = next(n for n in ("head", "to_logits", "lm_head") if hasattr(module, n))
    inner = getattr(module, name)
    setattr(module, name, Leaning(inner, favoured, inner.out_features))
    return module


MODELS = {
    "cached": lambda vocab: transformer64("rotary", vocab=vocab, max_seq_len=64),
    "uncached": lambda vocab: lively(Recurrent(vocab).double()),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("numbers", RANGES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_expected_score_is_that_of_every_path_by_itself(tokenizer, numbers, model):
    pieces, path_of = TOKENIZERS[tokenizer]
    paths = {n: [pieces.id(t) for t in path_of(str(n))] for n in RANGES[numbers]}
    favoured = {token for path in paths.values() for token in path}
    module = leaning(MODELS[model](len(pieces.all) + 1), favoured)
    reader = VerdictReader(form(RANGES[numbers]), tokens_of(pieces))
    prompts = ["rate a:\n", "rate this one too:\n", "and one that is longer than the others:\n"]
    places = [reader.forced(Rendered(tuple(pieces.encode(p)), p), ()) for p in prompts]
    found = scores_at(module, places, reader)
    shared = [pieces.id(" ")] if path_of("1")[0] == " " else []  # what all paths begin with
    for prompt, place, result in zip(prompts, places, found, strict=True):
        before = [*pieces.encode(prompt), *pieces.encode("score:"), *shared]
        assert list(place.ids) == before
        rest = {n: path[len(shared) :] for n, path in paths.items()}
        score, mass = oracle(module, before, rest, pieces.all)
        assert result.mass == pytest.approx(mass, abs=2e-9)
        if mass >= 0.1:
            assert result.score == pytest.approx(score, abs=2e-9 + 1e-9 / mass)
        else:
            assert (result.score, result.reason) == (None, "low_mass")


def test_the_mass_of_a_digit_that_all_numbers_share_counts():
    """10 to 19: the first 1 is not given to the judge, its probability is part of the mass."""
    pieces, _ = TOKENIZERS["a token a character"]
    logits = [0.0] * (len(pieces.all) + 1)
    logits[pieces.id("7")] = 50.0  # it says 7 wherever it is
    reader = VerdictReader(form(range(10, 20)), tokens_of(pieces))
    place = reader.forced(Rendered((0,), "a"), ())
    (found,) = scores_at(Fixed(logits), [place], reader)
    assert (found.score, found.reason) == (None, "low_mass") and found.mass < 1e-9


def test_one_forward_where_every_number_is_one_token_and_one_more_for_each_level():
    lengths: list[int] = []

    class Counting(torch.nn.Module):
        def __init__(self, vocab):
            super().__init__()
            self.inner = Recurrent(vocab)

        def forward(self, ids):
            lengths.append(len(ids))
            return self.inner(ids)

    def forwards(tokenizer, numbers):
        pieces, _ = TOKENIZERS[tokenizer]
        model = adapt(Counting(len(pieces.all) + 1))
        reader = VerdictReader(form(RANGES[numbers]), tokens_of(pieces))
        places = [reader.forced(Rendered((i,), "a"), ()) for i in range(3)]
        lengths.clear()
        list(expected_scores(model, places, reader, LocalEngine()))
        return list(lengths)

    assert forwards("a token a character", "0-5") == [3]
    assert forwards("numbers whole", "1-100") == [3]
    assert forwards("a token a character", "0-10") == [3, 3]
    assert forwards("a token a character", "1-100") == [3, 3 * 9, 3 * 1]


@pytest.mark.parametrize(
    "limits", [{}, {"max_rows": 1}, {"max_prefill_tokens": 1}, {"max_prefill_tokens": 300}], ids=str
)
def test_scores_do_not_depend_on_what_is_computed_together(limits):
    pieces, _ = TOKENIZERS["space joined to the digit"]
    module = transformer64("rotary", vocab=len(pieces.all) + 1, max_seq_len=64)
    reader = VerdictReader(form(range(1, 101)), tokens_of(pieces))
    texts = ["a", "a longer one", "a", "one of another kind\n", "x" * 30]
    places = [reader.forced(Rendered(tuple(pieces.encode(t)), t), ()) for t in texts]
    alone = [scores_at(module, [place], reader)[0] for place in places]
    assert scores_at(module, places, reader, **limits) == alone
    assert alone[0] == alone[2]  # the same place twice


def test_places_of_different_words_are_computed_side_by_side():
    pieces, _ = TOKENIZERS["space joined to the digit"]
    module = transformer64("rotary", vocab=len(pieces.all) + 1, max_seq_len=64)
    reader = VerdictReader(form(range(11)), tokens_of(pieces))
    said = ["score: 4", "score:4", "well.\nscore: [3", "score: 10", "score:\n7"]
    places = [p for text in said for p in reader.stated((5, 6), tuple(pieces.encode(text)))]
    assert len(places) == len(said) and len({place.trie for place in places}) > 1
    alone = [scores_at(module, [place], reader)[0] for place in places]
    assert scores_at(module, places, reader) == alone


def test_the_models_modes_are_as_before_and_no_gradients_are_made():
    module = torch.nn.Sequential(
        Recurrent(len(CHARACTERS) + 1, dropout=0.5), torch.nn.Identity().eval()
    )
    module.train()
    module[1].eval()
    reader = VerdictReader(form(range(6)), tokens_of(pieces()))
    place = reader.forced(Rendered((1, 2), "ab"), ())
    first, again = (scores_at(module, [place], reader)[0] for _ in range(2))
    assert first == again  # without dropout
    assert module[0].training and module[0].dropout.training and not module[1].training
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


# where a score stands

STATED = [  # tokenizer, what the judge says, what stands before the paths
    ("a token a character", "score: 4", "score: "),
    ("a token a character", "score: 10", "score: "),
    ("a token a character", "score:4", "score:"),
    ("a token a character", "fine.\n**Score:** 4/10", "fine.\n**Score:** "),
    ("a token a character", "score: 1 and then score: 2. done", "score: 1 and then score: "),
    ("a token a character", "score: 3.5", "score: "),
    ("a token a character", "score: 1 + 1 = 2", "score: 1 + 1 = "),
    ("a token a character", "good\n4/10", "good\n"),  # a last line that is nothing but a score
    ("a token a character", "7", ""),
    ("space joined to the digit", "score: 4", "score:"),
    ("space joined to the digit", "score: 10", "score:"),
    ("space joined to the digit", "score:4", "score:"),
    ("space joined to the digit", "score: (4)", "score: ("),
    ("space joined to the digit", "Score: 4 score:\n6", "Score: 4 score:\n"),
    ("space joined to the digit", " 7", ""),
    ("numbers whole", "score: 10", "score: "),
    ("numbers whole, joined", "score: 10", "score:"),
    ("numbers whole, joined", "good\n**10**", "good\n**"),
]


@pytest.mark.parametrize(("tokenizer", "said", "before"), STATED)
def test_the_place_is_before_the_tokens_of_the_last_number_stated(tokenizer, said, before):
    pieces, path_of = TOKENIZERS[tokenizer]
    end = len(pieces.all)
    reader = VerdictReader(form(range(11)), tokens_of(pieces, eos_id=end))
    (place,) = reader.stated((1, 2), (*pieces.encode(said), end))
    assert pieces.decode(place.ids[2:]) == before and place.ids[:2] == (1, 2)
    joined = not said[len(before) :][:1].isdecimal()
    paths = dict(place.trie.paths)
    expected = path_of("10") if joined else [t.strip() for t in path_of("10") if t.strip()]
    if tokenizer == "numbers whole, joined" and not joined:
        expected = ["1", "0"]
    assert [pieces.all[i] for i in paths[10.0]] == expected


def test_what_the_judge_took_at_the_place_does_not_matter():
    """A 7 on a scale to 5 still has a place, and the scale's numbers have their chances there."""
    pieces, path_of = TOKENIZERS["space joined to the digit"]
    paths = {n: [pieces.id(t) for t in path_of(str(n))] for n in range(6)}
    module = leaning(MODELS["uncached"](len(pieces.all) + 1), [path[0] for path in paths.values()])
    reader = VerdictReader(form(range(6)), tokens_of(pieces))
    (one,), (other,) = (reader.stated((1, 2), tuple(pieces.encode(f"score: {n}"))) for n in (3, 7))
    assert one == other
    (found,) = scores_at(module, [one], reader)
    score, mass = oracle(module, [1, 2, *pieces.encode("score:")], paths, pieces.all)
    assert mass > 0.1
    assert (found.score, found.mass) == pytest.approx((score, mass), abs=1e-8)


def test_a_number_within_a_token_has_no_place():
    split = pieces(" 4", unused=(": 4", "e:", "e: 4"))
    reader = VerdictReader(form(range(6)), tokens_of(split))
    scor = split.encode("scor")
    for last in ([split.id("e"), split.id(": 4")], [split.id("e: 4")]):
        assert split.decode([*scor, *last]) == "score: 4"
        assert reader.stated((0,), (*scor, *last)) == ()
    (place,) = reader.stated((0,), (*scor, split.id("e:"), split.id(" "), split.id("4")))
    assert place.ids == (0, *scor, split.id("e:"))  # other tokens, but one begins there


def test_a_text_that_states_no_score_has_no_place():
    reader = VerdictReader(form(range(6)), tokens_of(pieces()))
    assert reader.stated((0,), tuple(pieces().encode("i give it 4"))) == ()
    assert reader.stated((0,), ()) == ()


# forced endings


@pytest.mark.parametrize(
    ("prompt", "is_turn", "answer", "ids"),
    [
        ("review:", False, "", "review:\nscore: "),  # a text that goes on: a new line
        ("review:\n", False, "", "review:\nscore: "),
        ("review: ", False, "", "review: score: "),
        ("bot:", True, "", "bot:score: "),  # the turn was opened by a chat template
        ("review:", False, "not bad", "review:not bad\nscore: "),
        ("bot:", True, "not bad", "bot:not bad\nscore: "),
        ("bot:", True, "not bad\n", "bot:not bad\nscore: "),
    ],
)
def test_an_answer_is_closed_and_the_words_of_the_template_follow(prompt, is_turn, answer, ids):
    end = len(CHARACTERS)
    reader = VerdictReader(form(range(6)), tokens_of(pieces(), eos_id=end))
    messages = ({"role": "user", "content": "x"},) if is_turn else None
    rendered = Rendered(tuple(pieces().encode(prompt)), prompt, messages)
    for ended in ((), (end,), (end, end)):
        place = reader.forced(rendered, (*pieces().encode(answer), *ended))
        assert pieces().decode(place.ids) == ids
        assert dict(place.trie.paths)[4.0] == (pieces().id("4"),)


def test_the_room_that_a_forced_ending_takes():
    character, joined = (
        VerdictReader(form(range(1, 101)), tokens_of(TOKENIZERS[name][0]))
        for name in ("a token a character", "space joined to the digit")
    )
    assert character.forced_length == len("\nscore: ") + 2  # of three digits the last is not read
    assert joined.forced_length == len("\nscore:") + 2
    assert character.path_length == joined.path_length == 3


# digits


def test_what_begins_with_a_digit_at_its_place_ends_no_number():
    """Of 1 and 10: "1" is not meant where "10", "1x" or "12" is written."""
    made = pieces(unused=("5x", " 5", "x5", "00"))
    vocab = len(made.all) + 1  # the tokenizer fails on the last id
    reader = VerdictReader(form([1, 10]), tokens_of(made))
    trie = reader.forced(Rendered((0,), "a"), ()).trie
    assert trie.endings() == [(made.id("1"),)]
    longer = reader.longer(trie, vocab)
    assert {made.all[i] for i in longer} == {*DIGITS, "5x", "00"}


def test_no_digits_are_looked_for_where_no_number_goes_on():
    def decode(ids):
        assert len(ids) == 0, "decoded"
        return ""

    made = pieces()
    tokens = Tokens(
        CallableTokenizer(lambda text: torch.tensor(made.encode(text)), decode),
        eos_id=None,
        vocab=99,
    )
    reader = VerdictReader(form(range(6)), tokens)
    trie = reader.forced(Rendered((0,), "a"), ()).trie
    assert reader.longer(trie, 99) == frozenset()


def test_numbers_with_decimals_end_where_no_point_follows_either():
    """0 and 0.5: "0" ends where neither a digit nor the point of 0.5 is next."""
    made = pieces()
    logits = torch.full((len(made.all),), -9.0, dtype=torch.float64)
    for text, p in {"0": 0.45, ".": 0.2, "5": 0.1, " ": 0.25}.items():
        logits[made.id(text)] = math.log(p)
    chances = logits.softmax(dim=0)
    zero, point, five = (float(chances[made.id(t)]) for t in "0.5")
    digits = sum(float(chances[made.id(d)]) for d in DIGITS)
    reader = VerdictReader(form([0, 0.5]), tokens_of(made))
    place = reader.forced(Rendered((0,), "a"), ())
    (found,) = scores_at(Fixed(logits.tolist()).double(), [place], reader)
    nothing, half = zero * (1 - digits - point), zero * point * five
    assert found.mass == pytest.approx(nothing + half, abs=1e-6)
    assert found.score == pytest.approx(0.5 * half / (nothing + half), abs=1e-6)


def test_of_the_ten_point_scale_10_is_no_1():
    made = pieces()
    logits = torch.full((len(made.all),), -9.0, dtype=torch.float64)
    for text, p in {"1": 0.4, "0": 0.2, "7": 0.1, ".": 0.3}.items():
        logits[made.id(text)] = math.log(p)
    chances = logits.softmax(dim=0)
    p = [float(chances[made.id(d)]) for d in DIGITS]
    masses = {n: p[n] for n in range(10)} | {1: p[1] * (1 - sum(p)), 10: p[1] * p[0]}
    expected = TEN_POINT_REWARD_CONFIG.model_copy(update={"score_mode": "expected"})
    reader = VerdictReader(form_of(expected), tokens_of(made))
    place = reader.forced(Rendered((0,), "a"), ())
    (found,) = scores_at(Fixed(logits.tolist()).double(), [place], reader)
    assert found.mass == pytest.approx(sum(masses.values()), abs=1e-6)
    mean = sum(n * m for n, m in masses.items()) / sum(masses.values())
    assert found.score == pytest.approx(mean, abs=1e-6)
    texts = [*map(str, range(11)), "11", "4/5", "8/10"]
    read = [form_of(expected).read(f"Good.\nScore: {text}").score for text in texts]
    assert read == [*range(11), None, None, 8]


def test_a_tokenizer_that_does_not_tell_numbers_apart_is_an_error():
    def encode(text):
        return [CHARACTERS.index("0" if c.isdecimal() else c) for c in text]

    tokens = Tokens(SimpleNamespace(encode=encode, decode=lambda ids: ""), eos_id=None, vocab=99)
    with pytest.raises(ConfigError, match="encodes 0 as nothing"):
        VerdictReader(form(range(6)), tokens).forced(Rendered((0,), "a"), ())


def test_logits_that_are_not_finite_give_no_score():
    reader = VerdictReader(form(range(6)), tokens_of(pieces()))
    place = reader.forced(Rendered((0,), "a"), ())
    broken = Fixed([0.0] * (len(CHARACTERS) + 1))
    model = adapt(broken)
    broken.row.fill_(math.nan)
    ((_, found),) = expected_scores(model, [place], reader, LocalEngine())
    assert (found.score, found.mass, found.reason) == (None, None, "not_finite")


# labels


def test_labels_are_expected_like_numbers():
    made = pieces(" A", " B", " Tie")
    module = lively(Recurrent(len(made.all) + 1).double())
    leaning(module, [made.id(t) for t in (" A", " B", " Tie")])
    reader = VerdictReader(comparison_form("Better: ", ("A", "B"), "Tie"), tokens_of(made))
    place = reader.forced(Rendered(tuple(made.encode("which\n")), "which\n"), ())
    before = made.encode("which\nBetter:")
    assert list(place.ids) == before
    chances = last_logits(module, before).softmax(dim=-1).tolist()
    first, second, tie = (chances[made.id(t)] for t in (" A", " B", " Tie"))
    ((_, found),) = expected_scores(adapt(module), [place], reader, LocalEngine())
    mass = first + second + tie
    assert found.mass == pytest.approx(mass, abs=1e-8)
    assert found.score == pytest.approx((first + tie / 2) / mass, abs=1e-8)


def test_what_labels_share_is_given_to_the_judge():
    made = pieces()
    reader = VerdictReader(
        comparison_form("Better: ", ("Left one", "Left two"), None), tokens_of(made)
    )
    place = reader.forced(Rendered((0,), "\n"), ())
    assert made.decode(place.ids[1:]) == "Better: Left "
    (stated,) = reader.stated((0,), tuple(made.encode("hm. Better: Left two")))
    assert made.decode(stated.ids[1:]) == "hm. Better: Left "


# models and tokenizers of transformers

HF_TOKENIZERS = {
    "space apart": (),
    "space joined": tuple(("Ġ", d) for d in DIGITS),
    "space joined, ten whole": (*(("Ġ", d) for d in DIGITS), ("Ġ1", "0")),
}


def hf_pieces(tokenizer) -> list[str]:
    return [tokenizer.decode([i]) for i in range(len(tokenizer))]


@pytest.mark.parametrize("numbers", ["0-5", "0-10", "1-100"])
@pytest.mark.parametrize("merges", HF_TOKENIZERS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_hugging_face_model_gives_what_every_path_by_itself_gives(kind, merges, numbers):
    pytest.importorskip("transformers")
    source = word_tokenizer(merges=HF_TOKENIZERS[merges])
    texts = hf_pieces(source)
    joined = merges != "space apart"
    paths = {}
    for n in RANGES[numbers]:
        spelt = [f" {n}"[:2], *str(n)[1:]] if joined else list(str(n))
        if merges.endswith("whole") and str(n).startswith("10"):
            spelt = [" 10", *str(n)[2:]]
        paths[n] = [texts.index(t) for t in spelt]
    module = tiny(kind, vocab=len(texts), dtype=torch.float64)
    leaning(module, {token for path in paths.values() for token in path})
    tokens = Tokens(source, eos_id=None, vocab=len(texts), chat_template="raw")
    reader = VerdictReader(form(RANGES[numbers]), tokens)
    prompts = ["rate:\n", "rate this, it is longer:\n"]
    places = [reader.forced(tokens.prompt(p), ()) for p in prompts]
    found = scores_at(module, places, reader)
    for prompt, place, result in zip(prompts, places, found, strict=True):
        words = prompt + ("score:" if joined else "score: ")
        before = source.encode(words, add_special_tokens=False)
        assert list(place.ids) == before
        score, mass = oracle(WithLogits64(module), before, paths, texts)
        assert result.mass == pytest.approx(mass, abs=2e-9)
        assert result.score == pytest.approx(score, abs=1e-7)


class WithLogits64(torch.nn.Module):
    """A bare model for the oracle: no cache, no mask."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, ids):
        return self.module(input_ids=ids, use_cache=False)


def metaspace_tokenizer(joined: bool):
    """As SentencePiece: a space is ▁, one is put before every text and taken off when decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["</s>", "▁", *CHARACTERS]
    merges = [("▁", d) for d in DIGITS] if joined else []
    vocab = {t: i for i, t in enumerate([*alphabet, *("▁" + d for d in DIGITS)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    inner.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


@pytest.mark.parametrize("joined", [True, False])
def test_a_space_before_every_text_does_not_move_the_place(joined):
    pytest.importorskip("transformers")
    source = metaspace_tokenizer(joined)
    tokens = Tokens(source, eos_id=None, vocab=len(source), chat_template="raw")
    reader = VerdictReader(form(range(11)), tokens)
    names = source.convert_ids_to_tokens

    def seen(ids):
        return "".join(names(list(ids))).replace("▁", " ")

    answer = tokens.encode_part("good.\nscore: 4")
    (place,) = reader.stated((), answer)
    assert seen(place.ids) == (" good.\nscore:" if joined else " good.\nscore: ")
    assert names(list(dict(place.trie.paths)[4.0])) == (["▁4"] if joined else ["4"])
    forced = reader.forced(tokens.prompt("rate"), tokens.encode_part("good"))
    assert seen(forced.ids) == " rate good\nscore:" + "" if joined else " rate good\nscore: "
    assert forced.trie.paths == place.trie.paths
    (alone,) = reader.stated((), tokens.encode_part("7"))
    assert alone is not None and alone.ids in ((), tokens.encode_part(" ")[:1])
