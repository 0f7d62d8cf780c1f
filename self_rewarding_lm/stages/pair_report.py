"""What a maker reports of its prompts: metrics, a line of the log, and too few pairs."""

import logging
from typing import TYPE_CHECKING, Any

from self_rewarding_lm.pairing import DropCounts
from self_rewarding_lm.tally import together

if TYPE_CHECKING:
    from self_rewarding_lm.stages.pair_maker import PairMaker

logger = logging.getLogger(__name__)


def report_made(maker: "PairMaker", drops: DropCounts, wanted: int | None) -> None:
    """Log what all processes sampled, judged, kept and dropped.

    wanted: how many were asked for, None for all. Raises the maker's error where nothing was made.
    """
    ctx, out, noun = maker.ctx, maker.out, maker.noun
    tally = together(ctx.runtime.gather([maker.tally]))
    metrics: dict[str, Any] = {**tally.metrics(), **drops.metrics()}
    out.log({"step": out.first_step, **metrics})
    out.summary["metrics"] = metrics
    logger.info(
        "%s: %d prompts, %d candidates, %d judgements, %d %ss; dropped: %s",
        ctx.stage,
        tally.prompts,
        tally.candidates,
        tally.judgements,
        drops.kept,
        noun,
        drops.in_words(),
    )
    if drops.kept == 0:
        raise maker._nothing_made(tally.prompts, drops)
    made = drops.kept + drops.prompts["surplus"]
    maker.checker.see(
        "pairs_per_prompt",
        made / max(1, tally.prompts),
        f"{tally.prompts} prompts gave {made} {noun}s; dropped: {drops.in_words()}. The most "
        "frequent reason says what to change.",
    )
    if wanted is not None:
        maker.checker.see(
            "few_pairs",
            drops.kept / wanted,
            f"{drops.kept} {noun}s instead of {wanted} after max_prompt_passes over the "
            f"prompts; dropped: {drops.in_words()}. Give more prompts or passes, or change "
            "what the most frequent reason says; training goes on with these by default.",
        )
