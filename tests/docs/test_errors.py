"""Mistakes that a user can make, each really made, and the errors that they get.

docs/errors.md is written by this file: `make errors`, which is `python -m tests.docs.test_errors`.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from self_rewarding_lm import (
    BuildEFTConfig,
    ComparisonConfig,
    ConsistencyConfig,
    Contrast,
    ContrastiveDPOConfig,
    DPOConfig,
    EnsembleJudge,
    ExternalRewardDPOConfig,
    FunctionJudge,
    HeldOutReward,
    ImplicitJudge,
    JudgeAnchor,
    LocalEngine,
    MarkedRubric,
    OptimConfig,
    RewardConfig,
    RewardModelJudge,
    Run,
    SamplingConfig,
    SelfInstruct,
    SelfPlayConfig,
    SelfRewardDPOConfig,
    SelfRewardGRPOConfig,
    SelfRewardingTrainer,
    SelfRewardSFTConfig,
    ServerEngine,
    ServerJudge,
    SFTConfig,
    ShuffledJudge,
    SPINTrainer,
    StepwiseDPOConfig,
    VerifierAccuracy,
    VoteJudge,
    compare,
    from_hub,
    from_stage,
    generate,
    load_causal_lm,
    reasoning_task,
)
from self_rewarding_lm.errors import ConfigError, SelfRewardingError
from self_rewarding_lm.recipes.reader import read_recipe
from self_rewarding_lm.recipes.yaml_nodes import parse_yaml
from self_rewarding_lm.report.card import reach_hub
from self_rewarding_lm.report.export import export_stage
from self_rewarding_lm.report.merge import merge_stage
from self_rewarding_lm.runs.lock import locked
from tests.support.fake_server import FakeServer
from tests.support.models import ALPHABET, TEXT_VOCAB, Recurrent, encode, lively

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
GROUPS = {
    "configuration": "Configuration",
    "data": "Data",
    "model": "Model",
    "tokenizer": "Tokenizer and chat template",
    "judge": "Judges and functions of your own",
    "files": "Files of a run",
    "environment": "Environment and servers",
    "processes": "Several processes",
}
MOST_FORWARDS = 80  # looks at the model when it is taken, and the rehearsals of two stages
INTRODUCTION = """\
# Error messages

Mistakes and what the library says to them. This page is written by the tests that make each of
these mistakes (`make errors`), so the words are those of the present code. Every error is a
`SelfRewardingError` of `self_rewarding_lm.errors` and a standard Python error too. Each comes
before long work: when a setting is written, when the trainer is made, or in the rehearsal before
the first stage (marked so). `FOLDER` stands for a folder of yours.

## The rehearsal

`trainer()` tries every stage that is not done before the first one begins; so does
`self-rewarding-lm run`. `self-rewarding-lm check recipe.yaml`, or
`self_rewarding_lm.stages.rehearsal.rehearse_stages(trainer)`, does that alone and says of each stage what
was tried. In a temporary folder a stage reads the first rows it can use (eight of each dataset),
samples two candidates of two tokens to the shortest of its prompts, has them judged, makes a pair of
them, and computes reference log-probs and one loss with its gradient. No step is taken, and nothing
is written to the run's folder: weights, random numbers and records are those of a run without it.

- Your functions (rewards, `parse_reward`, `pick_paired_rewards_fn`, filters, optimisers) are called
  once more than in the run itself, with very short responses. Where the judge's two short answers
  cannot be read, the functions that see scores get the ends of the judge's scale. A function that
  keeps a state of its own should know that, or be run with `trainer(rehearse=False)`
  (`self-rewarding-lm run --no-rehearsal`).
- Rows that an earlier stage will make have a stand-in; what `SelfInstruct` will write is replaced by
  its seeds. `early_stopper_eval_module` and held-out rows are not asked.
- With a `ServerEngine` the two tokens are sampled in this process: no server is started, and one that
  runs is not asked for them. A `ServerJudge` is asked.
- Several processes rehearse everything, each by itself; an error on one is raised on all.
- A stage of your own is tried where it has a method `rehearse(ctx, out)`, which must not change
  weights. `ctx` has a few rows of each dataset, no `ctx.run`, and the stage's name with
  `(rehearsal)` after it.
"""


@dataclass(frozen=True)
class Mistake:
    """make: prepares it in an empty folder and gives the call that makes it."""

    id: str
    group: str
    what: str
    make: Callable[[Path], Callable[[], Any]]


MISTAKES: list[Mistake] = []


def mistake(group: str, what: str) -> Callable[[Any], Any]:
    def added(make: Any) -> Any:
        MISTAKES.append(Mistake(make.__name__, group, what, make))
        return make

    return added


# -- what the mistakes are made with ---------------------------------------------------------------

ROWS = [{"prompt": f"say {i}", "completion": f"i say {i}"} for i in range(4)]
PAIRS = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": "no"} for i in range(4)]
RANKED = [{"prompt": f"say {i}", "replies": [f"{i}", "no"]} for i in range(2)]
PROMPTS = [f"tell {i}" for i in range(4)]
SHORT = SamplingConfig(max_new_tokens=4, temperature=0)
NOISY = SamplingConfig(max_new_tokens=4, top_p=None)
QUICK = OptimConfig(batch_size=4, learning_rate=1e-3)
REWARD = RewardConfig(
    prompt_template="{{ prompt }}>{{ response }}:",
    reward_regex_template="S: {{ reward }}",
    score_range=(0, 5),
)


class Watched(nn.Module):
    """A small model whose forwards are counted."""

    forwards = 0

    def __init__(self, vocab: int = TEXT_VOCAB, max_seq_len: int | None = 128) -> None:
        super().__init__()
        self.net = lively(Recurrent(vocab))
        self.max_seq_len = max_seq_len

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        Watched.forwards += 1
        return self.net(ids)


def decode(ids: torch.Tensor) -> str:
    return "".join((ALPHABET + " ")[i] for i in ids.tolist())


def trainer(folder: Path, *stages: Any, model: Any = None, **options: Any) -> SelfRewardingTrainer:
    settings: dict[str, Any] = dict(
        tokenizer_encode=encode,
        tokenizer_decode=decode,
        self_reward_prompt_config=REWARD,
        checkpoints_folder=folder / "run",
        quiet=True,
    )
    settings |= options
    model = Watched() if model is None else model
    return SelfRewardingTrainer(model, finetune_configs=list(stages), **settings)


def sft(**options: Any) -> SFTConfig:
    return SFTConfig(**{**dict(train_dataset=ROWS, num_train_steps=1, optim=QUICK), **options})


def rewarded(**options: Any) -> SelfRewardDPOConfig:
    given = dict(prompt_dataset=PROMPTS, generation=SHORT, judging=SHORT, optim=QUICK)
    return SelfRewardDPOConfig(**{**given, **options})


def external(reward_model: Any, **options: Any) -> ExternalRewardDPOConfig:
    given = dict(prompt_dataset=PROMPTS, generation=SHORT, optim=QUICK)
    return ExternalRewardDPOConfig(reward_model=reward_model, **{**given, **options})


def ran(folder: Path, *stages: Any) -> Path:
    """A run that is done."""
    trainer(folder, *(stages or (sft(),)))(rehearse=False)
    return folder / "run"


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def recipe(folder: Path, text: str) -> Any:
    return read_recipe(parse_yaml(text, "recipe.yaml", folder))


@contextmanager
def without(package: str):
    """As on a machine where a package is not installed."""
    held = {name: m for name, m in sys.modules.items() if name.split(".")[0] == package}
    for name in held:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(held)


def adapted(folder: Path, *, merge_adapter: bool = False, **options: Any) -> SelfRewardingTrainer:
    """A trainer of a LoRA on the head of a tied Llama."""
    from peft import LoraConfig  # a mistake tells of missing packages

    from tests.support.hf_models import tiny

    config = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM", **options)
    model = tiny("llama", tie_word_embeddings=True)
    settings: dict[str, Any] = dict(peft_config=config, merge_adapter=merge_adapter)
    return trainer(folder, sft(), model=model, **settings)


def missing(package: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        with without(package):
            return call()

    return made


# -- configuration ---------------------------------------------------------------------------------


@mistake("configuration", "A setting is misspelt")
def unknown_setting(folder):
    return lambda: SFTConfig(train_dataset=ROWS, num_train_step=10)


@mistake("configuration", "A setting that must be given is not")
def required_setting(folder):
    return lambda: SelfRewardDPOConfig(num_generated_preference_pairs=100)


@mistake("configuration", "A number is out of its range")
def out_of_range(folder):
    return lambda: DPOConfig(train_dataset=PAIRS, dpo_beta=0)


@mistake("configuration", "The length of training is given twice")
def two_lengths(folder):
    return lambda: sft(num_train_steps=10, optim=OptimConfig(epochs=2))


@mistake("configuration", "Fewer new tokens at most than at least")
def token_bounds(folder):
    return lambda: SamplingConfig(max_new_tokens=4, min_new_tokens=8)


@mistake("configuration", "A negative temperature")
def negative_temperature(folder):
    return lambda: SamplingConfig(temperature=-0.7)


@mistake("configuration", "An unknown optimiser")
def unknown_optimizer(folder):
    return lambda: OptimConfig(optimizer="adam")


@mistake("configuration", "An unknown group of contrasts")
def unknown_contrast(folder):
    return lambda: ContrastiveDPOConfig(prompt_dataset=PROMPTS, contrasts=("harmles",))


@mistake("configuration", "A contrast of two equal texts")
def equal_contrast(folder):
    return lambda: Contrast(positive="Be brief.", negative="Be brief.")


@mistake("configuration", "Contrasts at temperature 0")
def greedy_contrast(folder):
    return lambda: ContrastiveDPOConfig(prompt_dataset=PROMPTS, generation=SHORT)


@mistake("configuration", "A judge of contrasts that nobody asks")
def unasked_judge(folder):
    return lambda: ContrastiveDPOConfig(prompt_dataset=PROMPTS, comparison=ComparisonConfig())


@mistake("configuration", "SGD with the learning rate of AdamW")
def sgd_without_rate(folder):
    return lambda: OptimConfig(optimizer="sgd")


@mistake("configuration", "A fraction of a warm-up step")
def broken_warmup(folder):
    return lambda: OptimConfig(warmup_steps=1.5)


@mistake("configuration", "No stage at all")
def no_stage(folder):
    return lambda: trainer(folder)


@mistake("configuration", "Two stages of one name")
def same_name(folder):
    return lambda: trainer(folder, sft(name="m1"), sft(), sft(name="sft-2"), sft())


@mistake("configuration", "A stage's name that leaves the run's folder")
def name_of_a_path(folder):
    return lambda: sft(name="../elsewhere")


@mistake("configuration", "A start from a stage that comes later")
def init_from_later(folder):
    return lambda: trainer(folder, sft(init_from="dpo"), DPOConfig(train_dataset=PAIRS))


@mistake("configuration", "The candidates of a stage that comes later")
def candidates_from_later(folder):
    return lambda: trainer(folder, rewarded(name="control", candidates_from="m2"))


@mistake("configuration", "The candidates of a run that is not there")
def candidates_of_no_run(folder):
    stage = rewarded(name="control", candidates_from=f"{folder / 'own'}:m2")
    return lambda: trainer(folder, stage)


@mistake("configuration", "The data of an unknown stage")
def from_no_stage(folder):
    return lambda: trainer(folder, sft(), DPOConfig(train_dataset=from_stage("self_reward")))


@mistake("configuration", "An unknown reward prompt")
def unknown_reward_prompt(folder):
    return lambda: trainer(folder, rewarded(self_reward_config_keyname="strict"))


@mistake("configuration", "A text where a number is wanted")
def wrong_type(folder):
    return lambda: trainer(folder, sft(), seed="zero")


@mistake("configuration", "A function as a callback")
def function_as_callback(folder):
    def told(run, stage, model):
        print(stage)

    return lambda: trainer(folder, sft(), callbacks=[told])


@mistake("configuration", "A tracker that is not installed")
def missing_tracker(folder):
    return lambda: trainer(folder, sft(), report_to="aim")


@mistake("configuration", "An unknown tracker")
def unknown_tracker(folder):
    return lambda: trainer(folder, sft(), report_to=["weights"])


@mistake("configuration", "keep_stages of zero")
def keep_nothing(folder):
    return lambda: trainer(folder, sft(), keep_stages=0)


@mistake("configuration", "A pad_id outside the vocabulary")
def pad_outside(folder):
    return lambda: trainer(folder, sft(), pad_id=50256)


@mistake("configuration", "An eos_id outside the vocabulary")
def eos_outside(folder):
    return lambda: trainer(folder, sft(), eos_id=50256)


@mistake("configuration", "Settings of pairs where there are none")
def settings_of_pairs(folder):
    return lambda: SelfRewardSFTConfig(prompt_dataset=PROMPTS, dpo_beta=0.1)


@mistake("configuration", "A reference of policy gradients that nothing reads")
def reference_without_beta(folder):
    return lambda: SelfRewardGRPOConfig(prompt_dataset=PROMPTS, reference="initial")


@mistake("configuration", "Policy gradients of a reference that moves")
def reference_that_moves(folder):
    return lambda: SelfRewardGRPOConfig(
        prompt_dataset=PROMPTS, beta=0.04, reference={"decay": 0.99}
    )


@mistake("configuration", "A reward of judgements that compare nothing")
def judge_reward_alone(folder):
    return lambda: SelfRewardGRPOConfig(prompt_dataset=PROMPTS, judge_reward=True)


@mistake("configuration", "Steps that end nowhere")
def steps_without_end(folder):
    return lambda: StepwiseDPOConfig(prompt_dataset=PROMPTS, generation=SamplingConfig())


@mistake("configuration", "Another stage's answers for answers that grow")
def steps_of_another_stage(folder):
    return lambda: StepwiseDPOConfig(prompt_dataset=PROMPTS, candidates_from="m1")


@mistake("configuration", "An unknown name in the shorthand for the paper's stages")
def unknown_shorthand(folder):
    stages = dict(train_sft_dataset=ROWS, prompts=PROMPTS)
    return lambda: SelfRewardingTrainer(Watched(), finetune_configs=stages)


@mistake("configuration", "An unknown key of spin_kwargs")
def unknown_spin_key(folder):
    return lambda: SPINTrainer(
        Watched(),
        train_sft_dataset=ROWS,
        spin_kwargs={"beta": 0.1},
        checkpoint_folder=folder / "run",
    )


@mistake("configuration", "An early stopper that is not a function")
def no_stopper(folder):
    return lambda: trainer(folder, sft(early_stopper_eval_module="accuracy"))


@mistake("configuration", "A recipe with a misspelt key")
def recipe_key(folder):
    return lambda: recipe(folder, "model: m0\nsed: 3\nstages:\n  - stage: sft\n")


@mistake("configuration", "A recipe with another library's word for a setting")
def recipe_synonym(folder):
    return lambda: recipe(folder, "model: m0\nlora: {r: 8}\nstages:\n  - stage: sft\n")


@mistake("configuration", "A recipe whose judge prompt asks for another variable")
def recipe_template(folder):
    prompt = "prompt_template: '{{ prompt }} {{ score }}', reward_regex_template: 'S: {{ reward }}'"
    text = f"model: org/m0\nreward_prompts:\n  default: {{{prompt}}}\npaper: {{}}\n"
    return lambda: recipe(folder, text)


@mistake("configuration", "A recipe whose aliases stand for too much")
def recipe_aliases(folder):
    lines = ["l0: &l0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 10)]
    return lambda: recipe(folder, "\n".join(lines))


@mistake("configuration", "A recipe that is not valid YAML")
def recipe_no_yaml(folder):
    return lambda: recipe(folder, "model: m0\nstages: [sft\n")


@mistake("configuration", "A key that is twice in a recipe")
def recipe_twice(folder):
    return lambda: recipe(folder, "seed: 1\nmodel: m0\nseed: 2\n")


@mistake("configuration", "No row may be in flight")
def no_rows_in_flight(folder):
    return lambda: LocalEngine(max_rows=0)


# -- data ------------------------------------------------------------------------------------------


@mistake("data", "A dataset without rows")
def empty_dataset(folder):
    return lambda: trainer(folder, sft(train_dataset=[]))


@mistake("data", "A file that is not there")
def no_file(folder):
    return lambda: trainer(folder, sft(train_dataset=folder / "rows.jsonl"))


@mistake("data", "A file of an unknown kind")
def unknown_suffix(folder):
    path = file(folder, "rows.txt", "say 0")
    return lambda: trainer(folder, sft(train_dataset=path))


@mistake("data", "The name of a dataset of the hub as a file")
def hub_name(folder):
    return lambda: trainer(folder, sft(train_dataset="tatsu-lab/alpaca"))


@mistake("data", "A dataset of the hub that cannot be reached")
def unreached_hub(folder):
    def call():
        with patch("datasets.load_dataset", side_effect=ConnectionError("Network is unreachable")):
            from_hub("tatsu-lab/alpaca")

    return call


@mistake("data", "A .csv file with a comma too many")
def ragged_csv(folder):
    path = file(folder, "rows.csv", "prompt,completion\nsay 0, please,0\n")
    return lambda: trainer(folder, sft(train_dataset=path))


@mistake("data", "A line that is not valid JSON")
def torn_line(folder):
    path = file(folder, "rows.jsonl", json.dumps(ROWS[0]) + '\n{"prompt": "say\n')
    return lambda: trainer(folder, sft(train_dataset=path))


@mistake("data", "A .json file that holds no list")
def no_list(folder):
    path = file(folder, "rows.json", json.dumps(ROWS[0]))
    return lambda: trainer(folder, sft(train_dataset=path))


@mistake("data", "A packed file that is damaged")
def damaged_gzip(folder):
    path = file(folder, "rows.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode())[:-9])
    return lambda: trainer(folder, sft(train_dataset=path))


@mistake("data", "A .parquet file that is none")
def no_parquet(folder):
    path = file(folder, "rows.parquet", json.dumps(ROWS[0]))
    return lambda: trainer(folder, sft(train_dataset=path))


@mistake("data", "A table of columns in place of a list of rows")
def columns(folder):
    table = {"prompt": ["say 0"], "completion": ["0"]}
    return lambda: trainer(folder, sft(train_dataset=table))


@mistake("data", "A row with the wrong columns")
def wrong_columns(folder):
    return lambda: trainer(folder, sft(train_dataset=[*ROWS, {"query": "q", "reply": "r"}]))


@mistake("data", "A row with an image")
def image_row(folder):
    row = {"prompt": "say 0", "completion": "0", "images": ["cat.png"]}
    return lambda: trainer(folder, sft(train_dataset=[*ROWS, row]))


@mistake("data", "A message with an image")
def image_message(folder):
    content = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "say 0"}]
    row = {"prompt": [{"role": "user", "content": content}], "completion": "0"}
    return lambda: trainer(folder, sft(train_dataset=[*ROWS, row]))


@mistake("data", "A completion that is not wanted")
def unwanted_row(folder):
    row = {"prompt": "say 0", "completion": "1", "label": False}
    return lambda: trainer(folder, sft(train_dataset=[*ROWS, row]))


@mistake("data", "A row of weight 0")
def weightless_row(folder):
    row = {"prompt": "say 0", "completion": "1", "weight": 0}
    return lambda: trainer(folder, sft(train_dataset=[*ROWS, row]))


@mistake("data", "An answer of weight 0")
def weightless_answer(folder):
    answer = {"role": "assistant", "content": "0", "weight": 0}
    row = {"messages": [{"role": "user", "content": "say 0"}, answer]}
    return lambda: trainer(folder, sft(train_dataset=[*ROWS, row]))


@mistake("data", "An answer of which the chat template shows nothing")
def unseen_answer(folder):
    calls = [{"function": {"name": "say", "arguments": {"number": 0}}}]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    row = {"messages": [{"role": "user", "content": "say 0"}, answer]}
    return lambda: trainer(
        folder,
        sft(train_dataset=[*ROWS, row]),
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


@mistake("data", "A pair without a prompt")
def no_prompt(folder):
    row = {"prompt": "", "chosen": "0", "rejected": "1"}
    return lambda: trainer(folder, DPOConfig(train_dataset=[row]))


@mistake("data", "Tools that are no JSON")
def broken_tools(folder):
    row = {"prompt": "say 0", "completion": "0", "tools": "[{"}
    return lambda: trainer(
        folder,
        sft(train_dataset=[*ROWS, row]),
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


@mistake("data", "Earlier turns in a form of their own")
def broken_history(folder):
    row = {"prompt": "say 0", "completion": "0", "history": ["say 1", "1", "say 2"]}
    return lambda: trainer(folder, sft(train_dataset=[*ROWS, row]))


@mistake("data", "A completion that is a number")
def number_as_text(folder):
    return lambda: trainer(folder, sft(train_dataset=[{"prompt": "say 0", "completion": 0}]))


@mistake("data", "A completion that is null")
def null_completion(folder):
    return lambda: trainer(folder, sft(train_dataset=[{"prompt": "say 0", "completion": None}]))


@mistake("data", "A prompt without a text")
def empty_prompt(folder):
    return lambda: trainer(folder, external(len_of, prompt_dataset=["tell 0", ""]))


@mistake("data", "A prompt that takes all the room")
def long_prompt(folder):
    return lambda: trainer(folder, rewarded(prompt_dataset=["x" * 200]))


@mistake("data", "A row whose prompt takes all of max_seq_len")
def long_row(folder):
    row = {"prompt": "x" * 20, "completion": "y"}
    return lambda: trainer(folder, sft(train_dataset=[*ROWS, row], max_seq_len=16))


@mistake("data", "A conversation that ends with the user")
def last_word(folder):
    row = [{"role": "user", "content": "say 0"}, {"role": "user", "content": "say 1"}]
    return lambda: trainer(folder, sft(train_dataset=[{"messages": row}]), chat_template="plain")


@mistake("data", "The chosen response is the rejected one")
def same_responses(folder):
    row = {"prompt": "say 0", "chosen": "0", "rejected": "0"}
    return lambda: trainer(folder, DPOConfig(train_dataset=[*PAIRS, row]))


@mistake("data", "A prompt length beyond the row")
def wrong_prompt_length(folder):
    return lambda: trainer(folder, sft(train_dataset=[([1, 2, 3], 7)]))


@mistake("data", "Nothing is left to learn")
def nothing_to_learn(folder):
    return lambda: trainer(folder, sft(train_dataset=[([1, 2, 3], 3)]))


@mistake("data", "Token ids that the model does not know")
def unknown_ids(folder):
    return lambda: trainer(folder, sft(train_dataset=[([1, 2, 50256], 1)]))


@mistake("data", "A ranking of one reply")
def one_reply(folder):
    rows = [{"prompt": "say 0", "replies": ["0"]}]
    return lambda: trainer(folder, BuildEFTConfig(ranked_dataset=rows, method="ranks"))


@mistake("data", "A ranking without an order")
def equal_ranks(folder):
    rows = [{"prompt": "say 0", "replies": ["0", "no"], "ranks": [1, 1]}]
    return lambda: trainer(folder, BuildEFTConfig(ranked_dataset=rows, method="ranks"))


@mistake("data", "Contrasts of prompts that are token ids")
def contrast_of_ids(folder):
    contrast = Contrast(positive="be good. ", negative="be bad. ", kind="prefix")
    stage = ContrastiveDPOConfig(prompt_dataset=[[len(ALPHABET), 2]], contrasts=(contrast,))
    return lambda: trainer(folder, stage)


@mistake("data", "SPIN on rows without a prompt")
def spin_without_prompts(folder):
    return lambda: trainer(folder, SelfPlayConfig(train_dataset=[{"text": "say 0"}]))


@mistake("data", "Bad rows are skipped, and all are bad")
def only_bad_rows(folder):
    rows = [{"prompt": "say 0", "completion": i} for i in range(9)]
    return lambda: trainer(folder, sft(train_dataset=rows, on_bad_row="skip"))


@mistake("data", "An anchor whose rows rank nothing")
def anchor_ranks_nothing(folder):
    return lambda: JudgeAnchor([{"prompt": "say 1", "replies": ["1", "one"], "ranks": [0, 0]}])


@mistake("data", "A dataset whose end is not known")
def endless(folder):
    class Endless:
        __iter__ = None

        def __getitem__(self, index):
            return ROWS[0]

    return lambda: trainer(folder, sft(train_dataset=Endless()))


@mistake("data", "A dataset whose rows cannot be read")
def unreadable_dataset(folder):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise KeyError("shard-3")

    return lambda: trainer(folder, sft(train_dataset=Broken()))


# -- model -----------------------------------------------------------------------------------------


class Bidirectional(Watched):
    """Every token sees the whole row."""

    def forward(self, ids):
        found = self.net(ids)
        return found + found.mean(dim=1, keepdim=True)


class Positioned(Watched):
    """Has positions for 16 tokens and no max_seq_len."""

    max_seq_len = None

    def __init__(self):
        super().__init__(max_seq_len=None)
        self.positions = nn.Embedding(16, 1)

    def forward(self, ids):
        return super().forward(ids) + self.positions(torch.arange(ids.shape[1]))


class TwoArguments(Watched):
    def forward(self, ids, mask):
        return self.net(ids)


class LastTokenOnly(Watched):
    def forward(self, ids):
        return self.net(ids)[:, -1]


class NoNumbers(Watched):
    def forward(self, ids):
        return super().forward(ids) * (float("nan") if torch.is_grad_enabled() else 1.0)


@mistake("model", "A bidirectional model")
def bidirectional(folder):
    return lambda: trainer(folder, sft(), model=Bidirectional())


@mistake("model", "Positions that end, of which the model does not say so")
def positions_end(folder):
    return lambda: trainer(folder, sft(), model=Positioned())


@mistake("model", "A forward that wants a mask too")
def two_arguments(folder):
    return lambda: trainer(folder, sft(), model=TwoArguments())


@mistake("model", "Logits of the last token alone")
def last_token_only(folder):
    return lambda: trainer(folder, sft(), model=LastTokenOnly())


@mistake("model", "All weights are frozen")
def frozen(folder):
    return lambda: trainer(folder, sft(), model=Watched().requires_grad_(False))


@mistake("model", "A folder of weights that is not there")
def no_model(folder):
    return lambda: trainer(folder, sft(), model=str(folder / "m0"))


@mistake("model", "A folder without a model in it")
def empty_model(folder):
    (folder / "m0").mkdir()
    return lambda: trainer(folder, sft(), model=str(folder / "m0"))


@mistake("model", "A folder that brings Python code")
def code_in_the_folder(folder):
    (folder / "m0").mkdir()
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "m0" / "config.json").write_text(json.dumps({"auto_map": names}))
    (folder / "m0" / "code.py").write_text("raise SystemExit")
    return lambda: trainer(folder, sft(), model=str(folder / "m0"))


@mistake("model", "An adapter whose base is not there")
def no_base(folder):
    (folder / "m0").mkdir()
    words = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "base.gguf")}
    (folder / "m0" / "adapter_config.json").write_text(json.dumps(words))
    return lambda: trainer(folder, sft(), model=str(folder / "m0"))


@mistake("model", "A GGUF file that is not there")
def no_gguf(folder):
    return lambda: trainer(folder, sft(), model=str(folder / "m0.gguf"))


@mistake("model", "What was kept of a GGUF file is damaged")
def damaged_cache(folder):
    def made():
        from tests.support.gguf_models import write_gguf

        file = write_gguf(folder / "m0.gguf")
        with patch("self_rewarding_lm.models.gguf.version", lambda package: "1"):
            load_causal_lm(file, cache_folder=folder / "cache")
            for config in (folder / "cache").glob("*-float32/config.json"):
                config.write_bytes(b"x" * config.stat().st_size)
            load_causal_lm(file, cache_folder=folder / "cache")

    return made


@mistake("model", "A GGUF file in 4 bit")
def gguf_in_four_bits(folder):
    def made():
        (folder / "m0.gguf").touch()
        with patch("self_rewarding_lm.models.loading._four_bit", object):
            load_causal_lm(folder / "m0.gguf", load_in_4bit=True)

    return made


@mistake("model", "A loss that is not a number (rehearsal)")
def not_a_number(folder):
    return trainer(folder, sft(), model=NoNumbers())


@mistake("model", "Gradient checkpointing of a model that cannot")
def no_checkpointing(folder):
    optim = OptimConfig(gradient_checkpointing=True)
    return lambda: trainer(folder, sft(optim=optim))


@mistake("model", "An adapter is to be merged, and there is none")
def nothing_to_merge(folder):
    return lambda: trainer(folder, sft(), merge_adapter=True)


@mistake("model", "An adapter that cannot be merged")
def not_mergeable(folder):
    return lambda: adapted(folder, merge_adapter=True, lora_bias=True)


@mistake("model", "An adapter on a vocabulary that was resized")
def resized(folder):
    def made():
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM

        from tests.support.hf_models import tiny

        tiny("llama").save_pretrained(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        model.resize_token_embeddings(99)
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        return trainer(folder, sft(), model=model, peft_config=config)

    return made


@mistake("model", "A tied adapter on the embeddings")
def tied_adapter(folder):
    return lambda: adapted(folder, ensure_weight_tying=True)


@mistake("model", "Loading options for a model that is loaded already")
def loaded_already(folder):
    return lambda: trainer(folder, sft(), load_in_4bit=True)


@mistake("model", "A judging model with another vocabulary")
def other_vocabulary(folder):
    return lambda: trainer(folder, rewarded(rewarding_model=Watched(vocab=17)))


# -- tokenizer -------------------------------------------------------------------------------------


@mistake("tokenizer", "Half a tokenizer")
def only_encode(folder):
    return lambda: trainer(folder, sft(), tokenizer_decode=None)


@mistake("tokenizer", "Two tokenizers")
def two_tokenizers(folder):
    class Own:
        encode = staticmethod(encode)
        decode = staticmethod(decode)

    return lambda: trainer(folder, sft(), tokenizer=Own())


@mistake("tokenizer", "Texts without a tokenizer")
def no_tokenizer(folder):
    return lambda: trainer(folder, sft(), tokenizer_encode=None, tokenizer_decode=None)


@mistake("tokenizer", "An encode function that gives words")
def encode_gives_words(folder):
    return lambda: trainer(folder, sft(), tokenizer_encode=lambda text: text.split())


@mistake("tokenizer", "An encode function that gives a batch")
def encode_gives_a_batch(folder):
    return lambda: trainer(folder, sft(), tokenizer_encode=lambda text: encode(text)[None])


@mistake("tokenizer", "A tokenizer with more tokens than the model")
def too_many_tokens(folder):
    return lambda: trainer(folder, sft(), tokenizer_encode=lambda text: encode(text) + 40)


@mistake("tokenizer", "An encode function that raises")
def encode_raises(folder):
    return lambda: trainer(folder, sft(train_dataset=[{"prompt": "é", "completion": "e"}]))


@mistake("tokenizer", "A decode function that gives a list (rehearsal)")
def decode_gives_a_list(folder):
    return trainer(folder, external(len_of), tokenizer_decode=lambda ids: ids.tolist())


@mistake("tokenizer", "A decode function that raises (rehearsal)")
def decode_raises(folder):
    return trainer(folder, external(len_of), tokenizer_decode=lambda ids: ids.item())


@mistake("tokenizer", "An unknown name of a chat template")
def unknown_template(folder):
    return lambda: trainer(folder, sft(), chat_template="lama3")


@mistake("tokenizer", "A chat template that is not valid")
def broken_template(folder):
    return lambda: trainer(folder, sft(), chat_template="{% for m in messages %}{{ m }}")


@mistake("tokenizer", "A chat template that refuses the prompts")
def refusing_template(folder):
    template = "{{ raise_exception('a system message must come first') }}"
    return lambda: trainer(folder, sft(), chat_template=template)


@mistake("tokenizer", "A chat template that shows nothing of a message")
def blind_template(folder):
    template = "{% for m in messages %}{{ m['text'] }}.{% endfor %}"
    return lambda: trainer(folder, sft(), chat_template=template)


@mistake("tokenizer", "A chat template that changes a prompt once it is answered")
def no_beginning(folder):
    template = (
        "{% if add_generation_prompt %}q: {% else %}done: {% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    return lambda: trainer(folder, sft(), chat_template=template)


# -- judges and functions --------------------------------------------------------------------------


def len_of(prompts, completions):
    return [float(len(text)) for text in completions]


def raising(*arguments, **columns):
    raise KeyError("score")


@mistake("judge", "A reward prompt whose answer nothing reads")
def nothing_reads(folder):
    return lambda: RewardConfig(prompt_template="{{ prompt }} {{ response }}")


@mistake("judge", "A reward prompt that does not show the response")
def response_not_shown(folder):
    reward = REWARD.model_copy(update={"prompt_template": "{{ prompt }}: "})
    return lambda: trainer(folder, rewarded(), self_reward_prompt_config=reward)


@mistake("judge", "A reward prompt with an unknown field")
def unknown_field(folder):
    reward = REWARD.model_copy(update={"prompt_template": "{{ prompt }} {{ answer }}"})
    return lambda: trainer(folder, rewarded(), self_reward_prompt_config=reward)


@mistake("judge", "A reward prompt that is not a valid template")
def reward_no_template(folder):
    reward = REWARD.model_copy(update={"prompt_template": "{{ prompt } {{ response }}"})
    return lambda: trainer(folder, rewarded(), self_reward_prompt_config=reward)


@mistake("judge", "A reward template without its number")
def template_without_number(folder):
    reward = REWARD.model_copy(update={"reward_regex_template": "Score: "})
    return lambda: trainer(folder, rewarded(), self_reward_prompt_config=reward)


@mistake("judge", "A range of scores the wrong way round")
def reversed_range(folder):
    return lambda: RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        reward_regex_template="S: {{ reward }}",
        score_range=(5, 0),
    )


@mistake("judge", "Marks of a rubric beside another way to read the score")
def marks_and_a_template(folder):
    return lambda: RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        reward_regex_template="S: {{ reward }}",
        marks=MarkedRubric(items=4, yes=", yes.", no=", no."),
    )


@mistake("judge", "Marks of a rubric without a review")
def marks_at_once(folder):
    return lambda: RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        marks=MarkedRubric(items=4, yes=", yes.", no=", no."),
        forced_ending="at_once",
    )


@mistake("judge", "Expected scores without a scale")
def expected_without_numbers(folder):
    return lambda: RewardConfig(
        prompt_template="{{ prompt }} {{ response }}",
        reward_regex_template="S: {{ reward }}",
        score_mode="expected",
    )


@mistake("judge", "A comparison whose labels are the same")
def same_labels(folder):
    return lambda: ComparisonConfig(labels=("A", "A"))


@mistake("judge", "A comparison for judge examples that fills the model")
def comparison_without_room(folder):
    stage = BuildEFTConfig(
        ranked_dataset=RANKED,
        method="comparisons",
        comparison=ComparisonConfig(
            prompt_template="x" * 120 + "{{ prompt }} {{ response_a }} {{ response_b }}",
            labels=("1", "2"),
            verdict_prefix="best ",
        ),
    )
    return lambda: trainer(folder, stage)


@mistake("judge", "Votes over an unknown kind of answer")
def unknown_extractor(folder):
    return lambda: VoteJudge("letters")


@mistake("judge", "An ensemble of filters alone")
def filters_alone(folder):
    return lambda: EnsembleJudge([], filters=[(lambda prompts, completions: [], 3)])


@mistake("judge", "A shuffle in an ensemble that does not say whose scores")
def shuffle_of_nobody(folder):
    return lambda: trainer(folder, external(EnsembleJudge([ShuffledJudge()])))


@mistake("judge", "Implicit rewards relative to an unknown stage")
def implicit_without_weights(folder):
    return lambda: trainer(folder, external(ImplicitJudge(reference="m1")))


@mistake("judge", "Consistency by a judge that does not ask the model")
def consistency_of_votes(folder):
    stage = external(VoteJudge(), consistency=ConsistencyConfig())
    return lambda: trainer(folder, stage)


@mistake("judge", "A folder that holds no reward model")
def empty_reward_model(folder):
    return lambda: RewardModelJudge(folder)


@mistake("judge", "Two models are compared, and nobody is there to judge")
def nobody_judges(folder):
    return lambda: compare(Watched(), Watched(), PROMPTS, judge=ComparisonConfig())


@mistake("judge", "Early stopping by a reward prompt that does not show the response")
def held_out_without_response(folder):
    reward = REWARD.model_copy(update={"prompt_template": "{{ prompt }}: "})
    return lambda: trainer(folder, sft(early_stopper_eval_module=HeldOutReward(PROMPTS, reward)))


@mistake("judge", "A verifier that is not a function")
def verifier_no_function(folder):
    return lambda: VerifierAccuracy(PROMPTS, "exact_match")


@mistake("judge", "A reward prompt that fills the model")
def judge_without_room(folder):
    reward = REWARD.model_copy(update={"prompt_template": "x" * 120 + REWARD.prompt_template})
    return lambda: trainer(folder, rewarded(), self_reward_prompt_config=reward)


@mistake("judge", "A reward prompt that leaves no room beside a prompt (rehearsal)")
def judge_with_little_room(folder):
    reward = REWARD.model_copy(update={"prompt_template": "x" * 106 + REWARD.prompt_template})
    stage = rewarded(judging=SamplingConfig(max_new_tokens=32, temperature=0))
    return trainer(folder, stage, self_reward_prompt_config=reward)


@mistake("judge", "A parse_reward that raises (rehearsal)")
def parse_raises(folder):
    reward = RewardConfig(prompt_template=REWARD.prompt_template, parse_reward=raising)
    return trainer(folder, rewarded(), self_reward_prompt_config=reward)


@mistake("judge", "A judge without a judge method")
def no_judge(folder):
    return lambda: trainer(folder, rewarded(judge="gpt"))


@mistake("judge", "A reward_model that is not a function")
def no_reward_model(folder):
    return lambda: trainer(folder, external("length"))


@mistake("judge", "A reward function of texts without a tokenizer")
def reward_without_tokenizer(folder):
    stage = external(len_of, prompt_dataset=[[1, 2]])
    return lambda: trainer(folder, stage, tokenizer_encode=None, tokenizer_decode=None)


@mistake("judge", "A reward function that raises (rehearsal)")
def reward_raises(folder):
    return trainer(folder, sft(), external(lambda prompts, completions: raising()))


@mistake("judge", "A reward function with one score for all (rehearsal)")
def reward_of_all(folder):
    return trainer(folder, external(lambda prompts, completions: 1.0))


@mistake("judge", "A reward function that takes its texts by other names")
def reward_of_other_names(folder):
    return lambda: FunctionJudge(lambda prompts, texts: [1.0 for _ in texts])


@mistake("judge", "A reward function that takes a column that no row has (rehearsal)")
def reward_of_a_column(folder):
    return trainer(folder, external(lambda prompts, completions, answer: [1.0] * len(answer)))


@mistake("judge", "A reward module of a wrong shape (rehearsal)")
def reward_of_tokens(folder):
    return trainer(folder, external(lambda ids: torch.zeros(*ids.shape, 2)))


@mistake("judge", "A reward module with a number for each token (rehearsal)")
def reward_by_token(folder):
    return trainer(folder, external(lambda ids: ids.double()))


@mistake("judge", "A reward module that gives booleans (rehearsal)")
def reward_of_booleans(folder):
    return trainer(folder, external(lambda ids: ids[:, 0] > 0))


@mistake("judge", "A picking function with one index (rehearsal)")
def picks_one(folder):
    return trainer(folder, rewarded(pick_paired_rewards_fn=lambda scores: scores.argmax()))


@mistake("judge", "A check of rewards that raises (rehearsal)")
def check_raises(folder):
    return trainer(folder, rewarded(is_valid_reward=raising))


@mistake("judge", "A postprocess_response that forgets to return (rehearsal)")
def postprocess_forgets(folder):
    return trainer(folder, rewarded(postprocess_response=lambda text: None))


@mistake("judge", "A filter of logits that raises (rehearsal)")
def filter_raises(folder):
    stage = rewarded(generation=SHORT.model_copy(update={"filter_fn": raising}))
    return trainer(folder, stage)


@mistake("judge", "An optimiser function that gives no optimiser (rehearsal)")
def no_optimiser(folder):
    optim = OptimConfig(optimizer=lambda parameters: None, learning_rate=1e-3)
    return trainer(folder, sft(optim=optim))


@mistake("judge", "New prompts from an unknown model")
def no_writer(folder):
    prompts = SelfInstruct(seed_dataset=PROMPTS, num_prompts=4, model=7)
    return lambda: trainer(folder, rewarded(prompt_dataset=prompts))


# -- files of a run --------------------------------------------------------------------------------


@mistake("files", "Other settings for a stage that has begun")
def other_settings(folder):
    ran(folder)
    return trainer(folder, sft(max_seq_len=32))


@mistake("files", "Other weights than a stage was begun with")
def other_weights(folder):
    stage = rewarded(judge=BySum(), num_generated_preference_pairs=1, generation=NOISY)
    run = ran(folder, stage)
    (run / "01-self_reward" / "done.json").unlink()
    other = Watched()
    lively(other, 7)
    return trainer(folder, stage, model=other)


@mistake("files", "A stage's folder has files of something else")
def foreign_files(folder):
    (folder / "run" / "01-sft").mkdir(parents=True)
    file(folder, "run/01-sft/notes.txt", "mine")
    return trainer(folder, sft())


@mistake("files", "A run.json of another program")
def foreign_run(folder):
    (folder / "run").mkdir()
    file(folder, "run/run.json", '{"library": "other"}')
    return trainer(folder, sft())


@mistake("files", "A run.json that is damaged")
def damaged_run(folder):
    (folder / "run").mkdir()
    file(folder, "run/run.json", '{"library": "self_rew')
    return trainer(folder, sft())


@mistake("files", "A done.json that was edited by hand")
def edited_summary(folder):
    done = ran(folder) / "01-sft" / "done.json"
    done.write_text(done.read_text().replace('"steps": ', '"steps": 1'))
    return trainer(folder, sft(), sft())


@mistake("files", "A record of an arrow that was stopped was edited by hand")
def edited_line(folder):
    run = ran(folder)
    (run / "01-sft" / "done.json").unlink()
    rows = run / "01-sft" / "rows.jsonl"
    rows.with_name("rows.0.jsonl").write_text(rows.read_text())
    rows.unlink()
    return trainer(folder, sft())


@mistake("files", "A record that was edited by hand")
def edited_record(folder):
    run = ran(folder)
    (run / "01-sft" / "done.json").unlink()
    rows = run / "01-sft" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("[", "(", 1))
    return trainer(folder, sft())


@mistake("files", "The weights of a stage that is done were deleted")
def deleted_weights(folder):
    shutil.rmtree(ran(folder) / "01-sft" / "model")
    return trainer(folder, sft(), sft())


@mistake("files", "The weights of a stage that is done are damaged")
def damaged_weights(folder):
    weights = ran(folder) / "01-sft" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return trainer(folder, sft(), sft())


@mistake("files", "A start from a folder without weights")
def no_weights(folder):
    (folder / "m0").mkdir()
    return trainer(folder, sft(init_from=str(folder / "m0")))


@mistake("files", "The run's folder is a file")
def folder_is_a_file(folder):
    file(folder, "run", "mine")
    return trainer(folder, sft())


@mistake("files", "A folder without a run is opened")
def no_run(folder):
    return lambda: Run.open(folder)


@mistake("files", "A stage that a run does not have")
def no_such_stage(folder):
    run = Run.open(ran(folder))
    return lambda: run.pairs("dpo")


@mistake("files", "Weights are saved over others")
def save_over(folder):
    made = trainer(folder, sft())
    made.save("m1.safetensors")
    return lambda: made.save("m1.safetensors")


@mistake("files", "An export to a file of an unknown kind")
def export_csv(folder):
    run = Run.open(ran(folder))
    return lambda: export_stage(run, "sft", folder / "rows.csv")


@mistake("files", "An export over a file")
def export_over(folder):
    run = Run.open(ran(folder))
    path = file(folder, "rows.jsonl", "")
    return lambda: export_stage(run, "sft", path)


@mistake("files", "A merge of a stage that trained no adapter")
def merge_whole(folder):
    run = Run.open(ran(folder))
    return lambda: merge_stage(run, "sft", folder / "merged")


class BySum:
    """A judge: the sum of the ids."""

    def judge(self, ctx, prompts, candidates_PG):
        from self_rewarding_lm import Judgement

        flat = [candidate for group in candidates_PG for candidate in group]
        return [Judgement(f"{c.id}/j0", (c.id,), "sum", float(sum(c.ids)), None) for c in flat]


# -- environment -----------------------------------------------------------------------------------


@mistake("environment", "A task of reasoning-gym without the package")
def no_reasoning_gym(folder):
    return missing("reasoning_gym", lambda: reasoning_task("chain_sum"))


@mistake("environment", "A parquet file without pyarrow")
def without_pyarrow(folder):
    path = file(folder, "rows.parquet", "")
    return missing("pyarrow", lambda: trainer(folder, sft(train_dataset=path)))


@mistake("environment", "A model by its name without transformers")
def without_transformers(folder):
    (folder / "m0").mkdir()
    return missing("transformers", lambda: trainer(folder, sft(), model=str(folder / "m0")))


@mistake("environment", "An 8-bit optimiser without bitsandbytes")
def without_bitsandbytes(folder):
    stage = sft(optim=OptimConfig(optimizer="adamw_8bit", learning_rate=1e-3))
    return missing("bitsandbytes", lambda: trainer(folder, stage))


@mistake("environment", "A server without openai")
def without_openai(folder):
    return missing("openai", lambda: ServerEngine(url="http://localhost:1"))


@mistake("environment", "An argument that accelerate does not know")
def unknown_accelerate(folder):
    return lambda: trainer(folder, sft(), accelerate_kwargs={"precision": "bf16"})


@mistake("environment", "A server's address and a command at once")
def two_servers(folder):
    return lambda: ServerEngine(url="http://localhost:1", launch="serve {checkpoint} {port}")


@mistake("environment", "A precision for a server's answers")
def precision_of_a_server(folder):
    server = ServerEngine(url="http://localhost:1")
    return lambda: generate(Watched(), [torch.tensor([1])], engine=server, precision="bf16")


@mistake("environment", "A command without a place for the weights")
def launch_without_weights(folder):
    return lambda: ServerEngine(launch="vllm serve model --port 8000")


@mistake("environment", "A server that is to stay for the whole run and cannot sleep")
def launch_without_sleep(folder):
    launch = "vllm serve {checkpoint} --port {port}"
    return lambda: ServerEngine(launch=launch, reload="vllm")


@mistake("environment", "A running server that is to take weights")
def reload_of_a_running_server(folder):
    return lambda: ServerEngine(url="http://localhost:1", reload="vllm")


@mistake("environment", "A server that is not there")
def no_server(folder):
    engine = ServerEngine(url="http://127.0.0.1:9", max_retries=0, timeout=1.0)
    return lambda: trainer(folder, external(len_of), engine=engine)


@mistake("environment", "A judge behind an address where nobody listens (rehearsal)")
def no_server_judge(folder):
    judge = ServerJudge(url="http://127.0.0.1:9", model="judge", max_retries=0, timeout=1.0)
    return trainer(folder, rewarded(rewarding_model=judge))


@mistake("environment", "Sampling settings that the server refuses")
def refused_settings(folder):
    sampling = SamplingConfig(temperature=2.5, max_new_tokens=2)

    def call():
        with FakeServer() as server:
            try:
                trainer(
                    folder,
                    external(len_of, generation=sampling),
                    engine=ServerEngine(url=server.url),
                )
            except ConfigError as error:
                words = str(error).replace(server.url, "http://127.0.0.1:8000")
                raise ConfigError(words) from error

    return call


@mistake("environment", "A server's judge with expected scores")
def server_expected(folder):
    reward = REWARD.model_copy(update={"score_mode": "expected"})
    return lambda: ServerJudge(url="http://127.0.0.1:9", model="judge", reward=reward)


@mistake("environment", "Texts for generate without a tokenizer")
def generate_texts(folder):
    return lambda: generate(Watched(), ["tell 0"])


@mistake("environment", "A repository of the hub without its owner")
def no_owner(folder):
    return lambda: reach_hub("name")


# -- several processes -----------------------------------------------------------------------------


@mistake("processes", "Two runs in one folder at once")
def two_runs(folder):
    made = trainer(folder, sft())

    def call():
        with locked(folder / "run"):  # as another process holds it
            made()

    return call


@mistake("processes", "Accumulation of gradients by Accelerate")
def accumulation(folder):
    return lambda: trainer(folder, sft(), accelerate_kwargs={"gradient_accumulation_steps": 4})


@mistake("processes", "DeepSpeed")
def deepspeed(folder):
    return launched({"ACCELERATE_USE_DEEPSPEED": "true"}, lambda: trainer(folder, sft()))


@mistake("processes", "A launcher of two processes that do not find each other")
def apart(folder):
    made = partial(trainer, folder, sft(), accelerate_kwargs={"cpu": False})
    return launched({"WORLD_SIZE": "2", "RANK": "0"}, made)


def launched(environment, call):
    """The call, in the environment that a launcher makes."""

    def called():
        with patch.dict(os.environ, environment):
            call()

    return called


@mistake("processes", "FSDP in one process")
def fsdp_alone(folder):
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    return lambda: trainer(folder, sft(), accelerate_kwargs={"fsdp_plugin": plugin})


@mistake("processes", "FSDP of the first version")
def fsdp_old(folder):
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    return lambda: trainer(folder, sft(), accelerate_kwargs={"fsdp_plugin": plugin})


# -- the tests, and the page -----------------------------------------------------------------------


def records_in(folder: Path) -> dict[str, bytes]:
    records = (path for path in folder.rglob("*.jsonl") if path.name != "events.jsonl")
    return {str(path): path.read_bytes() for path in records}


@dataclass(frozen=True)
class Made:
    """What came of a mistake. ours: an error of the library; changed: records were written."""

    name: str
    words: str
    ours: bool
    forwards: int
    changed: bool


def made(found: Mistake, folder: Path) -> Made:
    call = found.make(folder)
    before, Watched.forwards = records_in(folder), 0
    try:
        call()
        error = None
    except Exception as caught:
        error = caught
    ours, changed = isinstance(error, SelfRewardingError), records_in(folder) != before
    return Made(type(error).__name__, words_of(error, folder), ours, Watched.forwards, changed)


def words_of(error: Exception | None, folder: Path) -> str:
    """An error's words, the same on every machine."""
    words = str(error).replace(str(folder.resolve()), "FOLDER").replace(str(folder), "FOLDER")
    words = re.sub(r'pip install (-e )?"[^"\[]*(\[\w+\])[^"]*"', r'pip install ".\2"', words)
    words = re.sub(r"process \d+ on \S+\)", "process 1234 on HOST)", words)
    return re.sub(r"\b[0-9a-f]{16}\b", "...", words)  # hashes of weights


def make_all() -> dict[str, Made]:
    results = {}
    for found in MISTAKES:
        with tempfile.TemporaryDirectory() as place:
            results[found.id] = made(found, Path(place))
    return results


def page(results: dict[str, Made]) -> str:
    parts = [INTRODUCTION]
    for group, title in GROUPS.items():
        parts.append(f"\n## {title}\n")
        for found in MISTAKES:
            if found.group == group:
                told = results[found.id]
                parts.append(f"\n### {found.what}\n\n`{told.name}`\n")
                parts.append(f"\n```text\n{told.words}\n```\n")
    return "".join(parts)


def test_each_mistake_has_an_anchor_of_its_own():
    anchors = [re.sub(r"\W+", "-", found.what.lower()).strip("-") for found in MISTAKES]
    assert len(set(anchors)) == len(anchors)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All mistakes, made in a process of their own: as a user makes them, without the type checks
    that the tests put on inner functions."""
    out = tmp_path_factory.mktemp("errors") / "made.json"
    command = [sys.executable, "-m", "tests.docs.test_errors", str(out)]
    subprocess.run(command, check=True, cwd=PAGE.parent.parent, stdout=subprocess.DEVNULL)
    return {name: Made(**told) for name, told in json.loads(out.read_text()).items()}


@pytest.mark.parametrize("found", MISTAKES, ids=lambda found: found.id)
def test_a_mistake_gets_an_error_of_ours_before_long_work(found, results):
    told = results[found.id]
    assert told.ours, f"{told.name}: {told.words}"
    assert not told.changed
    assert told.forwards <= MOST_FORWARDS
    assert len(told.words) >= 30  # says more than that something is wrong
    assert ("(Rehearsal of stage" in told.words) == ("(rehearsal)" in found.what)


def test_the_page_is_current(results):
    """Run `make errors` where this fails."""
    assert len(MISTAKES) >= 50
    assert PAGE.read_text() == page(results)


if __name__ == "__main__":
    everything = make_all()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({k: asdict(v) for k, v in everything.items()}))
    else:
        PAGE.write_text(page(everything))
        print(f"{PAGE}: {len(everything)} mistakes")
