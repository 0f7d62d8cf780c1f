"""The study's settings on the tasks of sentences.py, and how one is run and measured.

Each is that example's own first round with one thing changed, from the same M1 of a seed. To cost
little they share what is equal: `answers_8` samples and reviews 8 answers a prompt, and whatever
needs no other answers and no other reviews takes the first 4 of these.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import demands
import sentences
import torch
from peft import LoraConfig
from smollm2 import smollm2_file
from study_jobs import M1, Job, Setting

from self_rewarding_lm import (
    Candidate,
    ComparisonConfig,
    Judge,
    Judgement,
    MarkedRubric,
    PairingConfig,
    Prompt,
    RewardConfig,
    Run,
    SamplingConfig,
    SelfRewardDPOConfig,
    SelfRewardGRPOConfig,
    SelfRewardingTrainer,
    ShuffledJudge,
    load_causal_lm,
)

TAKES_MODELS = True
PROMPTS, HELD_OUT, JUDGE_ITEMS = 96, 200, 50  # a round; measured
SFT_STEPS = sentences.SFT_STEPS
BASE, POOL = "base", "answers_8"
MEASURED = (
    *("accuracy", "demands", "judge_exact", "words", "distinct_words", "log_loss"),
    *("pairs", "right_tied_wrong"),
)
COMPARISON = ComparisonConfig(
    prompt_template=(
        "Compare two answers. Which one meets more of the demands, answer A or answer B?\n\n"
        "Task: {{ prompt }}\nAnswer A: {{ response_a }}\nAnswer B: {{ response_b }}"
    ),
    verdict_prefix="Answer ",
    score_mode="expected",
    forced_ending="at_once",
)

VERDICT = COMPARISON.model_copy(update={"score_mode": "sampled", "forced_ending": False})
"""The same, with a verdict that the model writes, which can be trained."""

Score = Callable[[Prompt, Candidate, Judgement], float | None]
"""A score of a candidate and of what was written of it."""


class Reread(Judge):
    """Scores the first answers to each prompt by what another run's judge wrote of them."""

    name = "reread"
    reads_weights = False

    def __init__(self, judgements: Sequence[Judgement], answers: int, score: Score) -> None:
        self.known = {judgement.candidate_ids[0]: judgement for judgement in judgements}
        self.answers, self.score = answers, score

    def judge(
        self, ctx: Any, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        for prompt, candidates in zip(prompts, candidates_PG, strict=True):
            for candidate in self.first(candidates):
                known = self.known[candidate.id]
                score = self.score(prompt, candidate, known)
                reason = None if score is not None else known.reason or "no_score"
                yield replace(known, judge=self.name, score=score, reason=reason)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        return [f"{candidate.id}/j0" for candidate in self.first(candidates)]

    def first(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The answers that count: an id ends in the number of its sample."""
        return [c for c in candidates if int(c.id.rpartition("/")[2]) < self.answers]


def as_counted(prompt: Prompt, candidate: Candidate, judgement: Judgement) -> float | None:
    return judgement.score


def as_stated(prompt: Prompt, candidate: Candidate, judgement: Judgement) -> float | None:
    """The sum that the review states last."""
    sums = re.findall(r"Score: (\d+)\b", judgement.text or "")
    return float(sums[-1]) if sums and int(sums[-1]) <= 4 else None


class Lab:
    """What a seed's settings share: the task's data, the example's round, and who trains it."""

    def __init__(self, job: Job) -> None:
        torch.manual_seed(job.seed)
        self.job, self.task = job, importlib.import_module(f"{job.task}_task")
        self.source = job.model or smollm2_file()
        rounds = (PROMPTS, 2 * PROMPTS)  # the second and the third are drawn together
        sizes = {"prompts_per_round": rounds, "held_out": HELD_OUT, "judge_items": JUDGE_ITEMS}
        self.data = self.task.make_data(job.seed, **sizes)
        self.table = sentences.Measure(self.data, self.task, self.source)
        _, self.own, _ = sentences.build_stages(self.data, [], self.task, "none")

    def weights(self, name: str, stage: str) -> Path:
        """The folder of the weights after a stage of a job with the same seed."""
        return Run.open(self.job.folder(name)).weights(stage).parent.resolve()

    def round(self, **changes: Any) -> SelfRewardDPOConfig:
        """The example's first round with some settings changed; it begins with M1."""
        return self.own.model_copy(update={"init_from": self.weights(M1, M1), **changes})

    def again(self, *, answers: int = 4, score: Score = as_counted, **changes: Any) -> Any:
        """The same on answers and reviews that are there; the scores are read in them."""
        pool = self.job.folder(POOL).resolve()
        judge = Reread(Run.open(pool).judgements("M2"), answers, score)
        return self.round(**{"candidates_from": f"{pool}:M2", "judge": judge, **changes})

    def rewarded(self, **changes: Any) -> SelfRewardGRPOConfig:
        """The example's policy gradients in the place of that round, with some settings changed."""
        _, stage, _ = sentences.build_stages(self.data, [], self.task, "none", "grpo")
        return stage.model_copy(update={"init_from": self.weights(M1, M1), **changes})

    def points(self, prompt: Prompt, candidate: Candidate, judgement: Judgement) -> float:
        """The checker's score."""
        return self.task.points(prompt.text, candidate.text)

    def run(self, stages: list[Any]) -> list[dict]:
        """Train the stages; what the example measures after each."""
        marks = MarkedRubric(items=len(self.task.DEMANDS), yes=demands.YES, no=demands.NO)
        asked = {"prompt_template": self.task.JUDGE_PROMPT, "marks": marks}
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0, target_modules="all-linear")
        trainer = SelfRewardingTrainer(
            load_causal_lm(self.source)[0],
            finetune_configs=stages,
            tokenizer=self.table.tokenizer,
            peft_config=lora,
            self_reward_prompt_config={
                "default": RewardConfig(**asked),
                "expected": RewardConfig(**asked, score_mode="expected"),
            },
            seed=self.job.seed,
            checkpoints_folder=self.job.folder(),
            engine=sentences.ENGINE,
            callbacks=[self.table],
            accelerate_kwargs={"mixed_precision": sentences.PRECISION},
            quiet=True,
            report=False,
        )
        run = trainer(rehearse=False)  # the candidates of a rehearsal are in no other run
        found = []
        for stage in run.stages:
            measured = run.summary(stage)["measured"]
            right, tied, _ = measured["right_tied_wrong"]
            share = 100 * (right + tied / 2) / measured["pairs"] if measured["pairs"] else None
            kept = {key: measured[key] for key in MEASURED}
            found.append({"stage": stage, **kept, "pairs_right": share})
        return found


def about(job: Job) -> dict[str, Any]:
    """What a result says of itself beside its figures."""
    model = Path(job.model or smollm2_file()).name
    return {"prompts": PROMPTS, "held_out": HELD_OUT, "model": model}


def first_model(job: Job) -> list[dict]:
    """Train M1 as the example does."""
    lab = Lab(job)
    data, task = lab.data, lab.task
    answers = lab.table.greedy(lab.table.first_model, data.first_prompts, task.ANSWER_TOKENS)
    rows = task.make_judge_rows(data, answers, job.seed)
    m1, *_ = sentences.build_stages(data, rows, task, "none")
    return lab.run([m1.model_copy(update={"num_train_steps": job.sft_steps})])


def setting_run(setting: Setting, job: Job) -> list[dict]:
    """What is measured after each stage of a setting, and after those that it goes on from."""
    lab = Lab(job)
    before: list[dict] = []
    if setting.after == BASE:
        before = json.loads(replace(job, name=BASE).result.read_text())["stages"]
    return before + lab.run(setting.stages(lab))


def again(**changes: Any) -> Callable[[Lab], list]:
    """One round on shared answers with some settings changed."""
    return lambda lab: [lab.again(**changes)]


def at_rate(rate: float) -> Callable[[Lab], list]:
    return lambda lab: [lab.again(optim=lab.own.optim.model_copy(update={"learning_rate": rate}))]


def shuffled(lab: Lab) -> list:
    stage = lab.again()
    return [stage.model_copy(update={"judge": ShuffledJudge(of=stage.judge)})]


def rewarded(judge: Judge | None = None) -> Callable[[Lab], list]:
    """Policy gradients on as many answers as `base`, a step after those of each 10 prompts."""
    return lambda lab: [lab.rewarded(judge=judge)]


def serl(lab: Lab) -> list:
    """Any two answers compared in both orders, twice each; the verdicts are trained as well."""
    judging = SamplingConfig(temperature=0.9, top_p=None, max_new_tokens=8)
    how = {"comparison": VERDICT, "judging": judging, "num_sampled_reward_responses": 2}
    return [lab.rewarded(judge_reward=True, length_window=0.2, min_parse_rate=0.0, **how)]


def later_rounds(lab: Lab) -> list:
    """A second and a third round after that of `base`, each on answers of its own model."""
    prompts = lab.data.round_prompts[1]
    second = {
        "name": "M3",
        "init_from": lab.weights(BASE, "M2"),
        "prompt_dataset": prompts[:PROMPTS],
    }
    third = {"name": "M4", "init_from": "previous", "prompt_dataset": prompts[PROMPTS:]}
    return [lab.round(**second), lab.round(**third)]


SETTINGS = (
    Setting(
        BASE, "the example's round: 4 answers, counted marks, NLL 0.3, rate 2e-4", again(), POOL
    ),
    Setting("oracle", "the checker's scores", lambda lab: [lab.again(score=lab.points)], POOL),
    Setting("shuffled", "control: the scores given to other answers", shuffled, POOL),
    Setting("stated", "the sum that the review states", again(score=as_stated), POOL),
    Setting(
        "expected",
        "the sum of the marks' probabilities of yes, margin 0.5",
        lambda lab: [lab.round(self_reward_config_keyname="expected", min_margin=0.5)],
    ),
    Setting("nll_0", "DPO without the winner's NLL", again(nll_weight=0.0), POOL),
    Setting("nll_1", "NLL 1", again(nll_weight=1.0), POOL),
    Setting("rate_5e-5", "a lower learning rate", at_rate(5e-5), POOL),
    Setting("rate_4e-4", "a higher learning rate", at_rate(4e-4), POOL),
    Setting("answers_2", "2 answers a prompt", again(answers=2), POOL),
    Setting(POOL, "8 answers a prompt", lambda lab: [lab.round(num_candidate_responses=8)]),
    Setting(
        "length_control",
        "length control, rho = 0.3",
        again(pairing=PairingConfig(length_control=0.3)),
        POOL,
    ),
    Setting(
        "pairwise",
        "A or B for any two answers, in both orders; M1 was not taught to compare",
        lambda lab: [lab.round(comparison=COMPARISON)],
    ),
    Setting("three_rounds", "two more rounds after `base`", later_rounds, BASE),
    Setting("grpo", "policy gradients on counted marks", rewarded()),
    Setting(
        "grpo_shuffled",
        "control: policy gradients on scores given to other answers",
        rewarded(ShuffledJudge()),
    ),
    Setting(
        "serl",
        "SERL: policy gradients on wins in comparisons, and on verdicts that agree with them; M1 "
        "was not taught to compare",
        serl,
    ),
)
