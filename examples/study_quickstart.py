"""The study's settings on the quickstart's task, and how one is run and measured.

All begin from the same M1 of a seed. What a setting does not name is as in `plain`: 4 answers a
prompt, one greedy review of each, best against worst, DPO with beta 0.3 and half an NLL.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quickstart
import quickstart_task as task
import torch
from study_jobs import M1, Job, Setting

from self_rewarding_lm import (
    CertaintyJudge,
    ConsistencyConfig,
    Contrast,
    ContrastiveDPOConfig,
    EMAReference,
    ExternalRewardDPOConfig,
    FinetuneConfig,
    FunctionJudge,
    Judge,
    MetaJudgingConfig,
    MetaRewardDPOConfig,
    OptimConfig,
    PairingConfig,
    Run,
    SamplingConfig,
    SelfPlayConfig,
    SelfRewardDPOConfig,
    SelfRewardingTrainer,
    SelfRewardSFTConfig,
    SFTConfig,
    ShuffledJudge,
    TemporalDPOConfig,
    VoteJudge,
)

TAKES_MODELS = False
PROMPTS = 500  # of a round
SFT_STEPS = 700
LOW = OptimConfig(learning_rate=4e-4, batch_size=32, betas=(0.9, 0.95), epochs=2)
SAMPLED_REVIEW = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=32)


@dataclass(frozen=True)
class Lab:
    """What a seed's settings share: its data, and weights on the way to M1."""

    seed: int
    data: task.TaskData
    halfway: Path
    """Weights of M1 at half of its training: the earlier model of CREAM."""


def shared(lab: Lab, round: int) -> dict[str, Any]:
    """What all stages that sample share; `round` tells which prompts, from 1 on."""
    prompts = lab.data.round_prompts[round - 1]
    return {
        "name": f"round-{round}",
        "prompt_dataset": prompts,
        "prompts_per_block": len(prompts),
        "generation": quickstart.ANSWER,
        "dpo_beta": 0.3,
        "nll_weight": 0.5,
        "dropout": 0,
        "optim": LOW,
    }


def plain(lab: Lab, round: int = 1, **changes: Any) -> SelfRewardDPOConfig:
    """The paper's round, at this size."""
    own = {"judging": quickstart.REVIEW, "num_sampled_reward_responses": 1}
    return SelfRewardDPOConfig(**{**shared(lab, round), **own, **changes})


def one(**changes: Any) -> Callable[[Lab], list[FinetuneConfig]]:
    """One plain round with some settings changed."""
    return lambda lab: [plain(lab, **changes)]


def points(prompts: list[str], completions: list[str]) -> list[float]:
    """The checker's."""
    return [float(task.points(p, c)) for p, c in zip(prompts, completions, strict=True)]


def oracle(lab: Lab, round: int) -> ExternalRewardDPOConfig:
    return ExternalRewardDPOConfig(reward_model=points, **shared(lab, round))


def shuffled(lab: Lab, round: int) -> SelfRewardDPOConfig:
    return plain(lab, round, judge=ShuffledJudge())


def expected(lab: Lab) -> list[FinetuneConfig]:
    return [plain(lab, self_reward_config_keyname="expected", min_margin=0.5)]


def cream(lab: Lab) -> list[FinetuneConfig]:
    agreement = ConsistencyConfig(previous=str(lab.halfway), by="judge", over="prompt")
    return [plain(lab, consistency=agreement)]


def meta(lab: Lab) -> list[FinetuneConfig]:
    """The model has never compared two reviews: few of its verdicts can be read."""
    compare = MetaJudgingConfig(
        prompt_template="{{ judge_prompt }}{{ judgement_a }}={{ judgement_b }}:",
        labels=("1", "2"),
        verdict_prefix="Score: ",
        sampling=SAMPLED_REVIEW,
    )
    own = {"judging": SAMPLED_REVIEW, "num_sampled_reward_responses": 3, "meta_judging": compare}
    more = {"num_candidate_responses": 4, "min_parse_rate": 0.0}
    return [MetaRewardDPOConfig(**{**shared(lab, 1), **own, **more})]


def contrastive(lab: Lab) -> list[FinetuneConfig]:
    """The worse side is asked with another instruction's text in front of the prompt."""
    other = task.random_instruction(random.Random(lab.seed)).text
    spoilt = Contrast(positive=" ", negative=f"{other} ", kind="prefix")
    return [ContrastiveDPOConfig(contrasts=[spoilt], **shared(lab, 1))]


def right_answers(lab: Lab) -> list[dict[str, str]]:
    """The round's prompts with right answers, which no other setting sees."""
    rng = random.Random(lab.seed)
    return [
        {"prompt": text, "completion": task.perfect_response(task.Instruction.parse(text), rng)}
        for text in lab.data.round_prompts[0]
    ]


def self_play(rows: Callable[[Lab], list[dict[str, str]]]) -> Callable[[Lab], list[FinetuneConfig]]:
    def stages(lab: Lab) -> list[FinetuneConfig]:
        own = {k: v for k, v in shared(lab, 1).items() if k not in ("prompt_dataset", "dpo_beta")}
        del own["prompts_per_block"]
        return [SelfPlayConfig(train_dataset=rows(lab), spin_lambda=0.3, **own)]

    return stages


def supervised(lab: Lab) -> list[FinetuneConfig]:
    return [SFTConfig(name="round-1", train_dataset=right_answers(lab), dropout=0, optim=LOW)]


def temporal(lab: Lab) -> list[FinetuneConfig]:
    own = {"judging": quickstart.REVIEW, "num_sampled_reward_responses": 1}
    return [TemporalDPOConfig(**{**shared(lab, 1), **own, "rejected_from": str(lab.halfway)})]


def votes(lab: Lab) -> list[FinetuneConfig]:
    judge = VoteJudge(extract=lambda text: text)
    pairing = PairingConfig(min_chosen_score=0.5, weight_by_margin=True)
    return [plain(lab, judge=judge, pairing=pairing)]


def online(reference: Any) -> Callable[[Lab], list[FinetuneConfig]]:
    def stages(lab: Lab) -> list[FinetuneConfig]:
        size = len(lab.data.round_prompts[0]) // 5
        rounds = {"rounds": 5, "prompts_per_round": size, "prompts_per_block": size}
        return [plain(lab, reference=reference, **rounds)]

    return stages


def rewarded(judge: Judge | None = None) -> Callable[[Lab], list[FinetuneConfig]]:
    """Two rounds of the quickstart's policy gradients, on as many answers as `plain`."""

    def stages(lab: Lab) -> list[FinetuneConfig]:
        _, *rounds = quickstart.build_stages(lab.data, "none", method="grpo")
        return [
            stage.model_copy(update={"name": f"round-{number}", "judge": judge})
            for number, stage in enumerate(rounds, 1)
        ]

    return stages


SETTINGS = (
    Setting("plain", "the paper's loop, two rounds", lambda lab: [plain(lab), plain(lab, 2)]),
    Setting(
        "shuffled",
        "control: scores given to other candidates, two rounds",
        lambda lab: [shuffled(lab, 1), shuffled(lab, 2)],
    ),
    Setting(
        "oracle",
        "the checker as judge, two rounds",
        lambda lab: [oracle(lab, 1), oracle(lab, 2)],
    ),
    Setting("nll_off", "DPO without the winner's NLL", one(nll_weight=0.0)),
    Setting("answers_2", "N = 2 answers a prompt", one(num_candidate_responses=2)),
    Setting("answers_8", "N = 8 answers a prompt", one(num_candidate_responses=8)),
    Setting(
        "judgements_1",
        "one review sampled at temperature 1",
        one(judging=SAMPLED_REVIEW, num_sampled_reward_responses=1),
    ),
    Setting(
        "judgements_3",
        "three reviews sampled at temperature 1, averaged",
        one(judging=SAMPLED_REVIEW, num_sampled_reward_responses=3),
    ),
    Setting("expected", "expected score over the digits, margin 0.5", expected),
    Setting(
        "length_control",
        "length control, rho = 0.3",
        one(pairing=PairingConfig(length_control=0.3)),
    ),
    Setting("cream", "label smoothing by agreement with M1 at half of its training", cream),
    Setting("meta", "Meta-Rewarding: judge pairs beside actor pairs, N = 4, 3 reviews", meta),
    Setting(
        "rlcd",
        "RLCD: a blank against another instruction before the prompt; M1 was taught neither",
        contrastive,
    ),
    Setting(
        "spin", "SPIN on right answers to the prompts, which others lack", self_play(right_answers)
    ),
    Setting(
        "spin_known",
        "SPIN on M1's own instruction rows, which it knows",
        self_play(lambda lab: lab.data.instruction_rows),
    ),
    Setting("sft", "SFT on the right answers that `spin` has", supervised),
    Setting("temporal", "worst of M1 at half of its training, best of the next model", temporal),
    Setting("votes", "ScPO: votes over the whole answer, threshold 0.5", votes),
    Setting("online_fixed", "five small rounds, the reference is M1", online("start")),
    Setting(
        "online_moving", "five small rounds, the reference is each round's start", online("round")
    ),
    Setting(
        "online_ema", "five small rounds, an EMA of the policy", online(EMAReference(decay=0.95))
    ),
    Setting(
        "winners",
        "SFT on the top-scored answers in place of pairs",
        lambda lab: [
            SelfRewardSFTConfig(
                judging=quickstart.REVIEW,
                num_sampled_reward_responses=1,
                **{k: v for k, v in shared(lab, 1).items() if k not in ("dpo_beta", "nll_weight")},
            )
        ],
    ),
    Setting("simpo", "SimPO in place of DPO: no reference", one(loss="simpo", dpo_beta=2.0)),
    Setting("grpo", "policy gradients on the own scores, two rounds", rewarded()),
    Setting(
        "grpo_shuffled",
        "control: policy gradients on scores given to other candidates, two rounds",
        rewarded(ShuffledJudge()),
    ),
    Setting(
        "grpo_oracle",
        "policy gradients, the checker as judge, two rounds",
        rewarded(FunctionJudge(points)),
    ),
    Setting(
        "grpo_votes",
        "TTRL: policy gradients on votes over the whole answer, two rounds",
        rewarded(VoteJudge(extract=lambda text: text)),
    ),
    Setting(
        "grpo_certainty",
        "policy gradients on the certainty of the model (KL from uniform), two rounds",
        rewarded(CertaintyJudge()),
    ),
)


def rewards() -> dict[str, Any]:
    """The reward prompts that settings name."""
    own = quickstart.REWARD
    return {"default": own, "expected": own.model_copy(update={"score_mode": "expected"})}


def trainer_of(stages: list, job: Job, model: torch.nn.Module) -> SelfRewardingTrainer:
    return SelfRewardingTrainer(
        model,
        finetune_configs=stages,
        tokenizer=task.Characters(),
        self_reward_prompt_config=rewards(),
        seed=job.seed,
        checkpoints_folder=job.folder(),
        engine=quickstart.ENGINE,
        quiet=True,
    )


def about(job: Job) -> dict[str, Any]:
    """What a result says of itself beside its figures."""
    return {"prompts": PROMPTS}


def first_model(job: Job) -> list[dict]:
    """Train M1, with its weights at half of the way beside; what is measured of it."""
    torch.manual_seed(job.seed)
    model, data = quickstart.build_model(), data_of(job.seed)
    [m1, *_] = quickstart.build_stages(data, "none", job.sft_steps)
    optim = m1.optim.model_copy(update={"checkpoint_every": job.sft_steps // 2})
    trainer_of([m1.model_copy(update={"optim": optim})], job, model)()
    return [measure(model, data)]


def setting_run(setting: Setting, job: Job) -> list[dict]:
    """What is measured after each stage of a setting."""
    torch.manual_seed(job.seed)
    model, data = quickstart.build_model(), data_of(job.seed)
    started = Run.open(job.folder(M1))
    started.load_weights(model, M1)
    halfway = started.stage(M1).path / f"checkpoint-{job.sft_steps // 2}"
    run = trainer_of(setting.stages(Lab(job.seed, data, halfway)), job, model)()
    found = []
    for stage in run.stages:
        run.load_weights(model, stage)
        found.append({"stage": stage, **measure(model, data), **measure_pairs(run, stage)})
    return found


def data_of(seed: int) -> task.TaskData:
    return task.make_data(seed, prompts_per_round=PROMPTS)


def measure(model: torch.nn.Module, data: task.TaskData) -> dict:
    """On held-out prompts, greedily: what the loop never sees."""
    greedy = quickstart.greedy
    prompts, items = data.held_out_prompts, data.held_out_judge_items
    words = greedy(model, prompts, quickstart.BEST_ANSWER)
    scores = [task.points(*pair) for pair in zip(prompts, words, strict=True)]
    reviews = greedy(model, [task.judge_prompt(*item) for item in items], quickstart.REVIEW)
    exact = [r.endswith(f"Score: {task.points(*i)}") for r, i in zip(reviews, items, strict=True)]
    return {
        "accuracy": 100 * sum(score == 5 for score in scores) / len(scores),
        "mean_score": sum(scores) / len(scores),
        "length": sum(map(len, words)) / len(words),
        "judge_exact": 100 * sum(exact) / len(exact),
    }


def measure_pairs(run: Run, stage: str) -> dict:
    """How many pairs there were, and the share in which the checker agrees (ties: half)."""
    truth = []
    for pair in run.pairs(stage):
        if pair.prompt is None or not pair.prompt.startswith("len "):
            continue  # of a judge
        chosen, rejected = (task.points(pair.prompt, t or "") for t in (pair.chosen, pair.rejected))
        truth.append(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0)
    share = 100 * sum(truth) / len(truth) if truth else None
    return {"pairs": len(truth), "pairs_right": share}
