"""What vLLM 0.33 and SGLang 0.5.23 do with settings, as their source says (the fake server does it).

Ends, stop texts, limits and neutral values: an answer is the one that the local engine would give.
"""

import pytest

pytest.importorskip("openai")

from self_rewarding_lm import SamplingConfig, ServerEngine, ServerJudge
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.generation.candidates import decoding_of, sample_candidates
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.server.chances import check_chances
from self_rewarding_lm.generation.server.client import HttpClient
from self_rewarding_lm.generation.server.completions import NEUTRAL_FIELDS, find_abilities
from self_rewarding_lm.records import Prompt
from tests.generation.test_server import (
    MODEL,
    PLAIN,
    REWARD,
    TOKENS,
    candidates_of,
    generated,
    no_weights,
    requests_of,
    stage,
    trainer,
)
from tests.support.fake_server import FakeServer
from tests.support.models import CHARACTERS, END, TEXT_VOCAB, Successor, context, ids_of

F = ids_of("f")[0]
ENDS_IN_F = Tokens(CHARACTERS, eos_id=F, vocab=TEXT_VOCAB)
"""The run's end token is the letter f; the server's model has its own, END."""


def asked(server, letters, *, new=8, tokens=TOKENS, **settings):
    """The completion after "a" of a model that repeats so many letters and its end token."""
    decoding = decoding_of(
        SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=new, **settings), tokens
    )
    request = Request(ids_of("a"), letters - 1, new)
    [found] = generated(ServerEngine(url=server.url), [request], decoding, tokens)
    return found


# --- end tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gives", ["ids", "names", "text"])
def test_vllm_goes_on_behind_its_models_end_token_to_the_one_that_is_given(gives):
    with FakeServer(gives=gives) as server:
        ended = asked(server, 5, tokens=ENDS_IN_F)
        body = server.real()[0]
        goes_on = asked(server, 2, tokens=ENDS_IN_F)
    assert (body["ignore_eos"], body["stop_token_ids"]) == (True, [F])
    assert (ended.ids, ended.finished) == (ids_of("bcdef"), True)
    letters = [token for token in goes_on.ids if token != END]
    assert (text(letters), goes_on.finished) == ("bcbcbc", False)


def text(ids):
    return CHARACTERS.decode(ids)


@pytest.mark.parametrize("gives", ["ids", "text"])
def test_sglang_ends_at_its_models_end_token_too_and_no_other_is_put_behind_it(gives):
    with FakeServer(kind="sglang", gives=gives) as server:
        given = asked(server, 5, tokens=ENDS_IN_F)
        own = asked(server, 2, tokens=ENDS_IN_F)
        assert all("ignore_eos" not in body for body in server.real())
        assert all(body["no_stop_trim"] for body in server.real())
    assert (given.ids, given.finished) == (ids_of("bcdef"), True)
    assert ([token for token in own.ids if token != END], own.finished) == ([*ids_of("bc")], True)


def test_a_server_without_given_end_tokens_ends_at_its_own():
    nothing = Tokens(CHARACTERS, eos_id=None, vocab=TEXT_VOCAB)
    with FakeServer() as server:
        found = asked(server, 2, tokens=nothing)
        assert server.real()[0]["ignore_eos"] is False
    assert found == Completion((*ids_of("bc"), END), True)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_end_token_that_ended_a_text_is_the_one_that_is_put_behind_it(kind):
    """Of several end tokens the server names the one that came."""
    several = Tokens(CHARACTERS, eos_id=F, vocab=TEXT_VOCAB, end_ids=(END,))
    assert {*several.end_ids} == {F, END}
    with FakeServer(kind=kind, gives="text") as server:
        assert asked(server, 2, tokens=several).ids == (*ids_of("bc"), END)
        assert asked(server, 5, tokens=several).ids == ids_of("bcdef")


# --- stop texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gives", ["ids", "text"])
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("least", "letters"), [(0, "bc"), (1, "bc"), (2, "bc"), (4, "bc"), (8, "bc")]
)
def test_a_stop_text_ends_an_answer_within_min_new_tokens_too(kind, gives, least, letters):
    with FakeServer(kind=kind, gives=gives) as server:
        found = asked(server, 5, stop=("c", "e"), min_new_tokens=least)
    assert (found.ids, found.finished) == (ids_of(letters), True)


def test_the_local_engine_has_the_same_rule():
    sampling = SamplingConfig(temperature=0, max_new_tokens=8, min_new_tokens=6, stop=("c", "e"))
    [found] = sample_candidates(
        MODEL,
        [Prompt("p", 0, ids_of("a"), "a")],
        sampling,
        1,
        engine=LocalEngine(),
        tokens=TOKENS,
        seed=0,
        limit=None,
    )
    assert (found.ids, found.finished) == (ids_of("bc"), True)


def test_a_stop_text_that_is_complete_first_ends_an_answer_though_another_begins_earlier():
    with FakeServer() as server:
        found = asked(server, 5, stop=("bcde", "cd"), min_new_tokens=6)
    assert found.ids == ids_of("bcd")


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_servers_own_context_bounds_answers_and_marks_prompts_that_fill_it(kind, caplog):
    requests = [Request(ids_of("a" * length), 4, 8) for length in (3, 6, 9, 10, 11)]
    with FakeServer(kind=kind) as server:
        server.max_len = 10
        found = generated(
            ServerEngine(url=server.url), requests, Decoding(end_ids=(END,), min_new_tokens=6)
        )
        sizes = sorted((len(b["prompt"]), b["max_tokens"], b["min_tokens"]) for b in server.real())
    assert sizes == [(3, 7, 6), (6, 4, 4)]  # (9, 1, 1) is not counted as real, the others not asked
    assert [(len(f.ids), f.reason, f.max_new_tokens) for f in found] == [
        (7, None, 7),
        (4, None, 4),
        (1, None, 1),
        (0, "too_long", None),
        (0, "too_long", None),
    ]
    assert any("max_model_len" in r.getMessage() for r in caplog.records)


def test_the_limit_that_was_in_force_is_in_the_record():
    with FakeServer() as server:
        server.max_len = 5
        engine = ServerEngine(url=server.url)
        with engine.serving(no_weights, TOKENS):
            [found] = sample_candidates(
                MODEL,
                [Prompt("p", 0, ids_of("aa"), "aa")],
                SamplingConfig(max_new_tokens=9),
                1,
                engine=engine,
                tokens=TOKENS,
                seed=0,
                limit=None,
            )
    assert found.max_new_tokens == 3


def test_an_adapter_has_the_limit_of_the_model_it_stands_on():
    cards = '{"data": [{"id": "base", "max_model_len": 70}, {"id": "policy", "parent": "base"}, '
    cards += '{"id": "own", "parent": "base", "max_model_len": 50}, {"id": "odd", "parent": []}, '
    cards += '{"id": "wrong", "max_model_len": "9"}, {"id": "none", "max_model_len": 0}]}'
    with FakeServer() as server:
        server.listed = cards.encode()
        found = HttpClient(server.url).models(needed=True)
    assert found == {"base": 70, "policy": 70, "own": 50, "odd": None, "wrong": None, "none": None}


REFUSED = [
    ({"temperature": 2.5}, r"temperature=2.5.*temperature must be in \[0, 2\], got 2.5"),
    ({"stop": tuple("uvwxy")}, r"stop=\('u', 'v', 'w', 'x', 'y'\).*at most 4 items"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_settings_that_the_server_refuses_stop_the_run_before_it_begins(tmp_path, settings, words):
    sampling = SamplingConfig(max_new_tokens=6, **settings)
    with FakeServer() as server:
        with pytest.raises(ConfigError, match=words):
            trainer([stage(generation=sampling)], tmp_path, engine=ServerEngine(url=server.url))
        prompt, candidates = candidates_of(["a"])
        judge = ServerJudge(url=server.url, reward=REWARD, sampling=sampling)
        with pytest.raises(ConfigError, match=words):
            list(judge.judge(context(Successor(40), tokens=TOKENS), [prompt], [candidates]))
        assert not server.real()  # one token each


def test_each_set_of_settings_is_tried_once():
    with FakeServer() as server:
        engine = ServerEngine(url=server.url)
        with engine.serving(no_weights, TOKENS):
            for decoding in (PLAIN, PLAIN, Decoding(0.5, 7), PLAIN, Decoding(0.5, 7)):
                engine.check(decoding, chances=False)
            tried = [b for b in server.seen if b["top_k"] == 7]
            list(engine.generate(MODEL, requests_of(2), PLAIN))
        assert len(tried) == 1 and tried[0]["max_tokens"] == 1


# --- a judge --------------------------------------------------------------------------------------


def judged(server, sampling, says):
    server.says = lambda body: says
    prompt, candidates = candidates_of(["a"])
    judge = ServerJudge(url=server.url, reward=REWARD, sampling=sampling)
    [found] = judge.judge(context(Successor(40), tokens=TOKENS), [prompt], [candidates])
    return found


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_judges_stop_text_stays_in_its_answer(kind):
    sampling = SamplingConfig(stop=("Score: 3", "never"))
    with FakeServer(kind=kind) as server:
        found = judged(server, sampling, "Fine. Score: 3 and more. Score: 1")
    assert (found.text, found.score) == ("Fine. Score: 3", 3.0)


def test_a_judge_gets_neutral_values_where_its_server_takes_them():
    with FakeServer() as server:
        judged(server, SamplingConfig(top_p=None, min_p=0.1), "Score: 3")
        [body] = server.real()
    assert {name: body[name] for name in NEUTRAL_FIELDS} == {**NEUTRAL_FIELDS, "min_p": 0.1}
    assert body["top_p"] == 1.0 and "include_stop_str_in_output" not in body


def test_a_judge_of_openais_own_fields_gets_no_others():
    with FakeServer(kind="text") as server:
        found = judged(server, SamplingConfig(top_p=None), "Score: 3")
        [body] = server.real()
        with pytest.raises(ConfigError, match=r"top_k=5.*Unrecognized request arguments"):
            judged(server, SamplingConfig(top_k=5), "Score: 3")
    assert found.score == 3.0 and not {*NEUTRAL_FIELDS} & {*body} and body["top_p"] == 1.0


# --- SGLang ---------------------------------------------------------------------------------------


def test_sglang_is_known_by_what_it_says_and_gives_no_expected_scores():
    with FakeServer(kind="sglang") as server:
        found = find_abilities(HttpClient(server.url), "toy", TOKENS, {})
    assert (found.kind, found.takes_ids, found.gives_ids) == ("sglang", True, True)
    assert not found.gives_chances
    with pytest.raises(ConfigError, match="log-probs"):
        check_chances(found)
