"""Runs that are stopped within a stage and go on: the same weights, each record once."""

import json
import os
import signal
import threading

import pytest
import torch
from accelerate.utils import GradScalerKwargs

from self_rewarding_lm import OptimConfig, Run, SelfPlayConfig
from self_rewarding_lm.errors import Interrupted, StoreError
from self_rewarding_lm.runs import atomic as durable
from self_rewarding_lm.runs.lock import locked
from self_rewarding_lm.runs.weights import read_tensors, weights_hash
from tests.support.hf_models import tiny
from tests.test_trainer import (
    ROWS,
    SHORT,
    TEXT_VOCAB,
    external,
    model64,
    self_reward,
    sft,
    trainer_of,
)


class Killed(BaseException):
    """In place of a power cut: nothing that cleans up catches it."""


class StopsAt:
    """A function of the model's weights for early stopping, which stops it all at its n-th call."""

    def __init__(self, call, how):
        self.call, self.how, self.calls = call, how, 0

    def __call__(self, module):
        self.calls += 1
        if self.calls == self.call:
            self.how()
        return sum(float(p.double().sum()) for p in module.parameters())


def kill():
    raise Killed


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """Also where these tests run in the background, where a shell ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press():
    os.kill(os.getpid(), signal.SIGINT)


OPTIMIZERS = {
    "adamw": "adamw",
    "muon": "muon",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "momentum": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9),
    "not fused": lambda params: torch.optim.AdamW(params, foreach=False),
}


def stage_of(optimizer, stop=None, how=kill, **saving):
    optim = OptimConfig(
        batch_size=4, learning_rate=1e-2, eval_every=1, optimizer=optimizer, **saving
    )
    return sft(
        optim=optim,
        dropout=0.1,
        num_train_steps=9,
        early_stopper_eval_module=StopsAt(stop, how),
        early_stopper_patience=99,
        early_stopper_mode="min",
    )


def losses(run):
    return [(m["step"], m["loss"]) for m in run.metrics(0) if "loss" in m]


@pytest.mark.parametrize("stop", [2, 6, 9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_goes_on_behind_its_last_state_to_the_same_bits(name, stop, tmp_path):
    """Weights, curve and the number of evaluations; killed in the middle of a step's evaluation."""
    straight = model64()
    before = trainer_of(tmp_path / "a", [stage_of(OPTIMIZERS[name])], straight)()
    stage = stage_of(OPTIMIZERS[name], stop, save_state_every=2)
    with pytest.raises(Killed):
        trainer_of(tmp_path / "b", [stage])()
    resumed = model64(seed=7)  # its weights come from the state; the rest from the first weights
    resumed.load_state_dict(model64().state_dict())
    again = stage_of(OPTIMIZERS[name], save_state_every=2)
    after = trainer_of(tmp_path / "b", [again], resumed)()
    assert weights_hash(straight) == weights_hash(resumed)
    assert losses(after) == losses(before) and len(losses(after)) == 9
    asked = 1 if stop == 2 else 0  # before the first step, unless there was a state
    saved = (stop - 2) // 2 * 2
    assert again.early_stopper_eval_module.calls == asked + 9 - saved
    assert after.summary(0) == before.summary(0)
    assert not (tmp_path / "b" / "01-sft" / "state.safetensors").exists()


def test_a_state_holds_the_weights_behind_its_step_and_the_step(tmp_path):
    with pytest.raises(Killed):
        trainer_of(tmp_path, [stage_of("adamw", 6, save_state_every=3)])()
    tensors, words = read_tensors(tmp_path / "01-sft" / "state.safetensors")
    assert '"step": 3' in words
    shapes = {f"weights/{n}": t.shape for n, t in model64().state_dict().items()}
    assert {n: t.shape for n, t in tensors.items() if n.startswith("weights/")} == shapes
    moments = {n.rsplit("/", 1)[1] for n in tensors if n.startswith("optimizer/")}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}
    assert all(t == 3 for n, t in tensors.items() if n.endswith("/step"))


def test_one_press_finishes_the_step_and_saves_and_the_run_goes_on_to_the_same_bits(tmp_path):
    straight, resumed = model64(), model64()
    trainer_of(tmp_path / "a", [stage_of("adamw")], straight)()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 4 of 9"):
        trainer_of(tmp_path / "b", [stage_of("adamw", 5, press)])()
    assert signal.getsignal(signal.SIGINT) is handler
    stage = stage_of("adamw")
    run = trainer_of(tmp_path / "b", [stage], resumed)()
    assert weights_hash(straight) == weights_hash(resumed)
    assert [step for step, _ in losses(run)] == list(range(1, 10))
    assert stage.early_stopper_eval_module.calls == 5  # after steps 5 to 9


def test_a_press_while_responses_are_sampled_keeps_all_of_them(tmp_path):
    """And none is sampled again; the records are those of a run that nobody stopped."""
    seen = []

    def watch(logits):
        seen.append(len(logits))
        if len(seen) == 4:
            press()
        return logits

    def stage():
        return self_reward(generation=SHORT.model_copy(update={"filter_fn": watch}))

    straight, stopped = model64(), model64()
    seen.extend([0] * 100)
    before = trainer_of(tmp_path / "a", [stage()], straight)(rehearse=False)
    seen.clear()
    with pytest.raises(Interrupted):
        trainer_of(tmp_path / "b", [stage()], stopped)(rehearse=False)
    kept = {c.id for c in Run.open(tmp_path / "b").candidates(0)}
    assert 0 < len(kept) < len(before.candidates(0))
    after = trainer_of(tmp_path / "b", [stage()], stopped)(rehearse=False)
    assert list(after.candidates(0)) == list(before.candidates(0))
    assert list(after.judgements(0)) == list(before.judgements(0))
    assert list(after.pairs(0)) == list(before.pairs(0))
    assert list(after.reference(0)) == list(before.reference(0))
    assert weights_hash(straight) == weights_hash(stopped)


def test_a_second_press_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("self_rewarding_lm.runtime.ONE", 0.0)

    def twice():
        press()
        press()
        raise AssertionError("the second press did not stop it")

    with pytest.raises(Interrupted, match="SIGINT"):
        trainer_of(tmp_path, [stage_of("adamw", 5, twice)])()
    assert not (tmp_path / "01-sft" / "state.safetensors").exists()


def test_sigterm_is_heeded_like_ctrl_c(tmp_path):
    def term():
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 2"):
        trainer_of(tmp_path, [stage_of("adamw", 3, term)])()


def test_a_trainer_in_another_thread_leaves_signals_alone(tmp_path):
    failures = []

    def work():
        try:
            trainer_of(tmp_path, [stage_of("adamw")])()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == [] and Run.open(tmp_path).is_done(0)


def test_spin_goes_on_within_its_second_iteration(tmp_path):
    def stage(stop=None):
        optim = OptimConfig(batch_size=2, learning_rate=1e-2, save_state_every=1, eval_every=1)
        return SelfPlayConfig(
            train_dataset=ROWS[:5],
            generation=SHORT,
            iterations=2,
            dropout=0.1,
            optim=optim,
            num_train_steps=4,
            early_stopper_eval_module=StopsAt(stop, kill),
            early_stopper_patience=99,
            early_stopper_mode="min",
        )

    straight, resumed = model64(), model64()
    before = trainer_of(tmp_path / "a", [stage()], straight)()
    with pytest.raises(Killed):
        trainer_of(tmp_path / "b", [stage(8)])(rehearse=False)
    assert (tmp_path / "b" / "01-spin" / "iteration-0").exists()
    after = trainer_of(tmp_path / "b", [stage()], resumed)()
    assert weights_hash(straight) == weights_hash(resumed)
    assert losses(after) == losses(before)
    assert after.metrics(0) == before.metrics(0)


def test_a_state_of_another_training_is_not_taken(tmp_path):
    """Other settings of a stage that has not begun, in a folder with a state from elsewhere."""
    with pytest.raises(Killed):
        trainer_of(tmp_path / "a", [stage_of("adamw", 4, save_state_every=1)])()
    state = tmp_path / "a" / "01-sft" / "state.safetensors"
    longer = stage_of("adamw").model_copy(update={"num_train_steps": 10})
    straight, other = model64(), model64()
    trainer_of(tmp_path / "b", [longer], straight)()
    (tmp_path / "c" / "01-sft").mkdir(parents=True)
    with pytest.raises(StoreError):
        (tmp_path / "c" / "01-sft" / "state.safetensors").write_bytes(state.read_bytes())
        trainer_of(tmp_path / "c", [longer], other)()


@pytest.mark.parametrize("change", ["cut", "edited", "foreign"])
def test_a_state_that_was_changed_is_named_and_not_trained_on(change, tmp_path):
    with pytest.raises(Killed):
        trainer_of(tmp_path, [stage_of("adamw", 5, save_state_every=1)])()
    path = tmp_path / "01-sft" / "state.safetensors"
    data = bytearray(path.read_bytes())
    if change == "cut":
        data = data[:-9]
    elif change == "edited":
        data[-9] ^= 1
    else:
        data = bytearray(b"not tensors at all")
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"state.safetensors.*Delete it to train its stage again"):
        trainer_of(tmp_path, [stage_of("adamw")])()
    path.unlink()
    trainer_of(tmp_path, [stage_of("adamw")])()


@pytest.mark.parametrize("name", ["pairs.jsonl", "candidates.jsonl", "reference.jsonl"])
@pytest.mark.parametrize("change", ["cut", "edited", "deleted"])
def test_a_file_of_a_finished_arrow_that_was_changed_is_named(name, change, tmp_path):
    """Of a stage that was stopped in its training, and of an earlier stage that another reads."""

    def stages(stop=None):
        often = OptimConfig(batch_size=4, learning_rate=1e-2, eval_every=1)
        watched = external(
            optim=often,
            early_stopper_eval_module=StopsAt(stop, kill),
            early_stopper_patience=99,
        )
        return [watched]

    with pytest.raises(Killed):
        trainer_of(tmp_path, stages(2))(rehearse=False)
    path = tmp_path / "01-external_reward" / name
    whole = path.read_bytes()
    if change == "cut":
        path.write_bytes(whole[: whole.index(b"\n") + 1])
    elif change == "edited":
        place = whole.index(b"0.") if b"0." in whole else whole.rindex(b"]") - 1
        path.write_bytes(whole[:place] + b"1" + whole[place + 1 :])
    else:
        path.unlink()
    if change == "deleted":  # made again, and said
        trainer_of(tmp_path, stages())()
        assert path.read_bytes() == whole
        return
    with pytest.raises(StoreError, match=f"{name} is not the file that was written"):
        trainer_of(tmp_path, stages())()
    path.write_bytes(whole)
    trainer_of(tmp_path, stages())()


def test_weights_of_a_stage_that_were_changed_are_not_trained_on(tmp_path):
    trainer_of(tmp_path, [sft()])()
    path = tmp_path / "01-sft" / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"model.safetensors is not the file that was written"):
        trainer_of(tmp_path, [sft(), external()])()


def test_a_deleted_file_of_a_stage_that_is_done_is_named_where_it_is_read(tmp_path):
    run = trainer_of(tmp_path, [external()])()
    (tmp_path / "01-external_reward" / "pairs.jsonl").unlink()
    with pytest.raises(StoreError, match=r"pairs.jsonl was part of a stage that is done"):
        run.pairs(0)


def test_records_without_the_settings_they_were_made_with_are_refused(tmp_path):
    with pytest.raises(Killed):
        trainer_of(tmp_path, [stage_of("adamw", 5)])()
    (tmp_path / "01-sft" / "config.json").unlink()
    with pytest.raises(StoreError, match=r"holds records and no config.json"):
        trainer_of(tmp_path, [stage_of("adamw")])()


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    with pytest.raises(StoreError, match=f"another run is at work in .*process {child}"):
        trainer_of(tmp_path, [sft()])()
    assert not (tmp_path / "run.json").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert trainer_of(tmp_path, [sft()])().is_done(0)


def test_a_float32_stage_resumes_to_the_same_bits_on_a_cpu(tmp_path):
    straight, resumed = (model64().float() for _ in range(2))
    trainer_of(tmp_path / "a", [stage_of("adamw")], straight)()
    with pytest.raises(Killed):
        trainer_of(tmp_path / "b", [stage_of("adamw", 7, save_state_every=2)], model64().float())()
    trainer_of(tmp_path / "b", [stage_of("adamw")], resumed)()
    assert weights_hash(straight) == weights_hash(resumed)


def records_of(run, stage):
    return [list(f(stage)) for f in (run.prompts, run.candidates, run.judgements, run.pairs)]


def test_a_stage_at_the_end_changes_nothing_before_it(tmp_path):
    """Nor does the seed of the process; the seed of the run does."""
    alone, followed, other = (model64().float() for _ in range(3))
    torch.manual_seed(1)
    first = trainer_of(tmp_path / "a", [self_reward()], alone)()
    torch.manual_seed(2)
    second = trainer_of(tmp_path / "b", [self_reward(), external(), sft()], followed)()
    third = trainer_of(tmp_path / "c", [self_reward()], other, seed=1)()
    assert records_of(first, 0) == records_of(second, 0) != records_of(third, 0)
    assert first.metrics(0) == second.metrics(0)
    digests = [durable.digest_of(run.weights(0)) for run in (first, second, third)]
    assert digests[0] == digests[1] != digests[2]


def test_run_json_says_what_a_run_can_be_repeated_from(tmp_path):
    model = model64()
    before = weights_hash(model)
    run = trainer_of(tmp_path, [sft()], model, seed=3)()
    assert run.info["seed"] == 3 and run.info["model"]["hash"] == before
    assert {"python", "torch", "self-rewarding-lm"} <= set(run.info["versions"])
    assert run.settings(0)["settings"]["optim"]["learning_rate"] == 1e-2


def test_a_scaled_stage_goes_on_with_its_scale(tmp_path):
    """Mixed precision with float16, whose first scales are too large: some steps are none."""
    large = GradScalerKwargs(init_scale=2.0**24)
    mixed = dict(cpu=True, mixed_precision="fp16", kwargs_handlers=[large])
    options = dict(accelerate_kwargs=mixed)
    straight, resumed = (model64().float() for _ in range(2))
    before = trainer_of(tmp_path / "a", [stage_of("adamw")], straight, **options)()
    with pytest.raises(Killed):
        stage = stage_of("adamw", 7, save_state_every=2)
        trainer_of(tmp_path / "b", [stage], model64().float(), **options)()
    _, words = read_tensors(tmp_path / "b" / "01-sft" / "state.safetensors")
    assert json.loads(words)["scaling"]["scale"] < 2.0**24
    after = trainer_of(tmp_path / "b", [stage_of("adamw")], resumed, **options)()
    assert weights_hash(straight) == weights_hash(resumed) and losses(before) == losses(after)


def test_an_adapter_goes_on_and_its_state_holds_the_adapter_alone(tmp_path):
    peft = pytest.importorskip("peft")
    settings = dict(r=2, target_modules="all-linear", task_type="CAUSAL_LM")

    def run(folder, stop=None):
        trainer = trainer_of(
            tmp_path / folder,
            [stage_of("adamw", stop, save_state_every=2)],
            tiny("llama", TEXT_VOCAB),
            peft_config=peft.LoraConfig(**settings),
        )
        return trainer, trainer.unwrapped_model

    trainer, straight = run("a")
    trainer()
    with pytest.raises(Killed):
        run("b", 6)[0]()
    tensors, _ = read_tensors(tmp_path / "b" / "01-sft" / "state.safetensors")
    names = [n for n in tensors if n.startswith("weights/")]
    assert names and all("lora_" in name for name in names)
    trainer, resumed = run("b")
    trainer()
    assert weights_hash(straight) == weights_hash(resumed)


class Odd(torch.optim.SGD):
    """Keeps a list for each parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["seen"] = [1]
        return super().step(closure)


def test_an_optimiser_that_cannot_be_stored_is_said_and_its_stage_begins_again(tmp_path, caplog):
    def odd(params):
        return Odd(params, lr=1.0)

    with pytest.raises(Killed), caplog.at_level("WARNING", "self_rewarding_lm"):
        trainer_of(tmp_path, [stage_of(odd, 6, save_state_every=1)])()
    assert "more than tensors and numbers" in caplog.text
    assert not (tmp_path / "01-sft" / "state.safetensors").exists()
    stage = stage_of(odd)
    assert len(losses(trainer_of(tmp_path, [stage])())) == 9
    assert stage.early_stopper_eval_module.calls == 10


def test_a_folder_that_cannot_be_locked_is_an_error_in_words(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(StoreError, match=r"could not be written: .*Is a directory"):
        trainer_of(tmp_path, [sft()])()


@pytest.mark.parametrize("text", ["[]", '{"pairs.jsonl": 3}', "{", "[" * 100_000])
def test_a_ledger_that_was_edited_is_named(text, tmp_path):
    trainer_of(tmp_path, [external()])()
    (tmp_path / "01-external_reward" / "files.json").write_text(text)
    with pytest.raises(StoreError, match=r"files.json cannot be read"):
        Run.open(tmp_path).pairs(0)[0]
