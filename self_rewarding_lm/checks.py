"""Named checks of numbers that go wrong: the limit of each, and what happens beyond it.

Knows numbers and names, not what a number was measured on. docs/troubleshooting.md has a line for
each check.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field, model_validator

from self_rewarding_lm.config import Config
from self_rewarding_lm.errors import (
    DataError,
    JudgeError,
    PairingError,
    SelfRewardingError,
    TrainingError,
)

logger = logging.getLogger(__name__)


PAGE = "docs/troubleshooting.md"


NAMED = 16  # records that an error names


ALWAYS = {
    "not_finite": "logits, a loss, a gradient or a reference log-prob that is no finite number",
    "min_parse_rate": "the share of judgements with a score; a setting of its own",
    "template_differs": "weights that were saved with another chat template; a warning",
}
"""Checks that have no entry in ChecksConfig, and what they look at."""


class Check(Config):
    """A limit and what happens beyond it. None takes the check's own default."""

    limit: float | None = Field(default=None, ge=0)
    """The limit beyond which the check acts; what it limits is said in ChecksConfig."""
    action: Literal["warn", "error", "off"] | None = None
    """"warn" logs a warning once, "error" stops the stage, "off" does nothing."""


class ChecksConfig(Config):
    """Limits for numbers that go wrong, a setting of every stage that trains.

    Checks change no results, so they may differ when a run is resumed. docs/troubleshooting.md says
    what each means and what to do. Defaults are ours.
    """

    scores_not_finite: Check = Check(limit=0.0, action="error")
    """Share of judgements whose score is NaN or infinite, over the limit; they are stored as None
    with "warn" and "off"."""
    one_score: Check = Check(limit=0.95, action="warn")
    """Share of the commonest score (judge/modal_share) over the limit, from 64 judgements on."""
    ties: Check = Check(limit=0.9, action="warn")
    """Share of prompts whose best and worst candidate have the same score (judge/tie_rate) over the
    limit, from 64 prompts on."""
    follows_position: Check = Check(limit=0.1, action="warn")
    """Share of comparisons with one verdict in both orders (judge/position_agreement) under the
    limit, from 64 on: the judge prefers a place, whichever response is shown there."""
    meta_follows_scores: Check = Check(limit=0.95, action="warn")
    """Share of the meta-judge's verdicts for the judgement with the higher score
    (meta/prefers_higher_score) over the limit, from 64 on."""
    few_pairs: Check = Check(limit=1.0, action="warn")
    """Pairs as a share of num_generated_preference_pairs, under the limit."""
    pairs_per_prompt: Check = Check(limit=0.1, action="warn")
    """Pairs per prompt that was sampled, under the limit."""
    cut_off: Check = Check(limit=0.3, action="warn")
    """Share of responses that were cut off (completions/clipped_ratio), over the limit."""
    repeated_prompts: Check = Check(limit=2.0, action="warn")
    """Times that a round uses each prompt, over the limit."""
    identical_pairs: Check = Check(limit=0.5, action="warn")
    """Share of contrasts whose two responses are the same (contrast/identical_rate) over the limit,
    from 64 on."""
    equal_after_cut: Check = Check(limit=0.0, action="warn")
    """Share of pairs whose two responses are equal once cut to max_seq_len, over the limit."""
    rows_truncated: Check = Check(limit=0.0, action="warn")
    """Share of sequences that max_seq_len cut, over the limit."""
    few_steps: Check = Check(limit=10, action="warn")
    """Optimiser steps of the stage, under the limit."""
    lost_updates: Check = Check(limit=0.5, action="warn")
    """Share of weights that a step of the learning rate does not change, over the limit."""
    accuracy_at_start: Check = Check(limit=0.99, action="warn")
    """rewards/accuracies at step 1, of 8 pairs or more, over the limit."""
    loss_stuck: Check = Check(limit=20, action="warn")
    """Consecutive steps whose DPO loss is 0.693, over the limit."""
    both_fall: Check = Check(limit=0.5, action="warn")
    """What the chosen responses lost, as a share of rewards/margins, over ten steps."""

    @model_validator(mode="after")
    def _are_shares(self) -> "ChecksConfig":
        for name in type(self).model_fields:
            limit = self.of(name)[0]
            if limit > 1 and name not in _MAY_EXCEED_ONE:
                raise ValueError(f"{name}: its limit is a share, 0 to 1; got {limit:g}")
        return self

    def of(self, name: str) -> tuple[float, str]:
        """A check's limit and action; the check's own default for each that is None."""
        check, default = getattr(self, name), type(self).model_fields[name].default
        limit = default.limit if check.limit is None else check.limit
        return limit, check.action or default.action


_MAY_EXCEED_ONE = ("pairs_per_prompt", "repeated_prompts", "few_steps", "loss_stuck", "both_fall")


_UNDER = ("few_pairs", "pairs_per_prompt", "few_steps", "follows_position")
"""Checks whose limit is a least value; that of all others is a greatest."""


_ERRORS: dict[str, type[SelfRewardingError]] = {
    **dict.fromkeys(
        ("scores_not_finite", "one_score", "ties", "follows_position", "meta_follows_scores"),
        JudgeError,
    ),
    **dict.fromkeys(
        (
            *("few_pairs", "pairs_per_prompt", "repeated_prompts"),
            *("identical_pairs", "equal_after_cut", "cut_off"),
        ),
        PairingError,
    ),
    "rows_truncated": DataError,
}
"""Check -> the error that it raises; all others raise TrainingError."""


OFF = ChecksConfig(**{name: Check(action="off") for name in ChecksConfig.model_fields})
"""All checks off: for trials on a few rows, which say nothing about the whole dataset."""


def not_finite(where: str, seen: str, records: Sequence[str], advice: str) -> TrainingError:
    """The error of numbers that are NaN or infinite.

    where: stage and step. seen: which numbers, as a clause. records: ids of those they belong to.
    advice: what to do, as sentences.
    """
    names = ", ".join(records[:NAMED]) or "unknown"
    more = f" and {len(records) - NAMED} more" if len(records) > NAMED else ""
    return TrainingError(
        f"{where}: {seen}. In: {names}{more}. {advice} (check not_finite, explained in {PAGE}.)"
    )


class Checker:
    """Compares the numbers of one stage with the limits; each check warns or fails once.

    warns: whether this process logs warnings (one of several does). tell: called with each warning,
    to keep it; such as StageDir.tell.
    """

    def __init__(
        self,
        checks: ChecksConfig | None,
        stage: str,
        *,
        warns: bool = True,
        tell: Callable[..., None] | None = None,
    ) -> None:
        self.checks, self.stage, self.warns = checks or ChecksConfig(), stage, warns
        self.tell = tell
        self._said: set[str] = set()

    def see(self, name: str, seen: float, words: str) -> None:
        """Warn or raise if a number is beyond its limit.

        seen: the number. words: what was seen and what to do, as sentences. Raises the error of the
        check's kind: JudgeError, PairingError, DataError or TrainingError.
        """
        message = self.failing(name, seen, words)
        if message is not None:
            raise _ERRORS.get(name, TrainingError)(message)

    def failing(self, name: str, seen: float, words: str) -> str | None:
        """As `see`, but returns the error's message; None if nothing fails."""
        limit, action = self.checks.of(name)
        beyond = seen < limit if name in _UNDER else seen > limit
        if not beyond or action == "off" or name in self._said:
            return None
        self._said.add(name)
        side = "at least" if name in _UNDER else "at most"
        message = (
            f"{self.stage}: {words} (check {name}: {seen:.4g}, and {side} {limit:.4g} is expected; "
            f"set by checks.{name}, explained in {PAGE}.)"
        )
        if action == "error":
            return message
        if self.warns:
            logger.warning("%s", message)
        if self.tell is not None:
            self.tell("warning", check=name, seen=seen, limit=limit, words=words)
        return None
