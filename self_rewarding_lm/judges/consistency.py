"""How far a model and an earlier one rank the same responses alike, as label smoothing of the loss.

arXiv:2410.12735 (CREAM), Algorithm 1: c = (tau + 1) / 2 with Kendall's tau between the two
rankings, and the loss c L(chosen, rejected) + (1 - c) L(rejected, chosen). Knows judges and the
weights that they ask for; nothing of how pairs are picked.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

from self_rewarding_lm.config import Config
from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import ConfigError, setting
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.ensemble import Member
from self_rewarding_lm.judges.implicit import CURRENT, ImplicitJudge, implicit_judgements
from self_rewarding_lm.records import Candidate, Judgement, PreferencePair, Prompt, prompt_id_of
from self_rewarding_lm.runs.lines import Picked
from self_rewarding_lm.runs.run import INITIAL
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.scores import label_of
from self_rewarding_lm.stats import kendall_tau_b, spearman

logger = logging.getLogger(__name__)


MEASURES = {"kendall": kendall_tau_b, "spearman": spearman}


class ConsistencyConfig(Config):
    """Weights pairs by how far an earlier model and the current one rank the candidates alike."""

    previous: str | Path = INITIAL
    """Weights of the earlier model: "initial", an earlier stage's name or a path."""
    by: Literal["judge", "implicit"] = "judge"
    """How each model ranks: "judge", by the stage's own judge, once more with the earlier weights;
    "implicit", by log pi(y|x) - log pi_initial(y|x), summed over tokens (for the initial weights,
    where this is 0, by the mean log pi_initial of a token; Algorithm 1)."""
    over: Literal["prompt", "mean"] = "mean"
    """"mean": all pairs get the mean over the prompts (the paper's); "prompt": each pair gets the
    value of its own prompt."""
    measure: Literal["kendall", "spearman"] = "kendall"
    """The rank correlation; of Kendall's it is tau-b, which allows for ties."""


class ComparingJudge(Judge):
    """A stage's judge, and beside its judgements those that rank the candidates for comparison.

    The judgements of the stage's judge stay as they are. Ids of the earlier model's judgements are
    `<candidate id>/previous/...`; those of the present model's implicit rewards are
    `<candidate id>/current/...`, unless the stage's judge is an ImplicitJudge itself.
    """

    def __init__(self, judge: Judge, config: ConsistencyConfig) -> None:
        self.inner, self.config = judge, config
        self.name = judge.name
        which = str(config.previous)
        self.current: Judge = judge
        self.added: list[Member] = []
        if config.by == "judge":
            self.previous = Member(EarlierJudge(judge, which), "previous")
        else:
            if not isinstance(judge, ImplicitJudge):
                self.current = Member(ImplicitJudge(), "current")
                self.added.append(self.current)
            reference = None if which == INITIAL else INITIAL
            earlier = ImplicitJudge(weights=which, reference=reference)
            self.previous = Member(earlier, "previous")
        self.added.append(self.previous)
        self.judges_blocks, self.needs_all = judge.judges_blocks, judge.needs_all

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        yield from self.inner.judge(ctx, prompts, candidates_PG)
        if self.config.by == "judge":
            yield from self.previous.judge(ctx, prompts, candidates_PG)
            return
        judges = [member.inner for member in self.added]
        judged = implicit_judgements(ctx, judges, prompts, candidates_PG)  # type: ignore[arg-type]
        for member, judgements in zip(self.added, judged, strict=True):
            yield from member.labelled(judgements)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all judgements of one prompt's candidates."""
        added = [name for member in self.added for name in member.judgement_ids(candidates)]
        return [*self.inner.judgement_ids(candidates), *added]

    def judge_block(
        self,
        ctx: Context,
        candidates_PG: Sequence[Sequence[Candidate]],
        judgements: Sequence[Judgement],
    ) -> list[Judgement]:
        """Those of the stage's judge, and of the same judge with the earlier weights."""
        own = self.inner.judge_block(ctx, candidates_PG, self.own(judgements))
        added = [member.judge_block(ctx, candidates_PG, judgements) for member in self.added]
        return [*own, *chain.from_iterable(added)]

    def weights_used(self) -> set[str]:
        return set().union(*(judge.weights_used() for judge in (self.inner, *self.added)))

    def own(self, judgements: Iterable[Judgement]) -> list[Judgement]:
        """The judgements that the stage's judge itself made."""
        labels = {member.label for member in self.added}
        return [j for j in judgements if label_of(j) not in labels]

    def scores(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> dict[str, float | None]:
        """The scores of one prompt's candidates by the stage's judge."""
        return self.inner.scores(candidates, self.own(judgements))

    def filtered(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> set[str]:
        """Ids of candidates that the stage's judge excludes from all pairs."""
        return self.inner.filtered(candidates, self.own(judgements))

    def smoothing(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> float | None:
        """1 - c of one prompt's candidates; None if the correlation is undefined.

        It is undefined if fewer than two candidates have a score by both models, or if one model
        gives all of them the same score.
        """
        judgements = list(judgements)
        own = self.own(judgements) if self.current is self.inner else judgements
        now = self.current.scores(candidates, own)
        before = self.previous.scores(candidates, judgements)
        both = [(now[c.id], before[c.id]) for c in candidates]
        known = [(a, b) for a, b in both if a is not None and b is not None]
        tau = MEASURES[self.config.measure]([a for a, _ in known], [b for _, b in known])
        return None if tau is None else (1 - tau) / 2


class EarlierJudge(Judge):
    """A judge that is asked while earlier weights are in the model.

    It works in this process, because a server holds the present weights. The noise is the same as
    that of the judge itself, so equal weights give equal judgements.
    """

    def __init__(self, judge: Judge, which: str) -> None:
        self.inner, self.which = judge, which
        self.name, self.judges_blocks = judge.name, judge.judges_blocks

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> list[Judgement]:
        local = replace(ctx, engine=ctx.local_engine())
        with ctx.weights(self.which):  # a list, so that nobody else sees these weights
            judged = self.inner.judge(local, prompts, candidates_PG)
            return list(ctx.runtime.stopping.between(judged))

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        return self.inner.judgement_ids(candidates)

    def judge_block(
        self,
        ctx: Context,
        candidates_PG: Sequence[Sequence[Candidate]],
        judgements: Sequence[Judgement],
    ) -> list[Judgement]:
        return self.inner.judge_block(ctx, candidates_PG, judgements)

    def weights_used(self) -> set[str]:
        return {self.which} | self.inner.weights_used()

    def scores(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> dict[str, float | None]:
        return self.inner.scores(candidates, judgements)


def check_consistency(stage: str, config: ConsistencyConfig, judge: Judge) -> None:
    """Raise ConfigError if both rankings would be the same, or the scores of one all equal."""
    if config.by == "judge" and not judge.reads_weights:
        raise ConfigError(
            f"{stage}: consistency {setting('by', 'judge')} asks the stage's judge with earlier "
            "weights in the "
            f"model, and {judge.name!r} does not ask the model: "
            f"both rankings would be the same. Take {setting('by', 'implicit')}."
        )
    if config.by == "judge" and isinstance(judge, ImplicitJudge):
        if judge.reference == str(config.previous) and judge.weights == CURRENT:
            raise ConfigError(
                f"{stage}: with the weights {judge.reference!r} in the model an ImplicitJudge that "
                "refers to them gives all candidates 0. Take consistency "
                f"{setting('by', 'implicit')}."
            )


def smoothed(
    ctx: Context, out: StageDir, pairs: Sequence[PreferencePair], config: ConsistencyConfig
) -> Sequence[PreferencePair]:
    """The pairs with the label smoothing that they are trained with.

    pairs: each with the smoothing of its prompt, or None. With over="prompt" a pair keeps it, and
    pairs without one take the mean over the prompts; with over="mean" all pairs take the mean. If
    no prompt has a smoothing, the pairs are trained without one and a warning says so.
    """
    of_prompts = [
        next(own).label_smoothing
        for _, own in groupby(pairs, key=lambda p: prompt_id_of(p.chosen_id or p.id))
    ]
    known = [value for value in of_prompts if value is not None]
    mean = math.fsum(known) / len(known) if known else None
    metrics = {"consistency/undefined_share": 1 - len(known) / max(1, len(of_prompts))}
    if mean is None:
        logger.warning(
            "%s: for no prompt with a pair do the current and the earlier model (%s) both rank "
            "the candidates: one of them gives all the same score, or none. The pairs are trained "
            "on without label smoothing; a judge with finer scores "
            f"({setting('score_mode', 'expected')}) or "
            f"{setting('by', 'implicit')} could rank them.",
            ctx.stage,
            config.previous,
        )
    else:
        metrics["consistency/tau_mean"] = 1 - 2 * mean
    out.log({"step": ctx.round.first_step, **metrics})
    out.summary["consistency"] = metrics

    def change(pair: PreferencePair) -> PreferencePair:
        if config.over == "prompt" and pair.label_smoothing is not None:
            return pair
        return replace(pair, label_smoothing=mean)

    return Picked(pairs, change=change)
