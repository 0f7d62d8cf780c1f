"""The rehearsal: it finds what would fail late, changes nothing, and begins nothing."""

import numpy
import pytest
import torch

from self_rewarding_lm import (
    BuildEFTConfig,
    ComparisonConfig,
    Contrast,
    ContrastiveDPOConfig,
    DPOConfig,
    ExternalRewardDPOConfig,
    FinetuneConfig,
    MetaJudgingConfig,
    MetaRewardDPOConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    SelfInstruct,
    SelfPlayConfig,
    SelfRewardDPOConfig,
    SelfRewardGRPOConfig,
    SelfRewardingTrainer,
    SelfRewardSFTConfig,
    ServerEngine,
    SFTConfig,
    TemporalDPOConfig,
    from_stage,
)
from self_rewarding_lm.errors import ConfigError, JudgeError, RehearsalError, TrainingError
from self_rewarding_lm.stages.rehearsal import rehearse_stages
from tests.support.models import ALPHABET, TEXT_VOCAB, Recurrent, encode, lively
from tests.support.processes import FSDP, two

QUICK = OptimConfig(batch_size=4, learning_rate=1e-2)
SHORT = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=6)
JUDGE = RewardConfig(
    prompt_template="{{ prompt }}>{{ response }}:",
    parse_reward=lambda text: float(len(set(text))),
    score_range=(0, 9),
)
TAUGHT = RewardConfig(
    prompt_template="{{ prompt }}>{{ response }}:",
    reward_regex_template="S: {{ reward }}",
    score_range=(0, 5),
)
ROWS = [{"prompt": f"say {i}", "completion": f"i say {i}"} for i in range(6)]
PAIRS = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": "no"} for i in range(4)]
RANKED = [{"prompt": f"say {i}", "replies": [f"{i}", "no"]} for i in range(2)]
PROMPTS = [f"tell {i}" for i in range(8)]


def decode(ids):
    """The end token, a token like any other where none is named, is read as a space."""
    return "".join((ALPHABET + " ")[i] for i in ids.tolist())


class Counting(torch.nn.Module):
    """A model that counts its forwards, with and without gradients."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = lively(Recurrent(TEXT_VOCAB, dropout=dropout).double())
        self.calls = {True: 0, False: 0}

    def forward(self, ids):
        self.calls[torch.is_grad_enabled()] += 1
        return self.net(ids)


def trainer_of(folder, stages, model=None, **options):
    settings = dict(
        tokenizer_encode=encode,
        tokenizer_decode=decode,
        self_reward_prompt_config={"default": JUDGE, "taught": TAUGHT},
        checkpoints_folder=folder,
        quiet=True,
    )
    model = Counting() if model is None else model
    return SelfRewardingTrainer(model, finetune_configs=stages, **{**settings, **options})


def preference(cls=SelfRewardDPOConfig, **options):
    defaults = dict(
        prompt_dataset=PROMPTS,
        num_generated_preference_pairs=3,
        prompts_per_block=4,
        generation=SHORT,
        dropout=0.0,
        optim=QUICK,
    )
    defaults |= {} if cls is ExternalRewardDPOConfig else {"judging": SHORT}
    return cls(**{**defaults, **options})


def external(reward_model, **options):
    return preference(ExternalRewardDPOConfig, reward_model=reward_model, **options)


def longer(prompts, completions):
    return [float(len(set(text))) for text in completions]


def sft(**options):
    return SFTConfig(**{**dict(train_dataset=ROWS, dropout=0.0, optim=QUICK), **options})


COMPARISON = ComparisonConfig(
    prompt_template="{{ prompt }} {{ response_a }} {{ response_b }}",
    labels=("a", "b"),
    verdict_prefix="best ",
    forced_ending="at_once",
)
CONTRAST = Contrast(positive="well: ", negative="badly: ", kind="prefix")
STAGES = {
    "sft": lambda: sft(),
    "dropout": lambda: sft(dropout=0.5),
    "dpo": lambda: DPOConfig(train_dataset=PAIRS, dropout=0.0, optim=QUICK),
    "spin": lambda: SelfPlayConfig(train_dataset=ROWS, generation=SHORT, dropout=0.0, optim=QUICK),
    "self_reward": preference,
    "comparison": lambda: preference(comparison=COMPARISON),
    "expected": lambda: preference(
        self_reward_config_keyname="taught",
        num_generated_preference_pairs=None,
        min_parse_rate=0.0,
    ),
    "external": lambda: external(longer),
    "module": lambda: external(lambda ids: ids.double().sum(dim=-1)),
    "top": lambda: preference(SelfRewardSFTConfig, min_score=2.0, train_dataset=ROWS),
    "grpo": lambda: SelfRewardGRPOConfig(
        prompt_dataset=PROMPTS, generation=SHORT, judging=SHORT, beta=0.1, optim=QUICK
    ),
    "meta": lambda: preference(
        MetaRewardDPOConfig,
        meta_judging=MetaJudgingConfig(
            prompt_template="{{ judge_prompt }} {{ judgement_a }} {{ judgement_b }}",
            labels=("a", "b"),
            verdict_prefix="best ",
        ),
    ),
    "contrast": lambda: preference(ContrastiveDPOConfig, contrasts=(CONTRAST,)),
    "confirmed": lambda: preference(ContrastiveDPOConfig, contrasts=(CONTRAST,), confirm="drop"),
    "compared": lambda: BuildEFTConfig(
        ranked_dataset=RANKED,
        method="comparisons",
        comparison=COMPARISON,
        judging=SHORT,
        min_kept=0,
    ),
    "temporal": lambda: preference(TemporalDPOConfig),
    "eft": lambda: BuildEFTConfig(
        ranked_dataset=RANKED, self_reward_config_keyname="taught", method="ranks"
    ),
    "judged": lambda: BuildEFTConfig(
        ranked_dataset=RANKED, self_reward_config_keyname="taught", judging=SHORT, min_kept=0
    ),
}
TRAINS_NOTHING = ("eft", "judged", "compared")


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_is_rehearsed_and_nothing_is_changed(kind, tmp_path):
    model = Counting(dropout=0.1)
    model.train()
    trainer = trainer_of(tmp_path / "run", [STAGES[kind]()], model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist())
    model.calls = {True: 0, False: 0}
    (told,) = rehearse_stages(trainer)
    assert told.endswith(": well")
    assert model.calls[True] == (kind not in TRAINS_NOTHING)  # one forward with a gradient
    assert sum(model.calls.values()) <= 60
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(part.training for part in model.modules())
    after = (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist())
    assert after == numbers
    assert not (tmp_path / "run").exists()


TIMED = ("run.json", "run.lock", "events.jsonl", "report.html")
"""Files that hold the time of the run."""


def test_a_run_is_the_same_with_and_without_a_rehearsal(tmp_path):
    def whole(name, rehearse):
        stages = [
            STAGES["dropout"](),
            STAGES["eft"](),
            sft(name="m1", train_dataset=from_stage("eft")),
            preference(name="m2"),
            external(longer, name="m3"),
            DPOConfig(train_dataset=from_stage("m2"), dropout=0.0, optim=QUICK),
            STAGES["spin"](),
        ]
        model = Counting(dropout=0.1)
        trainer_of(tmp_path / name, stages, model)(rehearse=rehearse)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        content = {
            str(p.relative_to(tmp_path / name)): p.read_bytes()
            for p in files
            if p.name not in TIMED and p != tmp_path / name / "files.json"
        }
        return content, model.state_dict()

    (with_files, weights), (without, other) = whole("with", True), whole("without", False)
    assert list(with_files) == list(without)
    assert with_files == without
    assert all(torch.equal(weights[name], other[name]) for name in weights)


def raising(*arguments, **columns):
    raise RuntimeError("no such table")


class Refusing(FinetuneConfig):
    """A stage of one's own."""

    def run(self, ctx, out):
        pass

    def rehearse(self, ctx, out):
        assert len(ctx.rows) == 0 and ctx.run is None
        raise ConfigError("not today")


class NoNumbers(torch.nn.Module):
    """A model whose logits are no numbers."""

    def __init__(self):
        super().__init__()
        self.net = Recurrent(TEXT_VOCAB)

    def forward(self, ids):
        return self.net(ids) * (float("nan") if torch.is_grad_enabled() else 1.0)


LATE = {
    "a reward function that raises": (
        lambda: external(raising),
        RehearsalError,
        "raised RuntimeError: no such table",
    ),
    "a reward function with too few scores": (
        lambda: external(lambda prompts, completions: [1.0]),
        JudgeError,
        "one score",
    ),
    "a reward model of a wrong shape": (
        lambda: external(lambda ids: torch.zeros(3, 3, 3)),
        JudgeError,
        r"\(1, classes\)|\(2, classes\)",
    ),
    "a picking function that raises": (
        lambda: preference(pick_paired_rewards_fn=raising),
        RehearsalError,
        "no such table",
    ),
    "a picking function of one index": (
        lambda: preference(pick_paired_rewards_fn=lambda scores: [0]),
        ConfigError,
        "two indices",
    ),
    "a check of scores that raises": (
        lambda: preference(is_valid_reward=raising),
        RehearsalError,
        "no such table",
    ),
    "a filter of logits that raises": (
        lambda: preference(generation=SHORT.model_copy(update={"filter_fn": raising})),
        RehearsalError,
        "no such table",
    ),
    "an optimiser that refuses": (
        lambda: sft(optim=OptimConfig(optimizer=raising, learning_rate=1e-3)),
        Exception,
        "no such table",
    ),
    "a stage of one's own": (Refusing, ConfigError, "not today"),
}


@pytest.mark.parametrize("what", LATE)
def test_what_fails_late_fails_before_the_first_stage(what, tmp_path):
    make, kind, words = LATE[what]
    model = Counting()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=words) as caught:
        trainer_of(tmp_path, [sft(), make().model_copy(update={"name": "last"})], model)()
    told = str(caught.value)
    if not isinstance(caught.value, ConfigError) or "Rehearsal" in told:
        assert "(Rehearsal of stage 'last': nothing was started." in told
    assert not list(tmp_path.rglob("*.json*"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_user_function_that_raises_is_in_the_traceback(tmp_path):
    with pytest.raises(RehearsalError) as caught:
        trainer_of(tmp_path, [external(raising)])()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.__cause__.__traceback__ is not None


def test_a_loss_that_is_no_number_is_found_before_the_first_stage(tmp_path):
    with pytest.raises(TrainingError, match="nan"):
        trainer_of(tmp_path, [sft()], NoNumbers())()
    assert not list(tmp_path.rglob("*.jsonl"))


def test_it_can_be_left_out(tmp_path):
    calls = []

    def counted(prompts, completions):
        calls.append(len(completions))
        return longer(prompts, completions)

    trainer_of(tmp_path, [external(counted, prompts_per_block=8)])(rehearse=False)
    real = list(calls)
    trainer_of(tmp_path / "again", [external(counted, prompts_per_block=8)])()
    assert calls == [*real, 2, *real]  # one prompt, two candidates


def test_a_stage_that_is_done_is_not_rehearsed(tmp_path):
    stages = [sft(), external(longer)]
    trainer_of(tmp_path, stages)()
    for rest in (tmp_path / "02-external_reward").glob("done.json"):
        rest.unlink()
    model = Counting()
    trainer = trainer_of(tmp_path, stages, model)
    told = rehearse_stages(trainer, ["01-sft", "02-external_reward"])
    assert told == ["external_reward: well"]


def test_rows_of_earlier_stages_have_stand_ins(tmp_path):
    stages = [
        preference(name="m1"),
        sft(train_dataset=from_stage("m1")),
        DPOConfig(train_dataset=[from_stage("m1"), PAIRS]),
        external(longer, prompt_dataset=from_stage("m1")),
    ]
    told = rehearse_stages(trainer_of(tmp_path, stages))
    assert told == [
        "m1: well",
        "sft: well; train_dataset: a stand-in",
        "dpo: well; train_dataset: a stand-in",
        "external_reward: well; prompt_dataset: a stand-in",
    ]


def test_rows_that_cannot_be_used_are_passed_over_where_they_are_skipped(tmp_path):
    rows = [{"prompt": "say 0", "completion": 7}] * 20 + ROWS
    (told,) = rehearse_stages(trainer_of(tmp_path, [sft(train_dataset=rows, on_bad_row="skip")]))
    assert told == "sft: well"


def test_a_dataset_whose_rows_come_once_gives_the_run_the_same_rows(tmp_path):
    class Once(torch.utils.data.Dataset):
        def __init__(self):
            self.read = []

        def __len__(self):
            return len(ROWS)

        def __getitem__(self, index):
            self.read.append(index)
            return ROWS[index]

    rows = Once()
    trainer_of(tmp_path, [sft(train_dataset=rows)])()
    assert sorted(rows.read) == list(range(len(ROWS)))


def test_new_prompts_are_not_written_and_seeds_are_answered(tmp_path):
    asked = []

    def told(prompts, completions):
        asked.extend(prompts)
        return longer(prompts, completions)

    prompts = SelfInstruct(
        seed_dataset=PROMPTS, num_prompts=4, num_seed_examples=1, num_generated_examples=0
    )

    def encode_any(text):
        return encode("".join(c if c in ALPHABET else " " for c in text))

    stages = [external(told, prompt_dataset=prompts)]
    assert rehearse_stages(trainer_of(tmp_path, stages, tokenizer_encode=encode_any))
    assert set(asked) == {PROMPTS[0]}


def test_a_judge_prompt_without_room_for_any_prompt_is_found(tmp_path):
    limited = Counting()
    limited.max_seq_len = 64
    words = "x" * 40  # 40 + 1 + 1 of the template, 16 for the answer: no room for "tell 0"
    reward = JUDGE.model_copy(update={"prompt_template": words + JUDGE.prompt_template})
    stage = preference(judging=SamplingConfig(max_new_tokens=16))
    with pytest.raises(JudgeError, match="leaves no room for what the judge writes"):
        trainer_of(tmp_path, [stage], limited, self_reward_prompt_config=reward)()


def test_a_server_that_a_stage_starts_is_not_started(tmp_path):
    started = tmp_path / "started"
    engine = ServerEngine(launch=f"touch {started} {{checkpoint}} {{port}}")
    told = rehearse_stages(trainer_of(tmp_path, [external(longer)], engine=engine))
    assert told == ["external_reward: well; sampled here, not by the server"]
    assert not started.exists()


def test_a_stage_without_a_rehearsal_says_so(tmp_path):
    class Own(FinetuneConfig):
        def run(self, ctx, out):
            pass

    told = rehearse_stages(trainer_of(tmp_path, [Own(name="own")]))
    assert told == ["own: not tried, it has no rehearse of its own"]


TWO = """
import os, sys
from tests.stages.test_rehearsal import external, longer, sft, trainer_of

def reward(prompts, completions):
    if os.environ["RANK"] == "1":
        raise RuntimeError("only here")
    return longer(prompts, completions)

try:
    trainer_of(sys.argv[1], [sft(), external(reward)], accelerate_kwargs=dict(cpu=True))()
except Exception as error:
    with open(f"{sys.argv[1]}.{os.environ['RANK']}", "w") as file:
        file.write(f"{type(error).__name__} {error}")
"""


@pytest.mark.parametrize("settings", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_an_error_on_one_of_two_processes_is_raised_on_both(settings, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    two(script, tmp_path / "run", **settings)
    for rank in (0, 1):
        told = (tmp_path / f"run.{rank}").read_text()
        assert told.startswith("RehearsalError ") and "raised RuntimeError: only here" in told
    assert not list((tmp_path / "run").rglob("*.jsonl"))
