"""Evaluation data: replies that people ranked become examples of judging (arXiv:2401.10020, 2.1).

Makes demonstrations and trains nothing; a later SFT stage takes them with `from_stage`.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal

from pydantic import Field

from self_rewarding_lm.batching import batched
from self_rewarding_lm.config import FinetuneConfig, Object, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.datasets import OnBadRow
from self_rewarding_lm.errors import DataError, JudgeError
from self_rewarding_lm.evaluate import Asked, as_candidates
from self_rewarding_lm.judges import FIRST_LOOK, MIN_ANSWER_TOKENS, SelfJudge, check_judge_prompt
from self_rewarding_lm.ranked import ranked_row
from self_rewarding_lm.records import Candidate, Demonstration, Judgement, Prompt, RankedReplies
from self_rewarding_lm.rehearsal import short
from self_rewarding_lm.stages.base import check_rows, read_once
from self_rewarding_lm.stages.targets import (
    Accept,
    first_agreeing,
    score_targets,
    scores_of_ranks,
    thinned,
)
from self_rewarding_lm.statements import number_text
from self_rewarding_lm.store import StageDir
from self_rewarding_lm.tally import judge_metrics

logger = logging.getLogger(__name__)


class BuildEFTConfig(FinetuneConfig):
    """Judge prompts with the answers that a judge should give, made of human-ranked replies.

    "judgements" is the paper's way (3.1.1): the current weights, there the SFT baseline, judge
    every reply; judgements whose scores are in the order of the human ranking are kept, and of
    scores that come too often a part is discarded. The target is the judge's text as it wrote it;
    the score is the one it states (`RewardConfig.as_written`).
    "ranks" asks no model and is for models that cannot judge yet: the target is the reward
    template alone with a score made of the rank, see `scores_of_ranks`.

    Of each reply there is one demonstration at most. Trains nothing.
    """

    folder_name: ClassVar[str] = "eft"

    ranked_dataset: Object
    """Replies ranked by people, at least two a row, see `ranked.ranked_row`."""
    method: Literal["judgements", "ranks"] = "judgements"
    """Whether the model's own judgements are taken, or scores are made of the ranks."""
    num_judgements: int = Field(default=3, ge=1)
    """Attempts: judgement k of every reply of a row makes one order, and the first that agrees is
    taken. The paper does not say how many it drew here; 3 is what it draws to score (3.1.3)."""
    judging: SamplingConfig = SamplingConfig()
    """How judgements are sampled."""
    self_reward_config_keyname: str = "default"
    """Which of the trainer's reward prompts."""
    accept: Accept = "instruction"
    """"instruction": an attempt counts where all replies of the row have a score and all that
    people ordered are in that order. "reply": each reply by itself, where it stands rightly to all
    others that have a score. A tie is no agreement. The paper asks that the order of the scores
    agrees with the human ranking, and does not say what a tie is."""
    max_score_share: float | None = Field(default=0.5, gt=0, le=1)
    """No score has more than this share of what is kept; with n different scores never under 1/n.
    The paper discards a part of the commonest score without saying how much; 0.5 is ours."""
    max_per_score: int | None = Field(default=None, ge=1)
    """No score is kept more often than this."""
    min_kept: int = Field(default=1, ge=0)
    """Fewer demonstrations are an error that says what to try; 0 goes on without any."""
    on_bad_row: OnBadRow = "raise"
    """A row that is no ranking: an error that names it; or "skip", it is left out and counted."""

    def check(self, ctx: Context) -> None:
        reward = self._reward(ctx)
        check_judge_prompt(reward, ctx.tokens, ctx.model.max_len)
        if self.method == "ranks":
            score_targets(reward, ctx.stage)
        rows = ctx.rows["ranked_dataset"]
        check_rows(rows, self.on_bad_row, lambda row, where: self.check_row(row, where, ctx))

    def check_row(self, row: Any, where: str, ctx: Context) -> None:
        """Raise DataError or TokenizerError where a row is no ranking."""
        ranked_replies(row, where, f"{ctx.stage}/0", ctx)

    def run(self, ctx: Context, out: StageDir) -> None:
        rows = ctx.rows["ranked_dataset"]

        def make(row: int, record_id: str) -> RankedReplies:
            return ranked_replies(rows.read(row), rows.where(row), record_id, ctx)

        ranked = read_once(
            ctx, out, rows, RankedReplies, ctx.stage, make, on_bad_row=self.on_bad_row
        )
        Builder(self, ctx, out, self._reward(ctx), ranked).build()

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        fewer = {
            "judging": short(self.judging, MIN_ANSWER_TOKENS),
            "num_judgements": 1,
            "min_kept": 0,
        }
        self.model_copy(update=fewer).run(ctx, out)

    def reward_names(self) -> tuple[str, ...]:
        return (self.self_reward_config_keyname,)

    def _reward(self, ctx: Context) -> RewardConfig:
        return ctx.rewards_named(self.reward_names())[self.self_reward_config_keyname].as_written()


@dataclass(frozen=True)
class _Example:
    """A demonstration and the score that it teaches."""

    made: Demonstration
    score: float


class Builder:
    """Makes a stage's demonstrations; what is on disk already is used again."""

    def __init__(
        self,
        config: BuildEFTConfig,
        ctx: Context,
        out: StageDir,
        reward: RewardConfig,
        ranked: Sequence[RankedReplies],
    ) -> None:
        self.config, self.ctx, self.out, self.reward = config, ctx, out, reward
        self.ranked = ranked
        self.asked: list[Asked] = [as_candidates(item, ctx.tokens) for item in ranked]
        self.candidates = [c for _, candidates in self.asked for c in candidates]
        self.judge = SelfJudge(reward, config.judging, config.num_judgements)
        self.judgements: dict[str, Judgement] = {}

    def build(self) -> list[Demonstration]:
        """The stage's demonstrations, all records of their making on disk."""
        config, out = self.config, self.out
        if self.ctx.runtime.is_main:
            out.append([prompt for prompt, _ in self.asked])
            out.append(self.candidates)
        out.merge(Prompt)
        out.merge(Candidate)
        found = self._from_ranks() if config.method == "ranks" else self._from_judgements()
        limit = self.ctx.limit(None)
        fitting = [e for e in found if limit is None or _length(e.made) <= limit]
        kept = thinned(
            {e.made.id: e.score for e in fitting},
            seed=self.ctx.seed,
            max_share=config.max_score_share,
            max_per_score=config.max_per_score,
        )
        taken = [e for e in fitting if e.made.id in kept]
        if self.ctx.runtime.is_main:
            out.append([e.made for e in taken])
        out.merge(Demonstration)
        self._report(found, fitting, taken)
        return [e.made for e in taken]

    def _judge(self) -> None:
        """Judge what is not judged, each process a part of it."""
        ctx, count = self.ctx, self.config.num_judgements
        known = {j.id for j in self.out.known(Judgement)}
        missing = [(p, [c for c in own if not _judged(c, count, known)]) for p, own in self.asked]
        mine = ctx.runtime.share([(p, own) for p, own in missing if own])
        judged = self.judge.judge(ctx, [p for p, _ in mine], [own for _, own in mine])
        found = batched(ctx.runtime.stopping.between(judged), FIRST_LOOK)
        total = count * sum(len(own) for _, own in mine)
        with ctx.runtime.progress(total, f"{ctx.stage}: judging", "judgement") as bar:
            for batch in found:
                self.out.append([j for j in batch if j.id not in known])
                bar.update(len(batch))
        self.out.merge(Judgement)
        self.judgements = {j.id: j for j in self.out.read(Judgement)}

    def _from_judgements(self) -> list[_Example]:
        """Of every reply the first judgement that agrees with people, if there is one."""
        self._judge()
        found = []
        for item, (prompt, candidates) in zip(self.ranked, self.asked, strict=True):
            told_KG = [
                [self.judgements[f"{c.id}/j{k}"] for c in candidates]
                for k in range(self.config.num_judgements)
            ]
            scores_KG = [[j.score for j in told] for told in told_KG]
            picked = first_agreeing(item.ranks, scores_KG, accept=self.config.accept)
            for place, k in enumerate(picked):
                if k is not None:
                    told = told_KG[k][place]
                    assert told.score is not None and told.text is not None
                    found.append(
                        self._example(item, prompt, candidates[place], told.text, told.score, told)
                    )
        return found

    def _from_ranks(self) -> list[_Example]:
        """Of every reply the score that its rank stands for."""
        targets = score_targets(self.reward, self.ctx.stage)
        return [
            self._example(item, prompt, candidate, targets[score], score, None)
            for item, (prompt, candidates) in zip(self.ranked, self.asked, strict=True)
            for candidate, score in zip(
                candidates, scores_of_ranks(item.ranks, tuple(targets)), strict=True
            )
        ]

    def _example(
        self,
        item: RankedReplies,
        prompt: Prompt,
        candidate: Candidate,
        target: str,
        score: float,
        judgement: Judgement | None,
    ) -> _Example:
        """What the judge reads of a reply, and what it should say."""
        shown = self.judge.render(prompt.text or "", candidate.text or "")
        rendered = self.ctx.tokens.prompt(shown)
        made = Demonstration(
            id=f"{item.id}/{candidate.id.rsplit('/', 1)[1]}",
            prompt_ids=rendered.ids,
            completion_ids=self.ctx.tokens.response(shown, target),
            prompt=rendered.text,
            completion=target,
            parents=(item.id, candidate.id, *([judgement.id] if judgement else [])),
            messages=rendered.messages,
        )
        return _Example(made, score)

    def _report(
        self, found: Sequence[_Example], fitting: Sequence[_Example], taken: Sequence[_Example]
    ) -> None:
        """How many replies came how far, and the scores before and after thinning."""
        metrics: dict[str, Any] = {
            "eft/instructions": len(self.ranked),
            "eft/replies": len(self.candidates),
        }
        if self.config.method == "judgements":
            told = self.judgements.values()
            read = {j.candidate_ids[0] for j in told if j.score is not None}
            metrics |= {"eft/parsed": len(read), "eft/agreed": len(found)}
            metrics |= judge_metrics(self.candidates, list(told))
        metrics |= {"eft/too_long": len(found) - len(fitting), "eft/kept": len(taken)}
        self.ctx.runtime.log({f"{self.ctx.stage}/{k}": v for k, v in metrics.items()}, 0)
        metrics |= {
            "eft/scores_before": _histogram(fitting),
            "eft/scores_after": _histogram(taken),
        }
        self.out.log({"step": 0, **metrics})
        self.out.summary |= {"demonstrations": len(taken), "metrics": metrics}
        words = self._in_words(metrics)
        if len(taken) < self.config.min_kept:
            raise self._too_few(words)
        level = logging.INFO if taken else logging.WARNING
        logger.log(level, "%s: %s", self.ctx.stage, words)

    def _in_words(self, metrics: Mapping[str, Any]) -> str:
        words = f"{metrics['eft/replies']} replies to {metrics['eft/instructions']} instructions"
        if "eft/parsed" in metrics:
            words += (
                f", {metrics['eft/parsed']} with a score that could be read, "
                f"{metrics['eft/agreed']} in agreement with people"
            )
        if metrics["eft/too_long"]:
            words += f", {metrics['eft/too_long']} of them too long for the model"
        before, after = (
            ", ".join(f"{count} x {score}" for score, count in metrics[f"eft/{name}"].items())
            for name in ("scores_before", "scores_after")
        )
        words += f"; {metrics['eft/kept']} kept"
        return f"{words}. Scores before thinning: {before}; after: {after}" if after else words

    def _too_few(self, words: str) -> Exception:
        words = f"{self.ctx.stage}: {words}, and min_kept is {self.config.min_kept}."
        where = f"All records made so far are kept in {self.out.path}."
        if self.config.method == "ranks":
            return DataError(
                f"{words} The judge prompt with a reply and its score must have "
                f"room in the model's {self.ctx.limit(None)} tokens; use a shorter reward prompt "
                f"or shorter replies. {where}"
            )
        unread = [j for j in self.judgements.values() if j.score is None]
        lines = dict.fromkeys(f"  {j.reason}: {(j.text or '')[:300]!r}" for j in unread)
        texts = "\n".join(islice(lines, 3))
        shown = f"Texts without a score:\n{texts}\n" if texts else ""
        return JudgeError(
            f"{words}\n{shown}"
            "Change one of these: method='ranks', which makes scores of the ranks and needs no "
            "judge, for a model that cannot judge yet; more num_judgements; accept='reply', which "
            "asks less; judging.max_new_tokens, if the texts are cut off; or the reward prompt's "
            f"reward_regex_template, if they state their scores in another form. {where}"
        )


def ranked_replies(row: Any, where: str, record_id: str, ctx: Context) -> RankedReplies:
    """A row as it is stored; DataError or TokenizerError where it cannot be used."""
    item = replace(ranked_row(row, where), id=record_id)
    as_candidates(item, ctx.tokens, where=where)
    return item


def _judged(candidate: Candidate, count: int, known: set[str]) -> bool:
    return all(f"{candidate.id}/j{k}" in known for k in range(count))


def _length(made: Demonstration) -> int:
    return len(made.prompt_ids) + len(made.completion_ids)


def _histogram(examples: Sequence[_Example]) -> dict[str, int]:
    counts = Counter(example.score for example in examples)
    return {number_text(score): count for score, count in sorted(counts.items())}
