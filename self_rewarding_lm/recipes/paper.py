"""The stages of the paper's loop, as lists: with its numbers, or with other ones.

Knows the stages and the paper's numbers; nothing of models, tokenizers or files.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from self_rewarding_lm.config import Config, FinetuneConfig, OptimConfig, SamplingConfig, from_stage
from self_rewarding_lm.data.datasets import is_concatenation
from self_rewarding_lm.errors import ConfigError, typed
from self_rewarding_lm.stages.eft import BuildEFTConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.self_reward_sft import SelfRewardSFTConfig
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.text import amount

PAPER_PAIRS = (3964, 6942)
"""Preference pairs of the two rounds (arXiv:2401.10020, 3.1.3)."""


@typed
def paper_recipe(
    *,
    ift: Any,
    prompts: Any,
    ranked: Any = None,
    valid_ift: Any = None,
    iterations: int = 2,
    num_generated_preference_pairs: int | tuple[int, ...] | list[int] | None = None,
    num_candidate_responses: int = 4,
    num_sampled_reward_responses: int = 3,
    temperature: float = 0.7,
    top_p: float | None = 0.9,
    max_new_tokens: int = 256,
    sft_learning_rates: tuple[float, float] = (5.5e-6, 1.1e-6),
    dpo_learning_rates: tuple[float, float] = (1e-6, 1e-7),
    sft_epochs: int | None = None,
    dpo_epochs: int | None = None,
    batch_size: int = 16,
    dropout: float = 0.1,
    dpo_beta: float = 0.1,
    early_stopper_eval_module: Any = None,
    eval_every: int = 200,
    positive_only: bool = False,
    sft: Mapping[str, Any] = {},
    eft: Mapping[str, Any] = {},
    self_reward: Mapping[str, Any] = {},
) -> list[FinetuneConfig]:
    """The stages of arXiv:2401.10020: M0 -> baseline -> EFT -> M1 -> M2 -> M3.

    `sft_baseline`: M0 on the instruction rows. `eft`: the baseline writes judgements of the
    human-ranked replies. `m1`: M0 again, on the instruction rows and those judgements. `m2`, `m3`:
    the model answers new prompts, judges its responses and is trained on best against worst by DPO.
    Sections in brackets are the paper's.

    ift: Instruction rows with a human response, 3,200 in the paper (3.1.1).
    prompts: New prompts: one dataset for all rounds, a tuple with one for each, or SelfInstruct.
    ranked: Replies ranked by people, for EFT (3.1.1). None: no EFT, and m1 is trained on the
        instruction rows alone, without a baseline before it (the ablation of 3.2).
    valid_ift: Held-out instruction rows; their loss is logged.
    iterations: Rounds of self-rewarding after m1 (3.1.3).
    num_generated_preference_pairs: Pairs of each round; the last of several numbers holds for all
        further rounds. None: the paper's 3,964 and 6,942 (3.1.3) if one pass over the prompts can
        give them, else what one pass gives.
    num_candidate_responses: Responses sampled to each prompt, N (3.1.3).
    num_sampled_reward_responses: Judgements of each response, averaged (3.1.3). temperature:
    Temperature of sampled responses and judgements (3.1.3). top_p: Top-p of sampled responses and
    judgements (3.1.3). max_new_tokens: Most tokens of a response and of a judgement; ours, the
    paper does not say. sft_learning_rates: At the first and the last step of supervised stages,
    cosine (3.1.3). dpo_learning_rates: At the first and the last step of the rounds, cosine
    (3.1.3). sft_epochs: Passes over the rows of supervised stages. Default: the stage's, 3 (ours).
    dpo_epochs: Passes over the pairs of a round. Default: the stage's, 1 (ours). batch_size: Rows
    or pairs of an optimiser step (3.1.3). dropout: In training (3.1.3), of adapters too. dpo_beta:
    Of DPO (3.1.3). early_stopper_eval_module: A module or function of the model -> one number,
    called every eval_every steps of a round; training stops when it no longer rises. None: no early
    stopping. The paper stopped by a judge's comparison on 253 prompts (3.1.3). eval_every: Steps
    between these checks (3.1.3). positive_only: In place of DPO, M0 is trained anew in each round,
    on the seed data and the
        responses with the top score (the comparison of 3.2).
    sft: Further settings of the supervised stages, over all of the above.
    eft: Further settings of the EFT stage.
    self_reward: Further settings of the rounds.

    Raises ConfigError if a setting is unknown or out of its range.
    """
    if iterations < 0:
        raise ConfigError(f"iterations must be 0 or more; got {iterations}.")

    # 1. the stages up to m1
    sampling = SamplingConfig(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    supervised = _merged(
        {
            "valid_dataset": valid_ift,
            "dropout": dropout,
            "optim": _optim(sft_learning_rates, sft_epochs, batch_size, eval_every),
        },
        sft,
    )
    stages = _stages_to_m1(ift, ranked, supervised, _merged({"judging": sampling}, eft))

    # 2. what all rounds of self-rewarding share
    common = {
        "num_candidate_responses": num_candidate_responses,
        "num_sampled_reward_responses": num_sampled_reward_responses,
        "generation": sampling,
        "judging": sampling,
        "dropout": dropout,
        "early_stopper_eval_module": early_stopper_eval_module,
    }
    if positive_only:
        common |= {"train_dataset": _seed_data(ift, ranked), "fit_from": "initial"}
        common["optim"] = _optim(sft_learning_rates, sft_epochs, batch_size, eval_every)
    else:
        common["dpo_beta"] = dpo_beta
        common["optim"] = _optim(dpo_learning_rates, dpo_epochs, batch_size, eval_every)

    # 3. the rounds, m2 and on
    rounds = _rounds(
        prompts,
        _counts_by_round(num_generated_preference_pairs, iterations),
        _merged(common, self_reward),
        gives_way=num_generated_preference_pairs is None,
        names=[f"m{i + 2}" for i in range(iterations)],
        kind=SelfRewardSFTConfig if positive_only else SelfRewardDPOConfig,
    )
    return [*stages, *rounds]


@typed
def create_default_paper_config(
    *,
    train_sft_dataset: Any,
    self_reward_prompt_dataset: Any,
    valid_sft_dataset: Any = None,
    num_generated_preference_pairs: tuple[int, ...] | None = None,
    early_stopper_eval_module: Any = None,
    dpo_num_train_steps: int | None = None,
    sft_config: dict[str, Any] = {},  # noqa: B006 - read only
    self_reward_config: dict[str, Any] = {},  # noqa: B006 - read only
) -> list[FinetuneConfig]:
    """M0 -> SFT -> M1 -> self-reward DPO -> M2 -> self-reward DPO -> M3 (arXiv:2401.10020).

    `paper_recipe` has the paper's EFT step too. self_reward_prompt_dataset: one dataset for all
    rounds, or a tuple with one for each. num_generated_preference_pairs: a number for each round;
    default two rounds with the paper's 3,964 and 6,942 (3.1.3) if one pass over the prompts can
    give them, else what one pass gives. dpo_num_train_steps: optimiser steps of a round; default:
    one epoch. sft_config and self_reward_config: further settings of SFTConfig and
    SelfRewardDPOConfig.
    """
    common = {
        "num_train_steps": dpo_num_train_steps,
        "early_stopper_eval_module": early_stopper_eval_module,
    }
    counts = num_generated_preference_pairs
    gives_way, counts = counts is None, PAPER_PAIRS if counts is None else counts
    data = {"train_dataset": train_sft_dataset, "valid_dataset": valid_sft_dataset}
    return [
        SFTConfig(**_merged(data, sft_config)),
        *_rounds(
            self_reward_prompt_dataset,
            counts,
            _merged(common, self_reward_config),
            gives_way=gives_way,
        ),
    ]


def _stages_to_m1(
    ift: Any, ranked: Any, supervised: dict[str, Any], eft: dict[str, Any]
) -> list[FinetuneConfig]:
    """From M0 to M1; if there are ranked replies, by way of the baseline and its judgements."""
    if ranked is None:
        return [SFTConfig(**_merged({"name": "m1", "train_dataset": ift}, supervised))]
    m1 = {"name": "m1", "init_from": "initial", "train_dataset": _seed_data(ift, ranked)}
    return [
        SFTConfig(**_merged({"name": "sft_baseline", "train_dataset": ift}, supervised)),
        BuildEFTConfig(**_merged({"name": "eft", "ranked_dataset": ranked}, eft)),
        SFTConfig(**_merged(m1, supervised)),
    ]


def _seed_data(ift: Any, ranked: Any) -> Any:
    """The rows that m1 is trained on."""
    if ranked is None:
        return ift
    return [*(ift if is_concatenation(ift) else [ift]), from_stage("eft")]


def paper_config_of(settings: Mapping[str, Any]) -> list[FinetuneConfig]:
    """`create_default_paper_config(**settings)`; ConfigError for names that it does not take."""
    known = signature(create_default_paper_config).parameters
    unknown = [name for name in settings if name not in known]
    missing = [n for n, p in known.items() if p.default is p.empty and n not in settings]
    if unknown or missing:
        words = f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
        raise ConfigError(
            f"finetune_configs=dict(...) takes what create_default_paper_config takes: "
            f"{', '.join(known)}. Of what was given, {words}."
        )
    return create_default_paper_config(**settings)


def _rounds(
    prompts: Any,
    counts: Sequence[int],
    settings: dict[str, Any],
    *,
    gives_way: bool,
    names: Sequence[str] | None = None,
    kind: type[FinetuneConfig] = SelfRewardDPOConfig,
) -> list[FinetuneConfig]:
    """Self-rewarding stages, one for each count of pairs.

    prompts: as in paper_recipe. gives_way: whether counts are the paper's, which give way to few
    prompts, unless `settings` has another.
    """
    if not isinstance(prompts, tuple):
        prompts = (prompts,) * len(counts)
    if len(prompts) != len(counts):
        raise ConfigError(
            "prompts as a tuple are one dataset a round: "
            f"the tuple has {len(prompts)} for {amount(len(counts), 'round')}."
        )
    stages: list[FinetuneConfig] = []
    for place, (dataset, count) in enumerate(zip(prompts, counts, strict=True)):
        of_round = {"prompt_dataset": dataset, "num_generated_preference_pairs": count}
        if gives_way and "num_generated_preference_pairs" not in settings:
            of_round["unless_few_prompts"] = True
        if names is not None:
            of_round["name"] = names[place]
        stages.append(kind(**_merged(of_round, settings)))
    return stages


def _counts_by_round(counts: int | Sequence[int] | None, rounds: int) -> tuple[int, ...]:
    """A count for each round; the last one for all further rounds."""
    if counts is None:
        counts = PAPER_PAIRS
    if isinstance(counts, int):
        counts = (counts,)
    if not counts:
        raise ConfigError("num_generated_preference_pairs is empty; give at least one number.")
    return tuple(counts[min(i, len(counts) - 1)] for i in range(rounds))


def _optim(
    rates: tuple[float, float], epochs: int | None, batch_size: int, eval_every: int
) -> OptimConfig:
    return OptimConfig(
        learning_rate=rates[0],
        final_learning_rate=rates[1],
        epochs=epochs,
        batch_size=batch_size,
        eval_every=eval_every,
    )


def _merged(defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `defaults`; of nested settings only those that `changes` names change."""
    merged = dict(defaults)
    for name, value in changes.items():
        default = merged.get(name)
        if isinstance(default, Config) and isinstance(value, Mapping | Config):
            nested = value if isinstance(value, Mapping) else _set_fields(value)
            value = type(default)(**{**_set_fields(default), **nested})
        merged[name] = value
    return merged


def _set_fields(config: Config) -> dict[str, Any]:
    """The settings that whoever made a configuration named."""
    return {name: getattr(config, name) for name in config.model_fields_set}
