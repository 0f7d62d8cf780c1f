"""One server for several sets of weights: it sleeps, takes others, and is never asked with old ones.

The server is the fake one as a program: it keeps the weights that it was given, and refuses what
comes out of order.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("openai")

from self_rewarding_lm import OptimConfig, ServerEngine
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, ServerError
from self_rewarding_lm.generation.server import engine as engine_module
from self_rewarding_lm.generation.server.completions import MalformedAnswerError, named_logprobs
from self_rewarding_lm.generation.server.proof import MOST_APART, Proof, own_logprobs, rows_of
from self_rewarding_lm.generation.server.window import FIRST, MOST, Window
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.offloading import off_device
from self_rewarding_lm.runs.stage_files import ADAPTER_FILE, MODEL_FILE
from self_rewarding_lm.runs.weights import write_weights
from tests.generation.test_server import (
    PLAIN,
    PROGRAM,
    is_alive,
    predicted,
    requests_of,
    served,
    stage,
    trainer,
)
from tests.support.models import CHARACTERS, END, TEXT_VOCAB
from tests.support.processes import two

TOKENS = Tokens(CHARACTERS, eos_id=END, vocab=TEXT_VOCAB)
FLAGS = {"vllm": "--enable-sleep-mode", "sglang": "--enable-memory-saver"}


class Table(nn.Module):
    """Logits by the last token alone: what the fake server computes, too."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        numbers = torch.randn(TEXT_VOCAB, TEXT_VOCAB, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(numbers)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def engine_of(tmp_path, kind, how="", **options):
    command = f"{PROGRAM} {FLAGS[kind]} {how}"
    return ServerEngine(launch=command, reload=kind, folder=tmp_path, **options)


def orders(tmp_path):
    """The commands so far: paths, what they ask, and which folders and names they name."""
    file = tmp_path / "orders.jsonl"
    return [json.loads(line) for line in file.open()] if file.exists() else []


def paths(tmp_path):
    return ["?".join([path, *query.values()]) for path, query, _ in orders(tmp_path)]


def saving(module, name=MODEL_FILE):
    return lambda folder: write_weights(module, folder / name)


def asked(engine, module, count=3, name=MODEL_FILE):
    """The completions of a serving with a module's weights."""
    with engine.serving(saving(module, name), TOKENS):
        return dict(engine.generate(adapt(module), requests_of(count), PLAIN))


WHOLE = {
    "vllm": [
        *("/sleep?2", "/wake_up?weights", "/collective_rpc", "/wake_up?kv_cache"),
        "/reset_prefix_cache",
    ],
    "sglang": [
        *("/release_memory_occupation", "/resume_memory_occupation"),
        *("/update_weights_from_disk", "/resume_memory_occupation", "/flush_cache"),
    ],
}
ADAPTED = {
    "vllm": ["/sleep?1", "/wake_up", "/v1/load_lora_adapter", "/reset_prefix_cache"],
    "sglang": [
        *("/release_memory_occupation", "/resume_memory_occupation"),
        *("/unload_lora_adapter", "/load_lora_adapter", "/flush_cache"),
    ],
}


@pytest.mark.parametrize("kind", FLAGS)
def test_one_server_takes_the_weights_of_each_serving_and_sleeps_between(tmp_path, kind):
    engine = engine_of(tmp_path, kind)
    with engine.kept():
        for seed in range(3):
            found = asked(engine, Table(seed))
            assert found == {n: predicted(r) for n, r in enumerate(requests_of(3))}
            [record] = served(tmp_path)  # one start
            assert is_alive(record["pid"])
    assert paths(tmp_path) == [*WHOLE[kind], *WHOLE[kind], WHOLE[kind][0]]
    assert not is_alive(record["pid"]) and not list(tmp_path.glob("served-*/model*"))


@pytest.mark.parametrize("kind", FLAGS)
def test_an_adapter_is_loaded_by_its_name_from_a_folder_of_its_own(tmp_path, kind):
    """Its base model stays in the server, which may not let go of it."""
    engine = engine_of(tmp_path, kind, "adapter", model="policy")
    with engine.kept():
        for seed in range(3):
            asked(engine, Table(seed), name=ADAPTER_FILE)
        [work] = tmp_path.glob("served-*")
        assert sorted(p.name for p in work.glob("model*")) == ["model", "model-2"]
    assert paths(tmp_path) == [*ADAPTED[kind], *ADAPTED[kind], ADAPTED[kind][0]]
    bodies = [body for _, _, body in orders(tmp_path) if "lora_path" in body]
    assert [Path(body["lora_path"]).name for body in bodies] == ["model-1", "model-2"]
    assert {body["lora_name"] for body in bodies} == {"policy"}
    assert [body.get("load_inplace") for body in bodies] == [kind == "vllm" or None] * 2
    with pytest.raises(ConfigError, match="give model="):
        asked(engine_of(tmp_path, kind, "adapter"), Table(), name=ADAPTER_FILE)


WRONG = {
    "stale": r"still has the weights of an earlier stage",
    "remembers": r"still has the weights of an earlier stage|does not have the model's weights",
    "spoils": r"does not have the model's weights",
}


@pytest.mark.parametrize("how", WRONG)
def test_a_server_with_other_weights_than_the_stages_answers_nothing(tmp_path, how):
    """Weights that moved a little, as training moves them, are told from those before them."""
    engine = engine_of(tmp_path, "vllm", f"{how}")
    module = Table()
    with engine.kept():
        if how == "spoils":
            asked(engine, module)
        else:
            asked(engine, module)
            with torch.no_grad():
                module.table += 0.1 * torch.randn(module.table.shape)
        with pytest.raises(ServerError, match=WRONG[how]):
            asked(engine, module)
        [record] = served(tmp_path)
        assert not is_alive(record["pid"])  # it is of no more use
    assert "/collective_rpc" in paths(tmp_path)


def test_without_a_run_around_it_the_server_ends_with_its_serving(tmp_path):
    engine = engine_of(tmp_path, "vllm")
    asked(engine, Table())
    assert not is_alive(served(tmp_path)[0]["pid"]) and not paths(tmp_path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_next_serving_starts_anew(tmp_path, error):
    engine = engine_of(tmp_path, "vllm")
    with engine.kept():
        with pytest.raises(error), engine.serving(saving(Table()), TOKENS):
            next(engine.generate(adapt(Table()), requests_of(3), PLAIN))
            raise error
        assert not is_alive(served(tmp_path)[0]["pid"])
        asked(engine, Table(1))
    assert len(served(tmp_path)) == 2 and paths(tmp_path) == ["/sleep?2"]


def test_a_command_that_the_server_refuses_is_an_error_with_its_words_and_its_log(tmp_path):
    engine = engine_of(tmp_path, "vllm")
    with engine.kept():
        asked(engine, Table())
        engine._started._order("/wake_up", {})
        words = r"(?s)POST /wake_up\?tags=weights with status 500.*it is awake.*its log"
        with pytest.raises(ServerError, match=words):
            asked(engine, Table(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"launch": PROGRAM, "reload": "vllm"}, "--enable-sleep-mode, which is missing"),
        ({"launch": PROGRAM, "reload": "sglang"}, "--enable-memory-saver, which is missing"),
        ({"url": "http://127.0.0.1:9", "reload": "vllm"}, "give launch= in place of url="),
        ({"url": "http://127.0.0.1:9", "offload": True}, "give launch= in place of url="),
    ],
)
def test_what_cannot_be_reloaded_is_refused_at_once(options, words):
    with pytest.raises(ConfigError, match=words):
        ServerEngine(**options)


def test_a_run_keeps_one_server_over_its_stages_and_proves_each_ones_weights(tmp_path):
    """Asleep while a stage trains; the second stage's server has what the first one trained."""
    alive, asleep = [], []

    def look(model):
        alive.append(is_alive(served(tmp_path)[0]["pid"]))
        asleep.append(paths(tmp_path)[-1])
        return float(len(alive))

    optim = OptimConfig(batch_size=2, learning_rate=0.3, eval_every=1)
    stages = [stage(early_stopper_eval_module=look, optim=optim) for _ in range(2)]
    run = trainer(stages, tmp_path / "run", engine=engine_of(tmp_path, "vllm"), model=Table())()
    assert all(alive) and {*asleep} == {"/sleep?2"}
    [record] = served(tmp_path)
    assert not is_alive(record["pid"])
    assert paths(tmp_path) == [*WHOLE["vllm"], "/sleep?2"]
    assert run.pairs("external_reward-2")


def test_a_run_with_a_stale_server_stops_before_its_first_candidate(tmp_path):
    optim = OptimConfig(batch_size=2, learning_rate=0.1)
    prompts = [
        "lm",
        "op",
        "rs",
    ]  # the answers' letters are among those that rows of the proof end in
    stages = [stage(prompt_dataset=prompts, optim=optim) for _ in range(2)]
    engine = engine_of(tmp_path, "vllm", "stale")
    with pytest.raises(ServerError, match="still has the weights of an earlier stage"):
        trainer(stages, tmp_path / "run", engine=engine, model=Table())()
    assert not is_alive(served(tmp_path)[0]["pid"])
    [folder] = (tmp_path / "run").glob("02-*")
    lines = [f.read_text() for f in folder.glob("candidates*.jsonl")]
    assert not "".join(lines)


def two_stages(folder):
    """A run of two stages whose answers' letters are among those that rows of the proof end in."""
    optim = OptimConfig(batch_size=2, learning_rate=0.1)
    stages = [stage(prompt_dataset=["lm", "op", "rs"], optim=optim) for _ in range(2)]
    engine = engine_of(folder, "vllm", offload=True)
    trainer(stages, folder / "run", engine=engine, model=Table())()


@pytest.mark.slow
def test_two_processes_share_the_server_that_is_kept_and_give_the_records_of_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    two_stages(tmp_path / "one")
    two("-m", "tests.generation.test_server_reload", tmp_path / "two")
    for number in ("01", "02"):
        records = [
            next((tmp_path / name / "run").glob(f"{number}-*/candidates.jsonl")).read_text()
            for name in ("one", "two")
        ]
        assert records[0] == records[1] and records[0].count("\n") == 12
    [record] = served(tmp_path / "two")
    assert not is_alive(record["pid"])
    assert paths(tmp_path / "two") == [*WHOLE["vllm"], "/sleep?2"]


# --- the proof ------------------------------------------------------------------------------------


def said_by(module, *, noise=0.0, shift=0.0):
    """What a server with a module's weights says, with the rounding of narrow types."""
    own = own_logprobs(adapt(module))
    own = own + noise * torch.randn(own.shape, generator=torch.Generator().manual_seed(1)) + shift
    tokens = range(0, TEXT_VOCAB, 3)
    return [{t: float(row[t]) for t in tokens} for row in own]


def test_own_log_probs_are_those_of_the_last_token_of_each_row():
    module = Table()
    model = adapt(module)
    by_hand = torch.stack([module.table[row[-1]].log_softmax(-1) for row in rows_of(model)])
    torch.testing.assert_close(own_logprobs(model), by_hand.detach())
    assert len({*rows_of(model)}) == 32 and module.training


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_rounding_is_no_other_weights_and_a_small_step_is_followed(noise):
    """A change is looked at only where it is larger than the rounding: here it is, by far."""
    module, proof = Table(), Proof()
    proof.check(own_logprobs(adapt(module)), said_by(module, noise=noise))
    old = said_by(module, noise=noise)
    with torch.no_grad():
        module.table += (0.1 + 2 * noise) * torch.randn(module.table.shape)
    own = own_logprobs(adapt(module))
    with pytest.raises(ServerError, match="earlier stage"):
        proof.check(own, old)
    proof.check(own, said_by(module, noise=-noise))


def test_weights_that_did_not_move_are_no_reason_to_stop():
    module, proof = Table(), Proof()
    own = own_logprobs(adapt(module))
    for noise in (0.05, -0.05, 0.0):
        proof.check(own, said_by(module, noise=noise))


def test_log_probs_that_are_far_away_or_none_are_an_error():
    own = own_logprobs(adapt(Table()))
    for said in (said_by(Table(), shift=2 * MOST_APART), said_by(Table(7)), [{}] * len(own)):
        with pytest.raises(ServerError, match="does not have the model's weights"):
            Proof().check(own, said)


SAID_BY_SGLANG = [
    ({}, {}),
    ({"meta_info": None}, {}),
    ({"meta_info": {"output_token_ids_logprobs": []}}, {}),
    (
        {"meta_info": {"output_token_ids_logprobs": [[[-1.5, 3, None], [-2, 7, "a"]]]}},
        {3: -1.5, 7: -2},
    ),
    ({"meta_info": {"output_token_ids_logprobs": [[[0.5, 3, None]]]}}, None),
    ({"meta_info": {"output_token_ids_logprobs": [[[-0.5, "3", None]]]}}, None),
    ({"meta_info": {"output_token_ids_logprobs": [[[-0.5]]]}}, None),
    ({"meta_info": {"output_token_ids_logprobs": {"a": 1}}}, None),
    ({"meta_info": 5}, None),
]


@pytest.mark.parametrize(("answer", "found"), SAID_BY_SGLANG)
def test_log_probs_of_sglang_are_read_or_malformed(answer, found):
    if found is None:
        with pytest.raises(MalformedAnswerError):
            named_logprobs(answer)
    else:
        assert named_logprobs(answer) == found


# --- offload --------------------------------------------------------------------------------------


def test_the_weights_leave_before_the_server_comes_and_return_when_it_sleeps(tmp_path, monkeypatch):
    seen = []

    @contextmanager
    def watched(module):
        seen.append(("leave", len(served(tmp_path)) if seen else 0, paths(tmp_path)[-1:]))
        yield
        seen.append(("return", len(served(tmp_path)), paths(tmp_path)[-1:]))

    monkeypatch.setattr(engine_module, "off_device", watched)
    engine = engine_of(tmp_path, "vllm", offload=True)
    with engine.kept():
        asked(engine, Table())
        asked(engine, Table(1))
    assert seen == [
        ("leave", 0, []),
        ("return", 1, ["/sleep?2"]),
        ("leave", 1, ["/sleep?2"]),
        ("return", 1, ["/sleep?2"]),
    ]


def test_on_a_cpu_nothing_leaves_and_all_stays():
    module = Table()
    before = module.table.data_ptr()
    with off_device(module):
        assert module.table.data_ptr() == before
    assert module.table.data_ptr() == before


@pytest.mark.gpu
def test_weights_that_left_a_gpu_come_back_as_the_same_parameters():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    module = Table().cuda()
    tied = nn.ModuleList([module, module])
    parameter, wanted = module.table, module.table.detach().cpu()
    optimizer = torch.optim.AdamW(tied.parameters())
    before = torch.cuda.memory_allocated()
    with off_device(tied):
        assert module.table.device.type == "cpu" and torch.cuda.memory_allocated() < before
        torch.testing.assert_close(module(torch.tensor([[1]]))[0, 0], module.table[1])
    assert module.table is parameter is optimizer.param_groups[0]["params"][0]
    torch.testing.assert_close(module.table.detach().cpu(), wanted)
    assert module.table.device.type == "cuda"


# --- how many at once -----------------------------------------------------------------------------


def driven(window, capacity, answers=60_000):
    """A window whose server works on so many at once, and answers each after one second."""
    now = 0.0
    for _ in range(answers):
        now += 1 / min(window.size, capacity)
        window.answered(now)
    return window.size


@pytest.mark.parametrize("capacity", [1, 30, 64, 70, 100, 128, 256, 300, 600, 5000])
def test_the_window_is_as_large_as_pays(capacity):
    sizes = [FIRST]
    while sizes[-1] < MOST and min(2 * sizes[-1], capacity) >= 1.1 * min(sizes[-1], capacity):
        sizes.append(2 * sizes[-1])
    assert driven(Window(), capacity) == sizes[-1]
    assert driven(Window(8), capacity) == 8  # what is given is never exceeded


@pytest.mark.parametrize("capacity", [1, 5, 40, 200])
@pytest.mark.parametrize("given", [None, 64])
def test_a_server_that_refuses_halves_the_window_until_it_takes_all(capacity, given):
    """With more than so many in flight each further one is refused, and tried again later."""
    window, sizes = Window(given), []
    for step in range(20_000):
        if window.size > capacity:
            window.refused()
        window.answered(step / min(window.size, capacity))
        sizes.append(window.size)
    late = sizes[10_000:]
    assert max(late) <= max(1.25 * capacity, capacity + 2)
    assert min(late) >= min(given or MOST, capacity) // 2


def test_one_windowful_of_refusals_counts_once():
    window = Window()
    for _ in range(FIRST):
        window.refused()
    assert window.size == FIRST // 2


if __name__ == "__main__":
    two_stages(Path(sys.argv[1]))
