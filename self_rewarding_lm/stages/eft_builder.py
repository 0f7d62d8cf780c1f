"""Judge examples from ranked replies: what all ways of making them share.

A builder asks what is still to be asked, thins what it finds, and reports. What counts as a right
judgement is said by its kinds, `eft_replies` and `eft_comparisons`.
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from self_rewarding_lm.asking import Asks, Question
from self_rewarding_lm.batching import batched
from self_rewarding_lm.context import Context
from self_rewarding_lm.evaluate import Asked, as_candidates
from self_rewarding_lm.judges import FIRST_LOOK
from self_rewarding_lm.records import Candidate, Demonstration, Judgement, Prompt, RankedReplies
from self_rewarding_lm.stages.targets import thinned
from self_rewarding_lm.store import StageDir
from self_rewarding_lm.tally import judge_metrics

if TYPE_CHECKING:
    from self_rewarding_lm.stages.eft import BuildEFTConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A demonstration and the score, or verdict, that it teaches."""

    made: Demonstration
    score: float


class Builder(ABC):
    """Makes a stage's demonstrations; what is on disk already is used again."""

    teaches = "Scores"
    """What its demonstrations say."""
    scores: tuple[float, ...] = ()
    """All that they may say, where those that none says count too."""

    def __init__(
        self,
        config: "BuildEFTConfig",
        ctx: Context,
        out: StageDir,
        ranked: Sequence[RankedReplies],
    ) -> None:
        self.config, self.ctx, self.out, self.ranked = config, ctx, out, ranked
        self.asked: list[Asked] = [as_candidates(item, ctx.tokens) for item in ranked]
        self.candidates = [c for _, candidates in self.asked for c in candidates]
        self.judgements: dict[str, Judgement] = {}

    @abstractmethod
    def found(self) -> list[Example]:
        """All that could be learnt."""

    @abstractmethod
    def counts(self, found: Sequence[Example]) -> dict[str, Any]:
        """Metrics of how far the judgements came."""

    @abstractmethod
    def in_words(self, metrics: Mapping[str, Any]) -> str:
        """The same as a sentence's beginning."""

    @abstractmethod
    def too_few(self, words: str) -> Exception:
        """The error where fewer than min_kept are left, with what to change."""

    @abstractmethod
    def score_text(self, score: float) -> str:
        """A score as it is reported."""

    def build(self) -> list[Demonstration]:
        """The stage's demonstrations, all records of their making on disk."""
        config, out = self.config, self.out
        if self.ctx.runtime.is_main:
            out.append([prompt for prompt, _ in self.asked])
            out.append(self.candidates)
        out.merge(Prompt)
        out.merge(Candidate)
        found = self.found()
        limit = self.ctx.limit(None)
        fitting = [e for e in found if limit is None or _length(e.made) <= limit]
        kept = thinned(
            {e.made.id: e.score for e in fitting},
            seed=self.ctx.seed,
            max_share=config.max_score_share,
            max_per_score=config.max_per_score,
            scores=self.scores,
        )
        taken = [e for e in fitting if e.made.id in kept]
        if self.ctx.runtime.is_main:
            out.append([e.made for e in taken])
        out.merge(Demonstration)
        self._report(found, fitting, taken)
        return [e.made for e in taken]

    def ask(self, asker: Asks, groups: Sequence[Sequence[Question]]) -> None:
        """Have judged what is not judged yet, each process a part of the groups."""
        ctx = self.ctx
        known = {j.id for j in self.out.known(Judgement)}
        missing = [[q for q in group if q.id not in known] for group in groups]
        mine = [q for group in ctx.runtime.share([g for g in missing if g]) for q in group]
        found = batched(ctx.runtime.stopping.between(asker.ask(ctx, mine)), FIRST_LOOK)
        with ctx.runtime.progress(len(mine), f"{ctx.stage}: judging", "judgement") as bar:
            for batch in found:
                self.out.append(batch)
                bar.update(len(batch))
        self.out.merge(Judgement)
        self.judgements = {j.id: j for j in self.out.read(Judgement)}

    def example(
        self,
        record_id: str,
        shown: str,
        target: str,
        score: float,
        parents: Sequence[str],
    ) -> Example:
        """What the judge reads, and what it should say."""
        rendered = self.ctx.tokens.prompt(shown)
        made = Demonstration(
            id=record_id,
            prompt_ids=rendered.ids,
            completion_ids=self.ctx.tokens.response(shown, target),
            prompt=rendered.text,
            completion=target,
            parents=tuple(parents),
            messages=rendered.messages,
        )
        return Example(made, score)

    def unread(self) -> str:
        """Texts of the judge without a score, to show in an error."""
        without = [j for j in self.judgements.values() if j.score is None]
        lines = dict.fromkeys(f"  {j.reason}: {(j.text or '')[:300]!r}" for j in without)
        texts = "\n".join(islice(lines, 3))
        return f"Texts without a score:\n{texts}\n" if texts else ""

    def _report(
        self, found: Sequence[Example], fitting: Sequence[Example], taken: Sequence[Example]
    ) -> None:
        """How many came how far, and the scores before and after thinning."""
        metrics: dict[str, Any] = {
            "eft/instructions": len(self.ranked),
            "eft/replies": len(self.candidates),
            **self.counts(found),
        }
        if self.judgements:
            metrics |= judge_metrics(self.candidates, list(self.judgements.values()))
        metrics |= {"eft/too_long": len(found) - len(fitting), "eft/kept": len(taken)}
        metrics |= {
            "eft/scores_before": self._histogram(fitting),
            "eft/scores_after": self._histogram(taken),
        }
        self.out.log({"step": 0, **metrics})
        self.out.summary |= {"demonstrations": len(taken), "metrics": metrics}
        words = self._in_words(metrics)
        if len(taken) < self.config.min_kept:
            raise self.too_few(
                f"{self.ctx.stage}: {words}, and min_kept is {self.config.min_kept}."
            )
        level = logging.INFO if taken else logging.WARNING
        logger.log(level, "%s: %s", self.ctx.stage, words)

    def _in_words(self, metrics: Mapping[str, Any]) -> str:
        words = self.in_words(metrics)
        if metrics["eft/too_long"]:
            words += f", {metrics['eft/too_long']} of them too long for the model"
        before, after = (
            ", ".join(f"{count} x {score}" for score, count in metrics[f"eft/{name}"].items())
            for name in ("scores_before", "scores_after")
        )
        words += f"; {metrics['eft/kept']} kept"
        if not before:
            return words
        return f"{words}. {self.teaches} before thinning: {before}; after: {after or 'none'}"

    def _histogram(self, examples: Sequence[Example]) -> dict[str, int]:
        counts = Counter(example.score for example in examples)
        return {self.score_text(score): count for score, count in sorted(counts.items())}


def _length(made: Demonstration) -> int:
    return len(made.prompt_ids) + len(made.completion_ids)
