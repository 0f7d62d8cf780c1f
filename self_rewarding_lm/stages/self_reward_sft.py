"""Self-rewarding without pairs: supervised training on the responses that the model rates highest.

arXiv:2401.10020 compares DPO with this, in its ablation on positive examples only.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, model_validator

from self_rewarding_lm.config import Object
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.errors import ConfigError, PairingError
from self_rewarding_lm.judges.make import top_score_of
from self_rewarding_lm.judges.server import ServerJudge
from self_rewarding_lm.records import Candidate, Demonstration, Prompt
from self_rewarding_lm.runs.lines import Joined
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stages.lengths import training_row_lengths
from self_rewarding_lm.stages.pair_maker import JudgedPrompt, PairMaker
from self_rewarding_lm.stages.pairing import DropCounts, learnable, passing, score_filters
from self_rewarding_lm.stages.ranges import total
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.stages.work import Counting, Work
from self_rewarding_lm.training.objectives import SupervisedObjective

CURRENT = "current"
"""The value of fit_from for the weights that sampled the responses."""


class SelfRewardSFTConfig(SelfRewardDPOConfig):
    """Self-rewarding without pairs: SFT on the model's responses that it gave the top score.

    The paper adds such responses to the seed data and fine-tunes the base model again: give the
    seed data as `train_dataset` and `fit_from="initial"`. Learning rate and epochs are those of
    SFTConfig. Settings of pairs (dpo_beta, min_margin, ...) are refused.
    """

    folder_name: ClassVar[str] = "self_reward_sft"
    default_learning_rates: ClassVar[tuple[float, float]] = SFTConfig.default_learning_rates
    default_epochs: ClassVar[int] = SFTConfig.default_epochs
    unused: ClassVar[tuple[str, ...]] = (
        *("dpo_beta", "nll_weight", "loss", "min_margin", "reference"),
        *("rounds", "prompts_per_round", "pairing", "mix_pairs", "consistency"),
        *("is_valid_reward_pair", "pick_paired_rewards_fn"),
    )

    num_generated_preference_pairs: int | None = Field(default=None, ge=1)
    """Responses to train on (the name is that of the DPO stages). None: all that one
    pass over the prompts gives. The paper: 11,254."""
    min_score: float | None = None
    """Least mean score of a response to train on. None: the highest score that the reward prompt
    allows (the paper's 5 of 5); with `comparison`, that of a win against all others."""
    train_dataset: Object = None
    """Further rows to train on, as SFTConfig takes them."""
    fit_from: str = CURRENT
    """Weights that are trained: "current" (those that sampled), "initial" or an earlier stage."""

    @model_validator(mode="after")
    def _no_pairs(self) -> "SelfRewardSFTConfig":
        refused = [name for name in self.unused if name in self.model_fields_set]
        if refused:
            raise ValueError(f"{', '.join(refused)}: for pairs only, and this stage makes none")
        return self

    @property
    def most_of_prompt(self) -> int:
        """The most responses of a prompt that are learnt."""
        return self.num_candidate_responses

    def weights_used(self) -> set[str]:
        return (super().weights_used() | {self.fit_from}) - {CURRENT}

    def check(self, ctx: Context) -> None:
        rows = dict(ctx.rows)
        mixed = rows.pop("train_dataset", None)
        super().check(replace(ctx, rows=rows))
        if mixed is not None:
            self._supervised().check(replace(ctx, rows={"train_dataset": mixed}))
        self.least_score(ctx)

    def run(self, ctx: Context, out: StageDir) -> None:
        """Make demonstrations of top-scored responses; train on them and on `train_dataset`."""
        # 1. sample and judge responses, and keep those with the top score
        demonstrations = self.made(TopMaker, ctx, out)
        # 2. make rows to train on, with the rows of train_dataset after them
        top = Rows(demonstrations, f"{ctx.stage}: top-scored responses")
        supervised = self._supervised()
        rows = supervised.training_rows(ctx, top, f"{ctx.stage}/top", out)
        if "train_dataset" in ctx.rows:
            mixed = supervised.training_rows(ctx, ctx.rows["train_dataset"], ctx.stage, out)
            rows = Joined(rows, mixed)
        # 3. train
        if self.fit_from != CURRENT:
            ctx.load(self.fit_from)
        out.summary |= {"demonstrations": len(demonstrations), "rows": len(rows)}
        out.summary["steps"] = self.fit(ctx, out, SupervisedObjective(rows))

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        judged, _ = self.for_rehearsal(TopMaker, ctx, out).rehearse()
        demonstration = _demonstration(judged.prompt, judged.candidates[0])
        top = Rows((demonstration,), "the rehearsed response")
        supervised = self._supervised()
        if "train_dataset" in ctx.rows:
            supervised.training_rows(ctx, ctx.rows["train_dataset"], ctx.stage, out)
        rows = supervised.training_rows(ctx, top, f"{ctx.stage}/top", out)
        self.try_fit(ctx, out, SupervisedObjective(rows))

    def work(self, counting: Counting) -> Work:
        work = self.sampled_work(counting, answers=1)
        if self.train_dataset is None or work.training is None:
            return work
        data = counting.data(self.train_dataset, training_row_lengths)
        row, limit = work.training.row, counting.limit(self.max_seq_len)
        data_row = counting.row(self.train_dataset, data, 1).capped(limit)
        training = self.planned_training(work.made + data.rows, row.beside(data_row))
        if self.num_train_steps is None:
            parts = (work.training, self.planned_training(data.rows, data_row))
            training = replace(training, tokens=total(part.tokens for part in parts))
        return replace(work, training=training)

    def least_score(self, ctx: Context) -> float:
        """The least mean score of a response that is trained on.

        Raises ConfigError if `min_score` is None and the judge's top score is not known.
        """
        if self.min_score is not None:
            return self.min_score
        tops: set[float | None] = {None}
        asks_with_rewards = isinstance(self.rewarding_model, ServerJudge) or not hasattr(
            self.rewarding_model, "judge"
        )
        if self.unshuffled_judge is None and asks_with_rewards:
            rewards = self._rewards(ctx).values()
            tops = {1.0} if self.comparison is not None else set(map(top_score_of, rewards))
        top = tops.pop()
        if top is None or tops:
            raise ConfigError(
                f"{ctx.stage}: the top score is not known (a judge of your own, a reward prompt "
                "without score_range and allowed_scores, or several with different ones); give "
                "min_score."
            )
        return top

    def _supervised(self) -> SFTConfig:
        """The supervised stage whose rows this stage trains on."""
        return SFTConfig(
            train_dataset=self.train_dataset,
            max_seq_len=self.max_seq_len,
            on_bad_row=self.on_bad_row,
            checks=self.checks,
        )


class TopMaker(PairMaker):
    """Makes a demonstration of each candidate with the top score."""

    record_type: ClassVar[type[Any]] = Demonstration
    noun: ClassVar[str] = "top-scored response"
    config: SelfRewardSFTConfig

    def learnable(self, judged: JudgedPrompt, drops: DropCounts) -> list[Candidate]:
        return learnable(judged.candidates, drops, least=1)

    def pair(self, judged: JudgedPrompt, drops: DropCounts) -> list[Demonstration]:
        candidates = self.usable_candidates(judged, drops, least=1)
        if not candidates:
            return []
        top = top_scored(
            candidates,
            self.judge.scores(candidates, judged.judgements),
            drops,
            min_score=self.config.least_score(self.ctx),
            is_valid_score=self.config.is_valid_reward,
        )
        return [_demonstration(judged.prompt, candidate) for candidate in top]

    def nothing_made(self, prompts: str, drops: DropCounts) -> Exception:
        return PairingError(
            f"{self.ctx.stage}: no response to {prompts} has the top score of "
            f"{self.config.least_score(self.ctx):g}. Dropped: {drops.in_words()}. Lower min_score, "
            "sample more candidates, or train the model on judge examples first. The records are "
            f"in {self.out.path}."
        )


def top_scored(
    candidates: Sequence[Candidate],
    scores: dict[str, float | None],
    drops: DropCounts,
    *,
    min_score: float,
    is_valid_score: Any = None,
) -> list[Candidate]:
    """Candidates with a score of at least `min_score`, each text once; `drops` counts the others.

    If no candidate remains, the prompt is counted as `unfinished`, `unscored`, `invalid_score` or
    `low_score`: the first of these filters that leaves none.
    """
    filters = {
        **score_filters(scores, is_valid_score),
        "low_score": lambda c: scores[c.id] >= min_score,  # type: ignore[operator]
        "identical": first_of_each_text(),
    }
    top = passing(candidates, filters, drops, least=1)
    drops.kept += len(top)
    return top


def first_of_each_text() -> Callable[[Candidate], bool]:
    """A filter that passes only the first response of each text (of each ids if it has none)."""
    seen: set[Any] = set()

    def is_new(candidate: Candidate) -> bool:
        text = candidate.ids if candidate.text is None else candidate.text.strip()
        was_seen = text in seen
        seen.add(text)
        return not was_seen

    return is_new


def _demonstration(prompt: Prompt, candidate: Candidate) -> Demonstration:
    """The record that a response to a prompt is trained on as; its id is the candidate's."""
    return Demonstration(
        id=candidate.id,
        prompt_ids=prompt.ids,
        completion_ids=candidate.ids,
        prompt=prompt.text,
        completion=candidate.text,
        parents=(prompt.id, candidate.id),
        messages=prompt.messages,
    )
