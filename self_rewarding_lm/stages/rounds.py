"""A stage that makes its pairs in rounds: sample, judge, pair, train, and again with new weights.

Online DPO and OAIF (arXiv:2402.04792) are this with few prompts a round. Optimisers, a reference
that moves and the schedule of the learning rate go through all rounds as if they were one training.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import NoPairError, StoreError
from self_rewarding_lm.records import PreferencePair
from self_rewarding_lm.store import StageDir
from self_rewarding_lm.training_state import Kept

if TYPE_CHECKING:
    from self_rewarding_lm.stages.sampled import SampledPreferenceConfig

logger = logging.getLogger(__name__)


def work_rounds(stage: "SampledPreferenceConfig", ctx: Context, out: StageDir) -> None:
    """All rounds of a stage.

    A stage that was stopped in the training of a round goes on from its state: what earlier rounds
    made is read from disk. Without a state all rounds are trained again, from their records. Raises
    NoPairError where no round has a pair.
    """
    kept, pairs, steps, empty = Kept(stage.rounds), 0, 0, list[int]()
    if stage.rounds > 1 and stage.reference_from_start():
        ctx = replace(ctx, start=ctx.model.state())
    state = out.state_words() if stage.rounds > 1 else None
    standing, place = 0 if state is None else state["round"], ctx.first_prompt
    for round in range(stage.rounds):
        now = stage.for_round(round)
        out.first_step = steps
        out.marks = {"round": round} if stage.rounds > 1 else {}
        here = replace(ctx, first_prompt=place)
        if 0 < round <= standing:  # the model has not the weights of this round
            here = replace(here, engine=_Nobody(), policy=_NoPolicy())
        try:
            made = _made(now, here, out, round)
            objective = now.objective(here, out, made, round=round)
        except NoPairError as error:
            empty.append(round)
            if len(empty) == stage.rounds:
                raise
            words = "%s: round %d of %d is left out: %s"
            logger.warning(words, ctx.stage, round + 1, stage.rounds, error)
            continue
        finally:
            place = out.summary.get("next_prompt", place)
        pairs += len(made)
        if round < standing:
            steps += now.planned_steps(len(objective))
        else:
            steps += now.fit(ctx, out, objective, round=round, first_step=steps, kept=kept)
    out.summary |= {"pairs": pairs, "steps": steps}
    if stage.rounds > 1:
        out.summary |= {"rounds": stage.rounds, "rounds_without_pairs": len(empty)}


def _made(
    stage: "SampledPreferenceConfig", ctx: Context, out: StageDir, round: int
) -> Sequence[PreferencePair]:
    """The pairs of a round."""
    pairs = stage.trained(ctx, out, stage.made(stage.maker, ctx, out))
    if stage.rounds > 1:
        found = out.summary["metrics"]
        words = [f"{len(pairs)} pairs"]
        for name, label in (("judge/score_mean", "score"), ("completions/mean_length", "length")):
            if found.get(name) is not None:
                words.append(f"mean {label} {found[name]:.4g}")
        said = ", ".join(words)
        logger.info("%s: round %d of %d: %s", ctx.stage, round + 1, stage.rounds, said)
    return pairs


def _gone(*_: Any, **__: Any) -> NoReturn:
    raise StoreError(
        "records of a round that was trained are not there any more, and the weights that made "
        "them are gone. Put the files back, or delete state.safetensors in the stage's folder to "
        "train it again from its start."
    )


class _Nobody:
    """The engine of a round that was trained: all of its records are there."""

    generate = chances = staticmethod(_gone)

    def serving(self, save: Any, tokens: Any) -> Any:
        return nullcontext()


class _NoPolicy(nn.Module):
    """Its policy."""

    def forward(self, *_: Any) -> NoReturn:
        _gone()
