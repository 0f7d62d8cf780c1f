"""The settings of the study: each a name, what is said of it, and the stages behind M1.

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

from self_rewarding_lm import (
    ConsistencyConfig,
    Contrast,
    ContrastiveDPOConfig,
    EMAReference,
    ExternalRewardDPOConfig,
    FinetuneConfig,
    MetaJudgingConfig,
    MetaRewardDPOConfig,
    OptimConfig,
    PairingConfig,
    SamplingConfig,
    SelfPlayConfig,
    SelfRewardDPOConfig,
    SelfRewardSFTConfig,
    SFTConfig,
    ShuffledJudge,
    TemporalDPOConfig,
    VoteJudge,
)

LOW = OptimConfig(learning_rate=4e-4, batch_size=32, betas=(0.9, 0.95), epochs=2)
SAMPLED_REVIEW = SamplingConfig(temperature=1.0, top_p=None, max_new_tokens=32)


@dataclass(frozen=True)
class Lab:
    """What a seed's settings share: its data, and weights on the way to M1."""

    seed: int
    data: task.TaskData
    halfway: Path
    """Weights of M1 at half of its training: the earlier model of CREAM."""


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    words: str
    stages: Callable[[Lab], list[FinetuneConfig]]


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


def oracle(lab: Lab, round: int) -> ExternalRewardDPOConfig:
    def points(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(task.points(p, c)) for p, c in zip(prompts, completions, strict=True)]

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
)


def rewards() -> dict[str, Any]:
    """The reward prompts that settings name."""
    own = quickstart.REWARD
    return {"default": own, "expected": own.model_copy(update={"score_mode": "expected"})}
