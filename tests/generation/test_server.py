"""The server engine and the server judge against a small server that misbehaves as it is told.

As a program (`python -m tests.generation.test_server FOLDER`) it does a run of the two-process test.
"""

import _thread
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from string import ascii_lowercase

import pytest

pytest.importorskip("openai")

from self_rewarding_lm import (
    ComparisonConfig,
    ExternalRewardDPOConfig,
    MarkedRubric,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    SelfPlayConfig,
    SelfRewardDPOConfig,
    SelfRewardingTrainer,
    ServerEngine,
    ServerJudge,
    generate,
)
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, ServerError
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.score_trie import build_trie, expected_score, score_probabilities
from self_rewarding_lm.generation.server.client import HttpClient, _Problem
from self_rewarding_lm.generation.server.completions import prompt_text
from self_rewarding_lm.judges.self_judge import SelfJudge
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.records import Candidate, Prompt
from tests.support import fake_server
from tests.support.fake_server import ALPHABET, MOST_TOKENS, FakeServer, distribution, reply_ids
from tests.support.models import ALPHABET as MODELS_ALPHABET
from tests.support.models import (
    CHARACTERS,
    END,
    TEXT_VOCAB,
    Successor,
    context,
    ids_of,
    transformer,
)
from tests.support.processes import two

TOKENS = Tokens(CHARACTERS, eos_id=END, vocab=TEXT_VOCAB)
MODEL = adapt(Successor(TEXT_VOCAB))
PLAIN = Decoding(end_ids=(END,))
PROGRAM = f"{sys.executable} {Path(fake_server.__file__)} {{checkpoint}} {{port}}"


def no_weights(folder):
    raise AssertionError("a running server is given no weights")


def requests_of(count, new=8):
    return [Request(ids_of(ALPHABET[n % 26] * (1 + n % 3)), 1000 + n, new) for n in range(count)]


def predicted(request):
    ids, finish = reply_ids(list(request.ids), request.key, request.max_new_tokens)
    return Completion(tuple(ids), finish == "stop")


def generated(engine, requests, decoding=PLAIN, tokens=TOKENS):
    """All results; an index that came twice fails."""
    found = {}
    with engine.serving(no_weights, tokens):
        for index, completion in engine.generate(MODEL, requests, decoding):
            assert index not in found
            found[index] = completion
    return [found[n] for n in range(len(requests))]


def real_only(fault):
    """Faults for requests of more than the one token of a trial."""
    return lambda attempt, body: fault(attempt, body) if body.get("max_tokens", 9) > 1 else None


def test_the_program_speaks_the_language_of_the_other_tests():
    assert ALPHABET == MODELS_ALPHABET and fake_server.END == END


# --- candidates -----------------------------------------------------------------------------------


def test_each_request_has_its_own_answer_once_though_they_come_out_of_order():
    """The first eight are held until all eight are there; there are never more."""
    gate = threading.Barrier(8)

    def late(attempt, body):
        if body["seed"] < 1008:
            gate.wait(30)
        return f"late {0.002 * (body['seed'] * 7 % 13)}"

    requests = requests_of(60)
    with FakeServer(fault=real_only(late)) as server:
        found = generated(ServerEngine(url=server.url, max_in_flight=8), requests)
        assert server.most_in_flight == 8
        assert sorted(b["seed"] for b in server.real()) == [r.key for r in requests]
        assert all(b["model"] == "toy" for b in server.seen)  # the first that it lists
    assert found == [predicted(r) for r in requests]
    assert {f.finished for f in found} == {True}


def test_an_answer_cut_off_by_max_tokens_is_unfinished():
    with FakeServer() as server:
        [found] = generated(ServerEngine(url=f"{server.url}/v1/"), [Request(ids_of("a"), 4, 3)])
    assert found == Completion(ids_of("bcd"), False)


def test_the_seed_is_the_lowest_31_bits_of_the_key():
    key = (5 << 40) + 12345
    with FakeServer() as server:
        generated(ServerEngine(url=server.url), [Request(ids_of("a"), key, 8)])
        assert [b["seed"] for b in server.real()] == [key % 2**31]


@pytest.mark.parametrize("gives", ["ids", "names"])
def test_the_ids_that_the_server_gives_are_those_that_are_trained(gives):
    with FakeServer(gives=gives) as server:
        found = generated(ServerEngine(url=server.url), requests_of(7))
    assert found == [predicted(r) for r in requests_of(7)]  # tokens: None


@pytest.mark.parametrize("kind", ["vllm", "ids", "text"])
def test_a_text_is_encoded_once_with_the_end_token_where_it_ended(kind):
    requests = [*requests_of(6), Request(ids_of("a"), 4, 2)]
    with FakeServer(kind=kind, gives="text", scores=None) as server:
        found = generated(ServerEngine(url=server.url), requests)
        kinds = {type(b["prompt"]) for b in server.real()}
    assert kinds == {str if kind == "text" else list}
    assert [f.tokens for f in found] == ["re-encoded"] * 7
    assert [f.ids for f in found] == [predicted(r).ids for r in requests]
    assert [f.finished for f in found] == [True] * 6 + [False]


def test_all_fields_are_sent_so_that_a_generation_config_of_the_model_changes_nothing():
    with FakeServer() as server:
        engine = ServerEngine(url=server.url, extra={"priority": 3})
        generated(engine, requests_of(1))
        generated(engine, requests_of(1), Decoding(0.5, 4, 0.8, 0.1, 2, 1.2, end_ids=(END,)))
        bare, full = server.real()
    assert (bare["temperature"], bare["top_k"], bare["top_p"], bare["min_p"]) == (1.0, -1, 1.0, 0.0)
    assert (bare["repetition_penalty"], bare["min_tokens"]) == (1.0, 0)
    assert (full["temperature"], full["top_k"], full["top_p"], full["min_p"]) == (0.5, 4, 0.8, 0.1)
    assert (full["repetition_penalty"], full["min_tokens"]) == (1.2, 2)
    assert full["stop_token_ids"] == [END] and full["priority"] == 3


def test_transformers_serve_gets_a_whole_generation_config():
    decoding = Decoding(0.5, None, 0.8, end_ids=(END,))
    with FakeServer(kind="transformers") as server:
        generated(ServerEngine(url=server.url), requests_of(2), decoding)
        generated(ServerEngine(url=server.url), requests_of(1), Decoding(0.0, end_ids=(END,)))
        sampled, _, greedy = (json.loads(b["generation_config"]) for b in server.real())
    assert sampled == {
        **{"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 0},
        **{"max_new_tokens": 8, "repetition_penalty": 1.0},
        **{"eos_token_id": [END], "pad_token_id": END},
    }
    assert greedy["do_sample"] is False and "temperature" not in greedy


def test_settings_that_a_server_has_no_field_for_are_an_error_before_any_request():
    with FakeServer(kind="ids") as server:
        engine = ServerEngine(url=server.url)
        with pytest.raises(ConfigError, match="top_k, min_new_tokens"):
            generated(engine, requests_of(3), Decoding(top_k=3, min_new_tokens=2))
        assert not server.real()
    with pytest.raises(ConfigError, match="filter_fn"):  # not even the address is asked
        generated(
            ServerEngine(url="http://127.0.0.1:9"), requests_of(1), Decoding(filter_fn=lambda x: x)
        )


def test_behind_a_stop_text_stands_no_end_token():
    stop = Decoding(end_ids=(END,), stop=("c",))
    with FakeServer(kind="ids") as server:  # takes the stop text out and does not say so
        [unknown] = generated(ServerEngine(url=server.url), [Request(ids_of("a"), 0, 8)], stop)
    assert unknown == Completion(ids_of("b"), True, tokens="re-encoded")
    with FakeServer(gives="text") as server:  # says that it was the end token
        [ended] = generated(ServerEngine(url=server.url), [Request(ids_of("a"), 0, 8)], stop)
    assert ended.ids == (*ids_of("b"), END)


def test_a_prompt_that_no_text_gives_is_recorded_where_only_texts_are_taken():
    with FakeServer(kind="text") as server:
        ended = Request((*ids_of("ab"), END), 1, 8)
        found = generated(ServerEngine(url=server.url), [ended, *requests_of(2)])
    assert found[0] == Completion((), None, reason="no_text")
    assert [f.reason for f in found[1:]] == [None, None]


def test_a_prompts_text_is_what_the_servers_tokenizer_reads_as_its_ids():
    pytest.importorskip("transformers")
    from tests.support.hf_models import VOCAB, word_tokenizer

    for adds_bos in (False, True):
        tokenizer = word_tokenizer(adds_bos=adds_bos)
        tokens = Tokens(tokenizer, eos_id=None, vocab=VOCAB, chat_template="chatml")
        ids = tokens.prompt("Hi there").ids
        text = prompt_text(ids, tokens)
        assert text is not None and "<|im_start|>user" in text  # markers are not left out
        assert tuple(tokenizer(text)["input_ids"]) == ids


def test_generate_takes_a_server_engine():
    with FakeServer() as server:
        [found] = generate(
            Successor(TEXT_VOCAB),
            ["ab"],
            num_samples=3,
            tokenizer=CHARACTERS,
            eos_id=END,
            sampling=SamplingConfig(max_new_tokens=9),
            engine=ServerEngine(url=server.url),
        )
    assert [c.id for c in found] == [f"generate/0/{k}" for k in range(3)]
    assert all("cdefgh".startswith(c.text) and c.ids[-1] == END for c in found)


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, 503, 408, 429, "close", "lost", "hang"])
def test_a_fault_that_passes_is_tried_again_and_nothing_is_lost_or_doubled(fault):
    """Every third request fails at first."""
    faulty = real_only(lambda n, body: fault if n == 1 and body["seed"] % 3 == 0 else None)
    requests = requests_of(15)
    with FakeServer(fault=faulty) as server:
        timeout = 2.0 if fault == "hang" else 60.0
        found = generated(ServerEngine(url=server.url, timeout=timeout), requests)
        tries = [n for key, n in server.tries.items() if json.loads(key)["max_tokens"] > 1]
        assert sorted(tries) == [1] * 10 + [2] * 5
    assert found == [predicted(r) for r in requests]


def test_retry_after_is_honoured():
    asked = []

    def fault(attempt, body):
        asked.append(time.monotonic())
        return (429, {"Retry-After": "1.2"}) if attempt == 1 else None

    with FakeServer(fault=real_only(fault)) as server:
        generated(ServerEngine(url=server.url), requests_of(1))
    assert 1.2 <= asked[1] - asked[0] < 3


def test_waits_double_up_to_the_longest_and_have_no_jitter():
    client = HttpClient("http://x", first_wait=0.5, longest_wait=3.0)
    failed = _Problem(500, "status", "")
    assert [client._wait(n, failed) for n in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert client._wait(0, _Problem(429, "status", "", wait=7.0)) == 7.0


@pytest.mark.parametrize(
    ("status", "reason"), [(400, "refused_400"), (422, "refused_422"), (413, "too_long")]
)
def test_a_request_that_can_never_succeed_is_recorded_and_the_others_go_on(status, reason):
    faulty = real_only(lambda n, body: status if body["seed"] == 1002 else None)
    with FakeServer(fault=faulty) as server:
        found = generated(ServerEngine(url=server.url), requests_of(5))
        assert len(server.real()) == 5  # it was asked once
    assert found[2] == Completion((), None, reason=reason)
    assert [f.reason for f in found] == [None, None, reason, None, None]


def test_a_prompt_over_the_servers_context_is_too_long():
    long = Request(ids_of("a" * MOST_TOKENS), 1, 8)
    with FakeServer() as server:
        found = generated(ServerEngine(url=server.url), [long, *requests_of(2)])
    assert [f.reason for f in found] == ["too_long", None, None]


def test_one_request_that_always_fails_is_given_up_while_others_are_answered():
    faulty = real_only(lambda n, body: 500 if body["seed"] == 1000 else None)
    with FakeServer(fault=faulty) as server:
        found = generated(ServerEngine(url=server.url, max_retries=1), requests_of(5))
    assert [f.reason for f in found] == ["gave_up_500", None, None, None, None]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_us_stops_everything_at_once(status):
    faulty = real_only(lambda n, body: status)
    with FakeServer(fault=faulty) as server:
        began = time.monotonic()
        with pytest.raises(ServerError, match=rf"status {status}.*told to say {status}"):
            generated(ServerEngine(url=server.url, max_in_flight=2), requests_of(40))
        assert time.monotonic() - began < 5 and len(server.real()) < 10


def test_a_server_that_is_gone_is_an_error_that_says_so():
    with FakeServer() as server:
        url = server.url
    with pytest.raises(ServerError, match=r"gave no answer in 2 tries.*Is it running"):
        generated(ServerEngine(url=url, max_retries=1), requests_of(3))


def test_a_server_without_completions_says_what_it_refuses():
    with (
        FakeServer(fault=lambda n, body: 400) as server,
        pytest.raises(ServerError, match=r"(?s)in every form.*told to say 400"),
    ):
        generated(ServerEngine(url=server.url), requests_of(1))


@contextmanager
def at_most(seconds):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_closing_the_results_early_cancels_what_is_in_flight():
    hangs = real_only(lambda n, body: "hang" if body["seed"] > 1000 else None)
    with FakeServer(fault=hangs) as server, at_most(5):
        engine = ServerEngine(url=server.url, max_in_flight=4)
        with engine.serving(no_weights, TOKENS):
            results = engine.generate(MODEL, requests_of(20), PLAIN)
            assert next(results) == (0, predicted(requests_of(1)[0]))
            results.close()
        threads = [t for t in threading.enumerate() if t.name == "server requests"]
        assert not threads and len(server.real()) <= 6  # none was sent afterwards


def test_an_interrupt_cancels_what_is_in_flight():
    # a shell's background jobs begin with this signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def hang(attempt, body):
        if body["seed"] == 1000:
            threading.Timer(0.3, _thread.interrupt_main).start()
        return "hang"

    with FakeServer(fault=real_only(hang)) as server, at_most(30):
        with pytest.raises(KeyboardInterrupt):
            generated(ServerEngine(url=server.url), requests_of(3))
        signal.signal(signal.SIGINT, before)
        assert not [t for t in threading.enumerate() if t.name == "server requests"]


# --- probabilities of scores ----------------------------------------------------------------------

SCORES = {1.0: ids_of("1"), 2.0: ids_of("2"), 7.0: ids_of("7"), 10.0: ids_of("10")}
TRIE = build_trie(SCORES)
DIGITS = frozenset(ids_of("0123456789"))
ROWS = [ids_of("ab"), ids_of("score: "), ids_of("x")]


def by_enumeration(ids):
    """Each score's probability from the toy's distribution, along its characters."""
    first, second = distribution(ids), distribution((*ids, *ids_of("1")))
    digit = {c: ids_of(c)[0] for c in "01267"}
    ends = 1 - sum(second[t] for t in DIGITS)
    return {
        1.0: first[digit["1"]] * ends,
        2.0: first[digit["2"]],
        7.0: first[digit["7"]],
        10.0: first[digit["1"]] * second[digit["0"]],
    }


def chances(engine, tokens=TOKENS):
    with engine.serving(no_weights, tokens):
        return dict(engine.chances(MODEL, ROWS, TRIE, DIGITS))


def test_probabilities_of_scores_are_those_of_the_model_where_tokens_can_be_named():
    with FakeServer() as server:
        found = chances(ServerEngine(url=server.url, max_in_flight=2))
        asked = [b for b in server.seen if len(b.get("logprob_token_ids", ())) > 2]
        assert len(asked) == 2 * len(ROWS)  # a request a node
    assert sorted(found) == [0, 1, 2]
    for n, ids in enumerate(ROWS):
        assert score_probabilities(TRIE, found[n]) == pytest.approx(by_enumeration(ids))


def test_children_that_are_not_among_the_likeliest_are_scored_by_themselves():
    with FakeServer(scores="top") as server:
        found = chances(ServerEngine(url=server.url, max_unknown=1e-3))
        assert any("prompt_logprobs" in b for b in server.seen)
    for n, ids in enumerate(ROWS):
        known, truth = score_probabilities(TRIE, found[n]), by_enumeration(ids)
        for score in (2.0, 7.0, 10.0):
            assert known[score] == pytest.approx(truth[score])


def test_what_stays_unknown_is_no_score():
    with FakeServer(scores="top") as server:
        server.prompt_scores, server.most_top = False, 2
        found = chances(ServerEngine(url=server.url))
    results = [expected_score(score_probabilities(TRIE, found[n])) for n in range(len(ROWS))]
    assert [(r.score, r.mass) for r in results] == [(None, None)] * 3


def test_an_unknown_child_counts_nothing_only_where_it_cannot_matter():
    """It has at most what the least of the returned has; the drawn token may be even less likely."""
    with FakeServer(scores="top") as server:
        server.prompt_scores = False
        lenient = chances(ServerEngine(url=server.url, max_unknown=1.0))
    for n, ids in enumerate(ROWS):
        top = sorted(distribution(ids), reverse=True)[:20]
        for token, p in lenient[n][()].tokens.items():
            truth = distribution(ids)[token]
            assert p == pytest.approx(truth) if p else truth <= min(top)


@pytest.mark.parametrize("how", [{"scores": None}, {"gives": "text"}, {"kind": "text"}])
def test_a_server_without_probabilities_is_an_error_before_the_work(how):
    with FakeServer(**how) as server:
        engine = ServerEngine(url=server.url)
        reward = RewardConfig(
            prompt_template="{{ prompt }} {{ response }}",
            reward_regex_template="score: {{ reward }}",
            allowed_scores=(1, 2),
            score_mode="expected",
        )
        with pytest.raises(ConfigError, match="log-probs"):
            trainer(
                [self_reward()], Path("unused"), engine=engine, self_reward_prompt_config=reward
            )
        assert not server.real()


# --- stages ---------------------------------------------------------------------------------------

QUICK = OptimConfig(batch_size=2, learning_rate=1e-3)
SAMPLING = SamplingConfig(max_new_tokens=6)


def by_length(prompts, completions):
    return [float(len(text)) for text in completions]


def stage(**options):
    return ExternalRewardDPOConfig(
        **{
            **{"prompt_dataset": ["ab", "cd", "ef"], "reward_model": by_length},
            **{"num_candidate_responses": 4, "generation": SAMPLING, "optim": QUICK},
            **{"num_train_steps": 1, "reuse_prompts": True, "dropout": 0.0},
            **options,
        }
    )


def self_reward(**options):
    return SelfRewardDPOConfig(
        **{
            **{"prompt_dataset": ["ab", "cd"], "generation": SAMPLING, "judging": SAMPLING},
            **{"optim": QUICK, "num_train_steps": 1, "dropout": 0.0, "min_parse_rate": 0.0},
            **options,
        }
    )


def trainer(stages, folder, **options):
    return SelfRewardingTrainer(
        options.pop("model", None) or transformer(vocab=TEXT_VOCAB),
        finetune_configs=stages,
        tokenizer=CHARACTERS,
        eos_id=END,
        checkpoints_folder=folder,
        quiet=True,
        accelerate_kwargs={"cpu": True},
        **options,
    )


def test_a_stage_trains_on_what_the_server_wrote_and_counts_what_it_refused(tmp_path):
    """The prompt "ef" is refused in three of its four samples, so no pair can be made of it."""
    refused = []

    def fault(attempt, body):
        is_last = body["prompt"] == list(ids_of("ef"))
        if is_last and (len(refused) < 3 or body["seed"] in refused):
            refused.append(body["seed"])
            return 413
        return None

    with FakeServer(fault=real_only(fault)) as server:
        run = trainer([stage()], tmp_path, engine=ServerEngine(url=server.url, max_in_flight=1))()
    [folder] = [f for f in tmp_path.iterdir() if f.is_dir()]
    candidates = [json.loads(line) for line in (folder / "candidates.jsonl").open()]
    lost = [c for c in candidates if c["reason"] is not None]
    assert {(c["reason"], c["text"], tuple(c["ids"])) for c in lost} == {("too_long", None, ())}
    assert len(candidates) == 12 and len(lost) == 3
    assert {p.id for p in run.pairs("external_reward")} <= {
        f"external_reward/{n}/0" for n in range(2)
    }
    metrics = json.loads((folder / "metrics.jsonl").open().readline())
    assert metrics["pairs/dropped_too_long"] == 1 and metrics["candidates/dropped_too_long"] == 3
    judged = [json.loads(line)["candidate_ids"][0] for line in (folder / "judgements.jsonl").open()]
    refused_id = lost[0]["prompt_id"]
    assert sorted(judged) == sorted(c["id"] for c in candidates if c["prompt_id"] != refused_id)


def test_answers_without_ids_are_marked_in_the_records(tmp_path):
    with FakeServer(kind="ids") as server:
        trainer([stage()], tmp_path, engine=ServerEngine(url=server.url))()
    [folder] = [f for f in tmp_path.iterdir() if f.is_dir()]
    candidates = [json.loads(line) for line in (folder / "candidates.jsonl").open()]
    assert {c["tokens"] for c in candidates} == {"re-encoded"}
    assert json.loads((folder / "metrics.jsonl").open().readline())["completions/re_encoded"] == 12


def test_spin_leaves_out_rows_that_were_refused(tmp_path):
    rows = [{"prompt": p, "completion": "zz"} for p in ("ab", "cd", "ef")]
    spin = SelfPlayConfig(
        train_dataset=rows, generation=SAMPLING, optim=QUICK, num_train_steps=1, dropout=0.0
    )
    refuses = real_only(lambda n, body: 422 if body["prompt"][0] == 2 else None)
    with FakeServer(fault=refuses) as server:
        run = trainer([spin], tmp_path, engine=ServerEngine(url=server.url))()
    assert [p.id for p in run.pairs("spin")] == ["spin/0/0", "spin/2/0"]
    assert {"pairs/dropped_refused_422": 1}.items() <= run.metrics("spin")[0].items()


def test_a_stage_with_settings_that_no_server_takes_is_refused_when_the_trainer_is_made(tmp_path):
    sampling = SamplingConfig(filter_fn=lambda logits: logits)
    with pytest.raises(ConfigError, match="filter_fn"):
        trainer([stage(generation=sampling)], tmp_path, engine=ServerEngine(launch=PROGRAM))


def test_the_policy_judges_itself_behind_the_server(tmp_path):
    """The judge prompt ends in "score: " and a digit of the response's length; the toy goes on in
    letters, so that every judgement is read by a function of them."""
    reward = RewardConfig(
        prompt_template="{{ prompt }} {{ response }}", parse_reward=lambda text: float(len(text))
    )
    with FakeServer() as server:
        engine = ServerEngine(url=server.url)
        run = trainer([self_reward()], tmp_path, engine=engine, self_reward_prompt_config=reward)()
    judged = run.judgements("self_reward")
    assert len(judged) == 2 * 4 * 3
    assert all(j.score == len(j.text) and j.source == "sampled" for j in judged)


def test_expected_scores_of_a_judge_come_from_the_servers_probabilities():
    reward = RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        reward_regex_template="S: {{ reward }}",
        allowed_scores=tuple(range(10)),
        score_mode="expected",
        forced_ending="at_once",
    )
    prompt, candidates = candidates_of(["a", "bb"])
    with FakeServer() as server:
        ctx = context(Successor(TEXT_VOCAB), tokens=TOKENS, engine=ServerEngine(url=server.url))
        judge = SelfJudge(reward, SAMPLING, 1)
        found = list(judge.judge(ctx, [prompt], [candidates]))
    behind = distribution(ids_of("S: "))  # a function of the last two ids alone
    p = {score: behind[ids_of(str(score))[0]] for score in range(10)}
    mass = sum(p.values())
    assert mass > 0.1
    for judgement in found:
        assert judgement.score_mass == pytest.approx(mass)
        assert judgement.score == pytest.approx(sum(s * q for s, q in p.items()) / mass)
        assert judgement.source == "forced"


class SaysMarks(ServerEngine):
    """A server whose texts are one review; its probabilities are the server's own."""

    def generate(self, model, requests, decoding):
        for i in range(len(requests)):
            yield i, Completion(ids_of(f"one: {MARKS[0]} two: {MARKS[1]}"), True)


BEHIND = {letter: distribution(ids_of(": "))[ids_of(letter)[0]] for letter in ascii_lowercase}
"""The server's probability of each letter after a colon and a space."""
LIKELY = sorted(BEHIND, key=BEHIND.__getitem__)
MARKS = LIKELY[-1], next(x for x in reversed(LIKELY) if BEHIND[x] < BEHIND[LIKELY[-1]])


def test_expected_marks_of_a_judge_come_from_the_servers_probabilities():
    reward = RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        marks=MarkedRubric(items=2, yes=MARKS[0], no=MARKS[1], points=(1, 3)),
        score_mode="expected",
    )
    prompt, candidates = candidates_of(["a", "bb"])
    with FakeServer() as server:
        ctx = context(Successor(TEXT_VOCAB), tokens=TOKENS, engine=SaysMarks(url=server.url))
        found = list(SelfJudge(reward, SAMPLING, 1).judge(ctx, [prompt], [candidates]))
    yes, no = (BEHIND[word] for word in MARKS)
    assert len(found) == 2 and yes > no and yes + no > 0.1
    for judgement in found:
        assert judgement.score_mass == pytest.approx(yes + no)
        assert judgement.score == pytest.approx(4 * yes / (yes + no))
        assert judgement.source == "expected"


# --- a server that is started ---------------------------------------------------------------------


def save_nothing(folder):
    (folder / "config.json").write_text("{}")


def launched(tmp_path, how="", **options):
    return ServerEngine(launch=f"{PROGRAM} {how}", folder=tmp_path, **options)


def served(tmp_path):
    return [json.loads(line) for line in (tmp_path / "served.jsonl").open()]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_slow_server_is_waited_for_and_gone_afterwards(tmp_path):
    engine = launched(tmp_path, "slow")
    with engine.serving(save_nothing, TOKENS):
        assert not (tmp_path / "served.jsonl").exists()  # nothing was asked yet
        found = dict(engine.generate(MODEL, requests_of(5), PLAIN))
        [record] = served(tmp_path)
        assert is_alive(record["pid"])
        again = dict(engine.generate(MODEL, requests_of(5), PLAIN))
    assert found == again == {n: predicted(r) for n, r in enumerate(requests_of(5))}
    assert len(served(tmp_path)) == 1 and not is_alive(record["pid"])
    assert not Path(record["folder"]).exists()  # the weights are not kept twice


def test_a_server_that_does_not_start_shows_its_log_and_exit_code(tmp_path):
    engine = launched(tmp_path, "broken")
    with (
        pytest.raises(ServerError, match=r"(?s)exit code 3.*no such architecture: toy"),
        engine.serving(save_nothing, TOKENS),
    ):
        list(engine.generate(MODEL, requests_of(1), PLAIN))


def test_a_server_that_is_not_healthy_in_time_is_stopped(tmp_path):
    command = f"{sys.executable} -c 'import time; print(\"hm\", flush=True); time.sleep(60)' "
    engine = ServerEngine(launch=command + "{checkpoint} {port}", start_timeout=1.5)
    with (
        at_most(10),
        pytest.raises(ServerError, match=r"(?s)not healthy after 1.5 s .*hm"),
        engine.serving(save_nothing, TOKENS),
    ):
        list(engine.generate(MODEL, requests_of(1), PLAIN))


def test_a_server_that_ignores_the_signal_is_killed(tmp_path):
    engine = launched(tmp_path, "stubborn", stop_timeout=0.5)
    with at_most(15), engine.serving(save_nothing, TOKENS):
        list(engine.generate(MODEL, requests_of(1), PLAIN))
    [record] = served(tmp_path)
    assert not is_alive(record["pid"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_server_is_stopped_when_the_work_raises(tmp_path, error):
    engine = launched(tmp_path)
    with pytest.raises(error), engine.serving(save_nothing, TOKENS):
        next(engine.generate(MODEL, requests_of(3), PLAIN))
        raise error
    [record] = served(tmp_path)
    assert not is_alive(record["pid"])


def test_a_server_is_stopped_when_the_interpreter_ends(tmp_path):
    program = (
        "import sys; from pathlib import Path; "
        "from self_rewarding_lm.generation.server.process import LaunchedServer; "
        f"folder = Path({str(tmp_path)!r}) / 'a' / 'model'; folder.mkdir(parents=True); "
        f"server = LaunchedServer({PROGRAM!r}, folder, start_timeout=30, stop_timeout=5); "
        "server.start()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    [record] = served(tmp_path)
    assert not is_alive(record["pid"])


def test_a_command_must_have_places_for_checkpoint_and_port():
    with pytest.raises(ConfigError, match=r"lacks \{checkpoint\}"):
        ServerEngine(launch="vllm serve model --port {port}")
    with pytest.raises(ConfigError, match="cannot be started"):
        engine = ServerEngine(launch="no-such-program-at-all {checkpoint} {port}")
        with engine.serving(save_nothing, TOKENS):
            list(engine.generate(MODEL, requests_of(1), PLAIN))
    with pytest.raises(ConfigError, match="neither"):
        ServerEngine()


def test_each_stage_is_served_by_its_own_weights_and_trains_after_the_server_is_gone(tmp_path):
    """Two stages: the second server has the weights that the first stage wrote."""
    alive_in_training = []

    def look(model):
        alive_in_training.append([is_alive(r["pid"]) for r in served(tmp_path / "work")])
        return float(len(alive_in_training))  # better each time: the last weights stay

    optim = OptimConfig(batch_size=2, learning_rate=1e-2, eval_every=1)
    stages = [stage(early_stopper_eval_module=look, optim=optim) for _ in range(2)]
    (tmp_path / "work").mkdir()
    engine = ServerEngine(launch=PROGRAM, folder=tmp_path / "work")
    trainer(stages, tmp_path / "run", engine=engine)()
    first, second = served(tmp_path / "work")
    assert alive_in_training[0] == [False] and alive_in_training[-1] == [False, False]
    assert not any(map(any, alive_in_training))
    saved = tmp_path / "run" / "01-external_reward" / "model" / "model.safetensors"
    assert second["weights"] == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert first["weights"] not in (None, second["weights"])


def test_a_stage_whose_records_are_all_there_starts_no_server(tmp_path):
    power = iter([False, True, True, True, True])

    def look(model):
        if not next(power):
            raise RuntimeError("the power went out")
        return 0.0

    optim = OptimConfig(batch_size=2, learning_rate=1e-2, eval_every=1)
    (tmp_path / "work").mkdir()

    def run():
        stages = [stage(early_stopper_eval_module=look, optim=optim)]
        engine = ServerEngine(launch=PROGRAM, folder=tmp_path / "work")
        trainer(stages, tmp_path / "run", engine=engine)()

    with pytest.raises(RuntimeError, match="power"):
        run()
    run()
    assert len(served(tmp_path / "work")) == 1


def one_run(folder):
    engine = ServerEngine(launch=PROGRAM, folder=folder)
    trainer([stage()], folder / "run", engine=engine)()


def test_two_processes_share_one_server_and_give_the_records_of_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one_run(tmp_path / "one")
    two("-m", "tests.generation.test_server", tmp_path / "two")
    records = [
        (tmp_path / name / "run" / "01-external_reward" / "candidates.jsonl").read_text()
        for name in ("one", "two")
    ]
    assert records[0] == records[1] and records[0].count("\n") == 12
    [record] = served(tmp_path / "two")
    assert not is_alive(record["pid"])


@pytest.mark.slow
def test_a_stage_with_transformers_serve_on_the_weights_that_it_saved(tmp_path):
    """Greedy answers are those of the local engine; then a stage samples, pairs and trains."""
    for name in ("transformers", "fastapi", "uvicorn"):
        pytest.importorskip(name)
    from self_rewarding_lm.data.chat import TEMPLATES
    from tests.support.hf_models import VOCAB, tiny, word_tokenizer

    tokenizer = word_tokenizer(TEMPLATES["chatml"])
    model = tiny("llama", VOCAB, max_position_embeddings=256)
    program = Path(sys.executable).with_name("transformers")
    engine = ServerEngine(
        launch=f"{program} serve {{checkpoint}} --port {{port}} --host 127.0.0.1 --device cpu",
        folder=tmp_path,
        start_timeout=180,
        max_in_flight=4,
    )
    greedy = SamplingConfig(temperature=0, max_new_tokens=12)
    asked = {"prompts": ["Who?", "Why not?"], "tokenizer": tokenizer, "sampling": greedy}
    there, here = generate(model, **asked, engine=engine), generate(model, **asked)
    # the local texts, encoded again: broken characters take more tokens, and are cut at twelve
    again = [tokenizer.encode(own[0].text, add_special_tokens=False) for own in here]
    assert [own[0].ids for own in there] == [tuple(ids[:12]) for ids in again]
    stages = [
        ExternalRewardDPOConfig(
            prompt_dataset=["Who?", "Why?", "When?"],
            reward_model=by_length,
            generation=SamplingConfig(
                temperature=2.0, top_p=None, max_new_tokens=40, stop=tuple("abcdefghijklmnopqrst")
            ),
            num_candidate_responses=4,
            optim=QUICK,
            num_train_steps=1,
        )
    ]
    run = SelfRewardingTrainer(
        model,
        finetune_configs=stages,
        tokenizer=tokenizer,
        engine=engine,
        checkpoints_folder=tmp_path / "run",
        accelerate_kwargs={"cpu": True},
        quiet=True,
    )()
    [folder] = (tmp_path / "run").glob("01-*")
    candidates = [json.loads(line) for line in (folder / "candidates.jsonl").open()]
    told = [c for c in candidates if not c.get("reason")]  # one that ends at once has no text
    assert len(candidates) == 12 and {c["tokens"] for c in told} == {"re-encoded"}
    assert len({c["text"] for c in told}) > 6  # sampled, though its default is greedy
    assert run.pairs("external_reward")


# --- a judge behind an address --------------------------------------------------------------------

REWARD = RewardConfig(
    prompt_template="rate {{ prompt }} by {{ response }}",
    reward_regex_template="Score: {{ reward }}",
    score_range=(0, 9),
)


def candidates_of(texts):
    prompt = Prompt("s/0/0", 0, ids_of("ab"), "ab")
    found = [
        Candidate(f"s/0/0/{n}", prompt.id, ids_of(text), text, True, 8)
        for n, text in enumerate(texts)
    ]
    return prompt, found


def test_a_server_judge_reads_a_score_for_each_seed():
    prompt, candidates = candidates_of(["a", "bb"])
    ctx = context(Successor(TEXT_VOCAB), tokens=TOKENS, seed=3)
    with FakeServer() as server:
        server.says = lambda body: f"Score: {body['seed'] % 10}"
        judge = ServerJudge(url=server.url, reward=REWARD, num_judgements=3, api_key="k")
        found = {j.id: j for j in judge.judge(ctx, [prompt], [candidates])}
        asked = {body["seed"]: body for body in server.real()}
    assert set(found) == {f"s/0/0/{c}/j{k}" for c in range(2) for k in range(3)}
    assert set(found) == set(judge.judgement_ids(candidates))
    assert len(asked) == 6  # each judgement has a seed of its own
    words = {b["messages"][0]["content"] for b in asked.values()}
    assert words == {"rate ab by a", "rate ab by bb"}
    assert all(len(b["messages"]) == 1 and b["messages"][0]["role"] == "user" for b in server.seen)
    assert sorted(j.score for j in found.values()) == sorted(float(s % 10) for s in asked)


def test_a_judgement_that_fails_is_none_with_its_reason():
    prompt, candidates = candidates_of(["a", "bb", "ccc", "dddd"])
    ctx = context(Successor(TEXT_VOCAB), tokens=TOKENS)
    says = {"a": "Score: 4", "bb": "very good", "ccc": "", "dddd": "Score: 77"}

    def word(body):
        return body["messages"][0]["content"].rsplit(" ", 1)[-1]

    with FakeServer(fault=lambda n, body: 400 if word(body) == "a" else None) as server:
        server.says = lambda body: says.get(word(body), "Score: 3")
        judge = ServerJudge(url=server.url, model="big", reward=REWARD)
        found = {j.candidate_ids[0]: j for j in judge.judge(ctx, [prompt], [candidates])}
    reasons = [found[c.id].reason for c in candidates]
    assert reasons == ["refused_400", "no_score", "empty", "out_of_range"]
    assert all(j.score is None and j.judge == "big" for j in found.values())


CUT_ANSWERS = [  # what the server says, how it ended, score, reason, whether it is known as finished
    ("Score: 3", "stop", 3, None, True),
    ("Score: 3", None, 3, None, None),
    ("Score: 3", ["stop"], 3, None, None),
    ("Score: 1", "length", None, "unfinished", False),
    ("Score: 4 because it", "length", 4, None, False),
    ("<think>Maybe Score: 3", "length", None, "unfinished", False),
    ("<think>Maybe Score: 3 or", None, None, "unfinished", None),
    ("<think>Maybe Score: 3</think>Score: 4", "stop", 4, None, True),
    ("Score: 9. It", "content_filter", None, "unfinished", False),
    ("", "length", None, "unfinished", False),
    ("", "stop", None, "empty", True),
    ("Nothing", "length", None, "no_score", False),
]


@pytest.mark.parametrize(("said", "end", "score", "reason", "finished"), CUT_ANSWERS)
def test_a_judgement_that_a_server_cut_off_states_no_half_number(
    said, end, score, reason, finished
):
    prompt, candidates = candidates_of(["a"])
    ctx = context(Successor(TEXT_VOCAB), tokens=TOKENS)
    with FakeServer() as server:
        server.says, server.ends = lambda body: said, lambda body: end
        (found,) = ServerJudge(url=server.url, reward=REWARD).judge(ctx, [prompt], [candidates])
    assert (found.score, found.reason, found.finished) == (score, reason, finished)


def test_one_line_makes_another_model_the_annotator(tmp_path):
    with FakeServer() as server:
        server.says = lambda body: f"Score: {len(body['messages'][0]['content']) % 10}"
        judge = ServerJudge(url=server.url, model="big", extra={"max_tokens": None})
        stages = [self_reward(rewarding_model=judge, num_candidate_responses=6)]
        with FakeServer() as policy:
            run = trainer(
                stages,
                tmp_path,
                engine=ServerEngine(url=policy.url),
                self_reward_prompt_config=REWARD,
            )(rehearse=False)
        bodies = server.seen
    judged = run.judgements("self_reward")
    assert (
        len(judged) == len(bodies) - 1 == 2 * 6 * 3
    )  # the stage's three judgements each, and one trial
    assert {(j.judge, j.source) for j in judged} == {("big", "sampled")}
    assert all("max_tokens" not in b and b["temperature"] == 0.7 for b in bodies)
    assert len(run.pairs("self_reward")) >= 1


def test_a_server_judge_compares(tmp_path):
    prompt, candidates = candidates_of(["a", "bb"])
    ctx = context(Successor(TEXT_VOCAB), tokens=TOKENS)
    comparison = ComparisonConfig()
    with FakeServer() as server:
        first = comparison.labels[0]
        server.says = lambda body: f"{comparison.verdict_prefix}{first}"
        judge = ServerJudge(url=server.url).comparing(comparison, SamplingConfig())
        found = {j.id: j for j in judge.judge(ctx, [prompt], [candidates])}
    assert {i: (j.score, j.source) for i, j in found.items()} == {
        "s/0/0/0/vs/1": (1.0, "compared"),
        "s/0/0/1/vs/0": (1.0, "compared"),
    }


def test_expected_scores_of_a_server_judge_are_refused_with_what_to_use():
    expected = RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        reward_regex_template="S: {{ reward }}",
        allowed_scores=(1, 2),
        score_mode="expected",
    )
    with pytest.raises(ConfigError, match="sampled"):
        ServerJudge(url="http://127.0.0.1:9", reward=expected)
    with pytest.raises(ConfigError, match="http"):
        ServerJudge(url="localhost:8000")


if __name__ == "__main__":
    one_run(Path(sys.argv[1]))
