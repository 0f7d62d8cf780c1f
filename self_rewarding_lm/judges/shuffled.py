"""A control: the scores of a judge, each given to another candidate by chance.

Knows scores and ids; nothing of how the judge comes to its scores.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.ensemble import Member
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.records import MOVED, Candidate, Judgement, Prompt, stable_hash
from self_rewarding_lm.runs.stage_files import FORMAT
from self_rewarding_lm.runs.stored import id_order
from self_rewarding_lm.scores import label_of

UNMOVED = "unmoved"
"""The label of the inner judge's judgements: <candidate id>/unmoved/j0."""


class ShuffledJudge(Judge):
    """A control: shuffles another judge's scores among the candidates of a block.

    of: the judge whose scores are moved: any Judge, an object with a method `judge`, a function of
    texts, a module. None: the stage's own, with its reward prompts. A block is
    `prompts_per_block` prompts of the stage; with 1, scores stay within their prompt. The block
    keeps its scores, in an order that is a function of the stage's seed and the candidates' ids
    alone. All orders are equally likely, so a candidate may keep its own score. A missing score of
    a judged candidate is moved like any other; candidates that were not judged take no part.

    The inner judge's judgements stay on disk as they are, `<candidate id>/unmoved/j0`, by
    `unmoved:<judge>`. The score that counts is `<candidate id>/j0` by `shuffled`, whose source is
    `moved` and whose text says which candidate it was given to.
    """

    name = "shuffled"
    judges_blocks = True

    def __init__(self, of: Any = None) -> None:
        self.of = of
        self._member = None if of is None else Member(make_judge(of), UNMOVED)
        self.reads_weights = self._member is None or self._member.reads_weights
        self.needs_all = self._member is not None and self._member.needs_all

    @property
    def member(self) -> Member:
        """The inner judge under its label. Raises JudgeError if it is the stage's own."""
        if self._member is None:
            raise JudgeError(
                "a ShuffledJudge without `of` works only as the judge= of a stage, where it "
                "shuffles the scores of the stage's own judge; elsewhere give the judge: "
                "ShuffledJudge(of=...)."
            )
        return self._member

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        """The inner judge's judgements; `judge_block` moves their scores."""
        return self.member.judge(ctx, prompts, candidates_PG)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        return self.member.judgement_ids(candidates)

    def has_judged(
        self,
        candidates: Sequence[Candidate],
        judgements: Iterable[Judgement],
        format: int = FORMAT,
    ) -> bool:
        return self.member.inner.has_judged(candidates, self.member.own(judgements), format)

    def weights_used(self) -> set[str]:
        return self.member.weights_used()

    def judge_block(
        self,
        ctx: Context,
        candidates_PG: Sequence[Sequence[Candidate]],
        judgements: Sequence[Judgement],
    ) -> list[Judgement]:
        """For each judged candidate a judgement with the score of a randomly drawn candidate."""
        # 1. what the inner judge's judgements come to; `inner` is empty unless it moves some itself
        inner = self.member.judge_block(ctx, candidates_PG, judgements)
        own = self.member.own([*judgements, *inner])
        scores = self.member.inner.scores_of_all(candidates_PG, own)
        judged = {name for j in own for name in j.candidate_ids}
        reasons = {n: j.reason for j in reversed(own) if j.reason for n in j.candidate_ids}
        # 2. deal them by the order of a hash
        ids = sorted(judged & scores.keys(), key=id_order)
        drawn = sorted(ids, key=lambda name: (stable_hash(ctx.seed, "shuffled", name), name))
        moved = []
        for name, giver in zip(ids, drawn, strict=True):
            score, text = scores[giver], f"moved here by chance: the score of {giver}"
            reason = reasons.get(giver, "no_score") if score is None else None
            moved.append(Judgement(f"{name}/j0", (name,), self.name, score, reason, text, MOVED))
        return [*inner, *moved]

    def scores(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> dict[str, float | None]:
        """The moved scores. Raises JudgeError if the candidates' scores were not moved yet."""
        judgements = list(judgements)
        moved = {j.candidate_ids[0]: j.score for j in judgements if label_of(j) is None}
        judged = {name for j in judgements for name in j.candidate_ids}
        if any(c.id in judged and c.id not in moved for c in candidates):
            self.check_outside_stages()
        return {c.id: moved.get(c.id) for c in candidates}
