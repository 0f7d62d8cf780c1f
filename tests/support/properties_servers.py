"""What holds for any answer of a server, however broken."""

import math
import re

from hypothesis import strategies as st

from self_rewarding_lm.config import SamplingConfig
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.generation.candidates import decoding_of
from self_rewarding_lm.generation.engine import Request
from tests.support.models import CHARACTERS, END, TEXT_VOCAB, ids_of
from tests.support.mutants import over

TOKENS = Tokens(CHARACTERS, eos_id=END, vocab=TEXT_VOCAB)
BROKEN = st.sampled_from(
    [
        *(None, True, 5, 5.0, 10**30, math.nan, math.inf, "x", "half \ud800", "\x1b[2J", {}),
        *({"a": 1}, [], [5], [None], [[]], [{}], {"tokens": 5}, {"top_logprobs": 5}),
        {"top_logprobs": [5]},
    ]
)
LETTERS = st.text("abcdef", max_size=12)
IDS = st.lists(st.integers(0, 5), max_size=8) | st.lists(st.integers(0, TEXT_VOCAB), max_size=9)
NAMES = st.lists(st.sampled_from(["token_id:1", "token_id:44", "token_id:45", "token_id:-1", "a"]))
LOG_PROB = st.sampled_from(
    [-0.1, -2.0, -30.0, -math.inf, 0.0, 5e-4, 5.0, math.nan, None, True, "x"]
)
NAME = st.sampled_from(["token_id:1", "token_id:2", "token_id:3", "token_id:" + "9" * 12])
TOPS = st.lists(st.dictionaries(NAME, LOG_PROB, max_size=3), max_size=2)
SOUND = st.fixed_dictionaries(
    {"finish_reason": st.sampled_from(["stop", "length", "content_filter"])},
    optional={
        "text": LETTERS,
        "token_ids": IDS,
        "logprobs": st.fixed_dictionaries({}, optional={"tokens": NAMES, "top_logprobs": TOPS}),
        "prompt_logprobs": st.lists(
            st.fixed_dictionaries({"7": st.builds(dict, logprob=LOG_PROB)})
        ),
        "stop_reason": LETTERS | st.integers(0, TEXT_VOCAB),
        "matched_stop": LETTERS | st.integers(0, TEXT_VOCAB),
    },
)
FIELDS = ("finish_reason", "text", "token_ids", "logprobs", "prompt_logprobs", "stop_reason")
CHOICE = st.builds(
    lambda sound, field, value: {**sound, field: value} if field else sound,
    SOUND,
    st.sampled_from([None, *FIELDS]),
    BROKEN,
) | st.builds(
    lambda sound, text: {**sound, "text": text},
    SOUND,
    st.sampled_from(["half \ud800", "\udfff", "a\udc80"]),
)
SETTINGS = st.builds(
    SamplingConfig,
    max_new_tokens=st.just(8),
    min_new_tokens=st.integers(0, 8),
    stop=st.lists(st.sampled_from(["a", "cd", "f"]), max_size=2).map(tuple),
)


@over(
    "generation.server.completions",
    st.tuples(CHOICE, SETTINGS),
    mutants={
        "type(token) is not int or token < 0 or": "token < 0 or",
        "token >= vocab)": "token > vocab)",
        "except UnicodeEncodeError as error:": "except KeyError as error:",
        "if not isinstance(value, list):": "if value == 0:",
        "or not WORD.fullmatch(finish)": "or not finish",
        "return next((n for n in first if d.is_stop(ids[:n])), None)": "return None",
    },
    examples=1500,
)
def an_answer_is_a_completion_within_its_limits_or_malformed(completions, case):
    choice, sampling = case
    served = completions.ServedModel(
        "toy", TOKENS, completions.Abilities("vllm", takes_ids=True), {}
    )
    decoding = decoding_of(sampling, TOKENS)
    try:
        found = served.completion({"choices": [choice]}, Request(ids_of("a"), 0, 8), decoding)
    except completions.MalformedAnswerError as problem:
        assert len(str(problem)) < 200
        return
    assert len(found.ids) <= 8
    assert all(type(token) is int and 0 <= token < TEXT_VOCAB for token in found.ids)
    if found.reason is None:
        assert found.ids and found.finished in (True, False)
    else:
        assert not found.ids and re.fullmatch("[a-z_]{1,60}", found.reason)
    early = CHARACTERS.decode([i for i in found.ids[: sampling.min_new_tokens] if i != END])
    assert all(early.find(stop) in (-1, len(early) - len(stop)) for stop in sampling.stop)


@over(
    "generation.server.completions",
    st.tuples(CHOICE),
    mutants={
        "not value <= LOG_PROB_ROUNDING": "value > LOG_PROB_ROUNDING",
        "type(value) not in (int, float)": "value is None",
        "return min(float(value), 0.0)": "return float(value)",
        "> 1 + LOG_PROB_ROUNDING": "> 4 + LOG_PROB_ROUNDING",
        "len(number) < 10)": "len(number) < 1000)",
        "if not isinstance(value, Mapping):": "if value == 0:",
    },
    examples=1500,
)
def log_probs_are_those_of_probabilities_or_malformed(completions, case):
    answer = {"choices": [case[0]]}
    for read in (completions.answered_logprobs, lambda a: completions.prompt_logprob(a, 7)):
        try:
            found = read(answer)
        except completions.MalformedAnswerError:
            continue
        values = list(found.values()) if isinstance(found, dict) else [found]
        assert all(value is None or -math.inf <= value <= 0.0 for value in values)
        if isinstance(found, dict):
            assert all(0 <= token < 10**9 for token in found)
            assert math.fsum(map(math.exp, values)) <= 1.01


PAYS = 1.1
LIMIT = 1024


@over(
    "generation.server.window",
    st.tuples(st.integers(1, 3000), st.none() | st.integers(1, 300)),
    mutants={
        "if self._rate and rate < GAIN * self._rate:": "if rate < GAIN * self._rate / 3:",
        "self._stay(self.size // 2)": "self._stay(self.size)",
        "elif self.size == self._most:": "elif False:",
        "if self._began is None:": "if False:",
    },
    examples=60,
)
def a_window_doubles_as_long_as_the_server_answers_more_by_a_tenth(window, case):
    """A server that works on `capacity` requests at once, each for a second."""
    capacity, given = case
    wanted = given or 64
    while given is None and wanted < LIMIT:
        if min(2 * wanted, capacity) < PAYS * min(wanted, capacity):
            break
        wanted *= 2
    found, now = window.Window(given), 0.0
    for _ in range(12_000):
        now += 1 / min(found.size, capacity)
        found.answered(now)
        assert found.size <= (given or LIMIT)
    assert found.size == wanted


@over(
    "generation.server.window",
    st.tuples(st.integers(0, 12) | st.integers(0, 500), st.none() | st.integers(1, 300)),
    mutants={
        "self.size = max(1, self.size // 2)": "self.size = self.size // 2",
        "max(1, self.size // 8)": "self.size // 8",
        "if self._refusals == 0:": "if True:",
        "self._refusals = self.size": "self._refusals = 10**9",
    },
    examples=60,
)
def a_window_that_a_busy_server_halved_comes_back_to_what_it_takes(window, case):
    """A server that refuses all that is beyond `capacity`; each windowful is refused at once."""
    capacity, given = case
    found, now, sizes = window.Window(given), 0.0, []
    for step in range(12_000):
        for _ in range(found.size if found.size > capacity else 0):
            found.refused()
            assert found.size >= 1
        now += 1 / max(1, min(found.size, capacity))
        found.answered(now)
        if step > 9_000:
            sizes.append(found.size)
    most = min(given or LIMIT, capacity)
    assert most <= max(sizes) <= max(1.25 * most, most + 2, 3) and min(sizes) >= most // 3
