"""The verdict on a run, in two or three sentences.

Reads metrics and counts prompts; reads no other record. Limits are those of the checks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from self_rewarding_lm.checks import ChecksConfig
from self_rewarding_lm.records import Prompt
from self_rewarding_lm.report.figures import StageFigures, stage_figures
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.text import amount

SHOWN = 3
"""Stages of which a verdict speaks, the last ones."""


STOPPED = 200
"""Characters of the error that stopped a stage."""


LEAST_PARSED = 0.5
"""Under this share of judgements with a score the verdict speaks of it."""


@dataclass(frozen=True)
class Made:
    """What a stage made of its prompts: so many of what `noun` is the word for.

    rows: different rows among the prompts. cut: the share of responses that were cut off. steps:
    optimiser steps. parsed: the share of judgements with a score. commonest: the share of the
    commonest score. tied: the share of prompts whose best and worst score are equal. agreed: the
    share of comparisons with one verdict in both orders. too_long: the share of judgements without
    a score because what the judge reads is longer than its model takes. None: unknown. shuffled:
    whether the scores were moved to other responses by chance, as a control.
    """

    name: str
    noun: str
    pairs: int
    prompts: int
    rows: int
    steps: int
    cut: float | None
    parsed: float | None
    commonest: float | None
    tied: float | None
    agreed: float | None
    too_long: float | None
    shuffled: bool

    @property
    def trains_too_little(self) -> bool:
        """Whether so few steps were taken that the model is hardly another one."""
        return self.pairs == 0 or self.steps < ChecksConfig().of("few_steps")[0]

    @property
    def was_cut(self) -> bool:
        return self.cut is not None and self.cut > ChecksConfig().of("cut_off")[0]

    @property
    def tells_nothing(self) -> bool:
        """Whether nearly all scores are one."""
        limit = ChecksConfig().of("one_score")[0]
        return self.commonest is not None and self.commonest > limit

    @property
    def is_poor(self) -> bool:
        """Whether responses or judgements are such that a setting should be changed."""
        return self.was_cut or self.tells_nothing or self.follows_position or self.is_unread

    @property
    def follows_position(self) -> bool:
        """Whether hardly any comparison has one verdict in both orders."""
        limit = ChecksConfig().of("follows_position")[0]
        return self.agreed is not None and self.agreed < limit

    @property
    def is_unread(self) -> bool:
        """Whether most judgements have no score."""
        return self.parsed is not None and self.parsed < LEAST_PARSED


def verdict(run: Run) -> list[str]:
    """Two or three sentences about a run, which may still be going on; [] before it has numbers.

    What the last stages made, how their judge judged, what held-out measures say, and whether
    anything can be concluded.
    """
    figures = [stage_figures(run, name, records=False) for name in run.stages]
    made = [one for stage in figures if (one := _made(run, stage)) is not None][-SHOWN:]
    sentences = [*_supervised(figures)] if not made else []
    if made:
        sentences.append("; ".join(map(_in_words, made)) + ".")
        sentences += _judging(made[-1])
    sentences += _held_out(figures)
    poor = [one for one in made if one.trains_too_little]
    if poor:
        names = " and ".join(one.name for one in poor)
        sentences.append(f"Nothing can be concluded from {names}: {_advice(poor)}.")
    elif any(one.is_poor for one in made):
        sentences.append(f"This can be better: {_advice(made)}.")
    unfinished = next((stage for stage in figures if stage.state != "done"), None)
    if unfinished is not None and (sentences or unfinished.stopped):
        name, stopped = unfinished.name, unfinished.stopped
        words = f"{name} is not done"
        if stopped:
            kind, _, told = stopped.partition(": ")
            error = (told.removeprefix(f"{name}: ").splitlines() or [kind])[0]
            words = f"{name} stopped: {error.partition('. ')[0][:STOPPED]}".rstrip(".")
        sentences.append(f"{words}.")
    return sentences


def _made(run: Run, figures: StageFigures) -> Made | None:
    """What a stage made; None if it makes no pairs or has not counted them yet."""
    data, summary = figures.data, run.summary(figures.name)
    lines = run.metrics(figures.name)
    if not any("completions/clipped_ratio" in line for line in lines):
        return None
    kept = [line["pairs/kept"] for line in lines if "pairs/kept" in line]
    graded = [line["responses/kept"] for line in lines if "responses/kept" in line]
    noun, kept = ("response", graded) if graded else ("pair", kept)
    ids = [name for name in run.stage(figures.name).stored(Prompt).ids() if name.count("/") == 2]
    last = {key: value for line in lines for key, value in line.items()}
    return Made(
        figures.name,
        noun,
        int(sum(kept) if summary.get("rounds") else kept[-1] if kept else 0),
        len(ids),
        len({name.split("/")[1] for name in ids}),
        int(summary.get("steps", figures.counts.get("steps", 0))),
        *(last.get(key, data.get(key)) for key in MEASURES),
        shuffled=_is_shuffled(run.settings(figures.name).get("settings") or {}),
    )


def _is_shuffled(settings: dict[str, Any]) -> bool:
    """Whether the judge of a stage with these settings is a ShuffledJudge."""
    return str(settings.get("judge")).endswith(".ShuffledJudge")


MEASURES = (
    "completions/clipped_ratio",
    "judge/parse_rate",
    "judge/modal_share",
    "judge/tie_rate",
    "judge/position_agreement",
    "judge/too_long",
)
"""Of the last round: cut, parsed, commonest, tied, agreed, too_long."""


def _in_words(made: Made) -> str:
    different = f" ({made.rows:,} different)" if made.rows < made.prompts else ""
    source = f" from {amount(made.prompts, 'prompt')}{different}" if made.prompts else ""
    cut = "" if made.cut is None else f", {percent(made.cut)} of the responses were cut off"
    return (
        f"{made.name}: {amount(made.pairs, made.noun)}{source}{cut}, {amount(made.steps, 'step')}"
    )


def _judging(made: Made) -> Iterator[str]:
    """A sentence about the judge of a stage."""
    if made.parsed is None:
        return
    read = f"{percent(made.parsed)} of its judgements have a score"
    if made.is_unread:
        yield f"The judge could hardly be read: {read}."
    elif made.follows_position:
        agreed = f"{percent(made.agreed or 0)} of its comparisons have one verdict in both orders"
        yield f"The judge prefers a place, whichever response is shown there: {agreed}."
    elif made.tells_nothing:
        share = percent(made.commonest or 0)
        yield f"The judge gave one score, rounded to one decimal, to {share} of the responses."
    else:
        tied = "" if made.tied is None else f", best and worst tie in {percent(made.tied)}"
        spread = (
            "" if made.commonest is None else f", its commonest is {percent(made.commonest)} of all"
        )
        lead = "The judge tells responses apart"
        if made.shuffled:
            lead = "The judge's scores were shuffled among the responses (a control)"
        elif made.tied is not None and made.tied > 0.5:
            lead = "The judge gives the responses to most prompts one score"
        yield f"{lead}: {read}{spread}{tied}."
    if made.too_long:
        yield (
            f"For {percent(made.too_long)} of its judgements the judge had more to read than its "
            "model takes (too_long), so they have no score: leave out long prompts, lower "
            "max_new_tokens, or shorten the reward prompt if it has one."
        )


def _supervised(figures: Sequence[StageFigures]) -> Iterator[str]:
    """A sentence about the last stage that trained, of a run without pairs of its own."""
    trained = [stage for stage in figures if stage.curves.get("loss")]
    for stage in trained[-1:]:
        losses = [value for _, value in stage.curves["loss"]]
        steps = amount(int(stage.counts.get("steps", 0)), "step")
        yield f"{stage.name}: {steps}, loss {losses[0]:.3g} -> {losses[-1]:.3g}."


def _held_out(figures: Sequence[StageFigures]) -> Iterator[str]:
    """A sentence about measures on held-out data, from the first stage that has them to the last.

    These are accuracies, and the scores of early stopping. An accuracy above 1 is no share, and is
    told as it is.
    """
    said = []
    keys = {key for stage in figures for key in stage.data if _is_accuracy(key)}
    if "anchor/accuracy_ties_half" in keys:
        keys -= {"anchor/accuracy"}
    for key in sorted(keys):
        values = [stage.data[key] for stage in figures if key in stage.data]
        if all(map(math.isfinite, values)):
            ends = values if len(values) == 1 else [values[0], values[-1]]
            told = percent if max(values) <= 1 else "{:.4g}".format
            label = key.removeprefix("held_out/").replace("anchor/", "of the judge, ")
            said.append(f"{label.replace('_', ' ')} {' -> '.join(map(told, ends))}")
    for stage in figures:
        scores = [value for _, value in stage.curves.get("early_stopping/score", ())]
        if len(scores) > 1:
            said.append(f"{stage.name}, early stopping {scores[0]:.4g} -> {max(scores):.4g}")
    if said:
        yield f"Held out: {'; '.join(said)}."


def _is_accuracy(key: str) -> bool:
    return "accuracy" in key and not key.startswith("rewards/")


def _advice(made: Sequence[Made]) -> str:
    """What to change, the most urgent first."""
    advice = {
        "raise max_new_tokens, so that responses end": any(one.was_cut for one in made),
        "make the reward prompt fit what the judge writes, or score_mode: expected": any(
            one.is_unread for one in made
        ),
        "use another judge, or score_mode: expected if it writes its scores": any(
            one.tells_nothing for one in made
        ),
        "train the model to compare, or let it score each response by itself": any(
            one.follows_position for one in made
        ),
    }
    wanted = [words for words, holds in advice.items() if holds]
    if any(one.trains_too_little for one in made):
        wanted.append("give more prompts, pairs or epochs for more steps")
    return "; ".join(wanted)


def percent(share: float) -> str:
    """A share in percent, with one decimal where it is no whole number of them."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
