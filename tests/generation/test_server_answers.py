"""Answers that are none: each is one recorded reason, and the others go on.

Also how long a try may take, how much of an answer is read, and which redirects are followed.
"""

import gzip
import json
import math
import time

import pytest

pytest.importorskip("openai")

from self_rewarding_lm import ServerEngine, ServerJudge
from self_rewarding_lm.errors import ConfigError, ServerError
from self_rewarding_lm.generation.engine import Completion, Decoding
from self_rewarding_lm.generation.score_trie import expected_score, score_probabilities
from self_rewarding_lm.generation.server import client
from self_rewarding_lm.generation.server.client import HttpClient, Refusal
from tests.generation.test_server import (
    DIGITS,
    MODEL,
    REWARD,
    ROWS,
    TOKENS,
    TRIE,
    candidates_of,
    generated,
    no_weights,
    predicted,
    real_only,
    requests_of,
)
from tests.support.fake_server import VOCAB, FakeServer
from tests.support.models import END, Successor, context

DEEP = b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
NO_COMPLETIONS = [
    {"token_ids": [1, 2, VOCAB]},
    {"token_ids": [1, -2]},
    {"token_ids": [1.0, 2.0]},
    {"token_ids": [True, 2]},
    {"token_ids": [1, None]},
    {"token_ids": "12"},
    {"token_ids": {"1": 2}},
    {"token_ids": [7] * 5001},
    {"token_ids": None, "logprobs": ["a", "b"]},
    {"token_ids": None, "logprobs": "token_id:7"},
    {"token_ids": None, "logprobs": {"tokens": "token_id:7"}},
    {"token_ids": None, "logprobs": {"tokens": ["token_id:-7"]}},
    {"token_ids": None, "logprobs": {"tokens": ["token_id:" + "9" * 5000]}},
    {"token_ids": None, "text": ["a"]},
    {"token_ids": None, "text": "a" * 5001},
    {"token_ids": None, "text": "half \ud800"},
    {"token_ids": None, "text": "\N{SNOWMAN} is no letter of the tokenizer"},
    {"finish_reason": {"why": []}},
    {"finish_reason": "a\x1b[2Jb"},
    DEEP,
    b"[1, 2, 3]",
    b'{"choices": "' + b"a" * (client.MOST_BYTES + 1) + b'"}',
]


@pytest.mark.parametrize("said", NO_COMPLETIONS, ids=lambda said: str(said)[:50])
def test_an_answer_that_is_none_is_recorded_and_the_others_go_on(said, caplog):
    faulty = real_only(lambda n, body: said if body["seed"] == 1002 else None)
    with FakeServer(fault=faulty) as server:
        found = generated(ServerEngine(url=server.url), requests_of(5))
        assert len(server.real()) == 5  # it was asked once
    assert found[2] == Completion((), None, reason="malformed")
    assert [f for n, f in enumerate(found) if n != 2] == [
        predicted(r) for n, r in enumerate(requests_of(5)) if n != 2
    ]
    told = [r.getMessage() for r in caplog.records if "malformed" in r.getMessage()]
    assert len(told) == 1 and len(told[0]) < 1000


def test_the_log_tells_of_the_first_malformed_answer_only(caplog):
    faulty = real_only(lambda n, body: {"token_ids": [VOCAB + body["seed"]]})
    with FakeServer(fault=faulty) as server:
        found = generated(ServerEngine(url=server.url), requests_of(9))
    assert {f.reason for f in found} == {"malformed"}
    assert sum("malformed" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("text", "length"), [("abc" * 8, 8), ("a" * 9, 8), ("abcdefg", 7), ("a" * 25, None)]
)
def test_a_text_of_more_tokens_than_were_asked_for_is_cut(text, length):
    """Broken characters have more tokens than the bytes that were drawn, at most three each."""
    says = {"token_ids": None, "text": text, "finish_reason": "length"}
    with FakeServer(fault=real_only(lambda n, body: says)) as server:
        [found] = generated(ServerEngine(url=server.url), requests_of(1, new=8))
    if length is None:
        assert found.reason == "malformed"
    else:
        assert (len(found.ids), found.finished) == (length, False)


BAD_LOGPROBS = [
    *(1000, 5.0, None, math.nan, math.inf, "-1", True, [], {"logprob": -1}),
    *(["top"], "top", {"top_logprobs": "x"}, {"top_logprobs": [["token_id:1"]]}),
]


def chances(engine):
    with engine.serving(no_weights, TOKENS):
        return dict(engine.chances(MODEL, ROWS, TRIE, DIGITS))


def with_logprobs(value):
    """Log-probs of which one is `value`, or which are `value`."""
    if not isinstance(value, list | dict | str) or value in ("-1", [], {"logprob": -1}):
        ids = {token for path in TRIE.levels() for node in path for token in TRIE.children(node)}
        names = {f"token_id:{token}": -3.0 for token in sorted(ids)}
        names[next(iter(names))] = value
        value = {"top_logprobs": [names]}
    return {"logprobs": value}


@pytest.mark.parametrize("value", BAD_LOGPROBS, ids=repr)
def test_log_probs_that_cannot_be_make_no_score_and_the_other_rows_have_theirs(value):
    def fault(attempt, body):
        is_bad = len(body.get("logprob_token_ids", ())) > 2 and tuple(body["prompt"]) == ROWS[1]
        return with_logprobs(value) if is_bad else None

    with FakeServer() as server:
        sound = chances(ServerEngine(url=server.url))
    with FakeServer(fault=fault) as server:
        found = chances(ServerEngine(url=server.url))
    scores = [expected_score(score_probabilities(TRIE, found[n])) for n in range(len(ROWS))]
    assert scores[1].score is None
    for n in (0, 2):
        assert scores[n] == expected_score(score_probabilities(TRIE, sound[n]))


def test_log_probs_whose_sum_is_over_1_make_no_score():
    def fault(attempt, body):
        names = {f"token_id:{token}": -0.1 for token in body.get("logprob_token_ids", ())}
        return {"logprobs": {"top_logprobs": [names]}} if len(names) > 2 else None

    with FakeServer(fault=fault) as server:
        found = chances(ServerEngine(url=server.url))
    assert [expected_score(score_probabilities(TRIE, row)).score for row in found.values()] == [
        None
    ] * len(ROWS)


def test_fewer_of_the_likeliest_than_were_asked_for_say_nothing_of_the_others():
    """All of them are asked for, and one comes: the others may well have the rest."""

    def fault(attempt, body):
        return {"logprobs": {"top_logprobs": [{"token_id:40": -0.01, "token_id:41": -9.0}]}}

    with FakeServer(scores="top", fault=lambda n, b: fault(n, b) if "logprobs" in b else None) as s:
        s.prompt_scores = False
        found = chances(ServerEngine(url=s.url, max_unknown=1e-3))
    assert [expected_score(score_probabilities(TRIE, row)).score for row in found.values()] == [
        None
    ] * len(ROWS)


JUDGED = [
    {"message": "Score: 3"},
    {"message": {"content": ["Score: 3"]}},
    {"message": {"content": 3}},
    {"message": {"content": "Score: 3 \udfff"}},
    DEEP,
    b"null",
]


@pytest.mark.parametrize("said", JUDGED, ids=lambda said: str(said)[:40])
def test_a_judgement_that_is_none_is_recorded_and_the_others_go_on(said):
    prompt, candidates = candidates_of(["a", "bb", "ccc"])
    ctx = context(Successor(40), tokens=TOKENS)

    def fault(attempt, body):
        return said if body["messages"][0]["content"].endswith("bb") else None

    with FakeServer(fault=fault) as server:
        judge = ServerJudge(url=server.url, reward=REWARD)
        found = {j.candidate_ids[0][-1]: j for j in judge.judge(ctx, [prompt], [candidates])}
    assert (found["1"].score, found["1"].reason, found["1"].text) == (None, "malformed", None)
    assert [found[n].score for n in "02"] == [3.0, 3.0]


# --- one try --------------------------------------------------------------------------------------


def test_the_timeout_bounds_a_whole_try_though_bytes_come():
    drips = real_only(lambda n, body: "drip" if body["seed"] == 1001 else None)
    with FakeServer(fault=drips) as server:
        began = time.monotonic()
        engine = ServerEngine(url=server.url, timeout=3.0, max_retries=0)
        found = generated(engine, requests_of(3))
        assert time.monotonic() - began < 60
    assert found[1].reason == "gave_up_timeout"
    assert [found[n] for n in (0, 2)] == [predicted(requests_of(3)[n]) for n in (0, 2)]


def test_a_packed_answer_is_not_unpacked():
    bomb = gzip.compress(b'{"choices": []}' + b" " * 10**7)
    packed = (bomb, {"Content-Encoding": "gzip"})
    faulty = real_only(lambda n, body: packed if body["seed"] == 1001 else None)
    with FakeServer(fault=faulty) as server:
        found = generated(ServerEngine(url=server.url), requests_of(3))
        assert len(server.real()) == 3
    assert [f.reason for f in found] == [None, "malformed", None]


def test_no_more_of_a_refusal_is_read_than_can_be_shown():
    with FakeServer(fault=lambda n, body: 400) as server:
        server.refusal_words = "no " * 10**6
        answer = HttpClient(server.url).try_out("/completions", {"prompt": "a", "max_tokens": 1})
    assert isinstance(answer, Refusal) and answer.reason == "refused_400"
    assert len(answer.message) <= client.MOST_ERROR_BYTES


def test_a_redirect_to_another_host_is_refused_and_that_host_hears_nothing():
    with FakeServer() as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost") + "/v1/completions"
        away = (307, {"Location": elsewhere})
        faulty = real_only(lambda n, body: away if body["seed"] == 1001 else None)
        with FakeServer(fault=faulty) as server:
            found = generated(ServerEngine(url=server.url), requests_of(3))
        assert not other.seen
    assert [f.reason for f in found] == [None, "refused_redirect", None]


def test_a_redirect_within_a_host_is_followed_to_its_end():
    moved = real_only(
        lambda n, body: (307, {"Location": "/v1/other/completions"}) if n == 1 else None
    )
    with FakeServer(fault=moved) as server:
        found = generated(ServerEngine(url=server.url), requests_of(3))
    assert found == [predicted(r) for r in requests_of(3)]
    round_and_round = real_only(lambda n, body: (307, {"Location": "/v1/completions"}))
    with FakeServer(fault=round_and_round) as server:
        found = generated(ServerEngine(url=server.url), requests_of(2))
        assert len(server.real()) == 2 * (1 + client.MOST_REDIRECTS)
    assert {f.reason for f in found} == {"refused_307"}


@pytest.mark.parametrize(
    "listed", ["null", "[]", '{"data": 5}', '{"data": [{"id": 7}, "a", null]}']
)
def test_a_list_of_models_that_is_none_is_an_error_that_says_what_to_give(listed):
    with FakeServer() as server:
        server.listed = listed.encode()
        with pytest.raises(ConfigError, match=r"lists no model.*give model="):
            generated(ServerEngine(url=server.url), requests_of(1))
        found = generated(ServerEngine(url=server.url, model="toy"), requests_of(2))
    assert found == [predicted(r) for r in requests_of(2)]


# --- finding out ----------------------------------------------------------------------------------


def test_a_closed_port_is_an_error_after_two_quick_tries(caplog):
    with FakeServer() as server:
        url = server.url
    began = time.monotonic()
    for model in (None, "toy"):
        with pytest.raises(ServerError, match=r"gave no answer in 2 tries.*Is it running"):
            generated(ServerEngine(url=url, model=model), requests_of(3))
    prompt, candidates = candidates_of(["a"])
    judge = ServerJudge(url=url, model="toy", reward=REWARD)
    with pytest.raises(ServerError, match=r"gave no answer in 2 tries.*Is it running"):
        list(judge.judge(context(Successor(40), tokens=TOKENS), [prompt], [candidates]))
    assert time.monotonic() - began < 30
    assert any("tried again in 0.5 s, retry 1 of 1" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("status", [500, 501, 502, 400, 422])
def test_texts_are_sent_where_token_ids_are_refused_in_any_way(status):
    def fault(attempt, body):
        return status if isinstance(body["prompt"], list) else None

    with FakeServer(kind="text", fault=fault) as server:
        began = time.monotonic()
        found = generated(ServerEngine(url=server.url), requests_of(4))
        assert time.monotonic() - began < 30
        tries = [n for key, n in server.tries.items() if json.loads(key)["max_tokens"] == 1]
        assert max(tries) <= 2
    assert [f.ids for f in found] == [predicted(r).ids for r in requests_of(4)]
    assert {f.tokens for f in found} == {"re-encoded"}


@pytest.mark.parametrize("missing", [0, 1])
def test_log_probs_of_an_answers_tokens_are_taken_if_they_are_asked_for(missing):
    """Those of another number of tokens are none of them."""
    wanted = [predicted(r) for r in requests_of(3)]
    numbers = [-0.25 * (1 + k) for k in range(min(len(w.ids) for w in wanted))]
    numbers = numbers * 40 if not missing else numbers[:-1]
    says = real_only(lambda n, body: {"logprobs": {"token_logprobs": numbers}})
    with FakeServer(fault=says) as server:
        asked = Decoding(end_ids=(END,), logprobs=True)
        found = generated(ServerEngine(url=server.url), requests_of(3), asked)
        assert all(body["logprobs"] == 0 for body in server.real())
        others = generated(ServerEngine(url=server.url), requests_of(3))
    for completion, expected in zip(found, wanted, strict=True):
        assert completion.ids == expected.ids
        known = None if missing else tuple(numbers[: len(expected.ids)])
        assert completion.logprobs == known
    assert all(completion.logprobs is None for completion in others)


def test_a_server_that_ignores_what_it_does_not_know_is_not_taken_for_transformers_serve():
    """As llama.cpp's: a generation config would be ignored, and its own settings used."""
    with FakeServer(kind="llama.cpp") as server:
        decoding = Decoding(0.5, end_ids=(END,))
        found = generated(ServerEngine(url=server.url), requests_of(3), decoding)
        assert all(b["temperature"] == 0.5 and b["top_p"] == 1.0 for b in server.real())
        tries = [n for key, n in server.tries.items() if json.loads(key)["max_tokens"] == 1]
        assert max(tries) == 2
        with pytest.raises(ConfigError, match="top_k"):
            generated(ServerEngine(url=server.url), requests_of(1), Decoding(top_k=3))
    assert [f.ids for f in found] == [predicted(r).ids for r in requests_of(3)]


def test_a_busy_server_is_waited_for_and_not_taken_for_one_that_refuses_ids(caplog):
    def fault(attempt, body):
        is_first = body["max_tokens"] == 1 and isinstance(body["prompt"], list)
        return (503, {"Retry-After": "0.1"}) if is_first and attempt < 5 else None

    with FakeServer(fault=fault) as server:
        found = generated(ServerEngine(url=server.url), requests_of(3))
    assert found == [predicted(r) for r in requests_of(3)]  # ids, not texts
    assert any("status 503" in r.getMessage() for r in caplog.records)
