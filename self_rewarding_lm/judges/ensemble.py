"""Several judges as one: the weighted mean of their scores, and judges that only filter.

Knows judgements and their ids; nothing of how a member makes its judgements.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.records import Candidate, Judgement, Prompt, is_number
from self_rewarding_lm.scores import exact, exact_sum, label_of


class Member(Judge):
    """A judge whose judgements are kept under a label, beside those of other judges.

    Its judgement `<candidate id>/j0` is kept as `<candidate id>/<label>/j0`, made by
    `<label>:<judge>`. The judge knows nothing of the label: it samples with the same noise as
    alone, and makes scores of its judgements in its own way.
    """

    def __init__(self, judge: Judge, label: str) -> None:
        self.inner, self.label = judge, label
        self.name = f"{label}:{judge.name}"
        self.reads_weights, self.judges_blocks = judge.reads_weights, judge.judges_blocks
        self.needs_all = judge.needs_all

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        return self.labelled(self.inner.judge(ctx, prompts, candidates_PG))

    def labelled(self, judgements: Iterable[Judgement]) -> Iterator[Judgement]:
        """The inner judge's judgements under the label.

        Raises JudgeError for an id that does not begin with the id of its (first) candidate.
        """
        for judgement in judgements:
            head, judge = judgement.candidate_ids[0], f"{self.label}:{judgement.judge}"
            if not judgement.id.startswith(f"{head}/"):
                raise JudgeError(
                    f"a judgement's id must be its candidate's with something after it, such as "
                    f"{head}/j0; {type(self.inner).__name__} gave {judgement.id!r}."
                )
            yield replace(judgement, id=self._labelled_id(judgement.id, head), judge=judge)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all judgements of one prompt's candidates."""
        heads = sorted((candidate.id for candidate in candidates), key=len, reverse=True)
        return [
            self._labelled_id(name, next(head for head in heads if name.startswith(f"{head}/")))
            for name in self.inner.judgement_ids(candidates)
        ]

    def judge_block(
        self,
        ctx: Context,
        candidates_PG: Sequence[Sequence[Candidate]],
        judgements: Sequence[Judgement],
    ) -> list[Judgement]:
        own = self.own(judgements)
        return list(self.labelled(self.inner.judge_block(ctx, candidates_PG, own)))

    def own(self, judgements: Iterable[Judgement]) -> list[Judgement]:
        """The judgements under the label, as the inner judge made them."""
        return [self._unlabelled(j) for j in judgements if label_of(j) == self.label]

    def scores(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> dict[str, float | None]:
        """The inner judge's scores of one prompt's candidates."""
        return self.inner.scores(candidates, self.own(judgements))

    def weights_used(self) -> set[str]:
        return self.inner.weights_used()

    def _labelled_id(self, record_id: str, head: str) -> str:
        return f"{head}/{self.label}/{record_id[len(head) + 1 :]}"

    def _unlabelled(self, judgement: Judgement) -> Judgement:
        head, label = judgement.candidate_ids[0], self.label
        own_id = f"{head}/{judgement.id.removeprefix(f'{head}/{label}/')}"
        return replace(judgement, id=own_id, judge=judgement.judge.removeprefix(f"{label}:"))


class EnsembleJudge(Judge):
    """Several judges of any kind: a candidate's score is the weighted mean of their scores.

    judges: judges, text functions or reward modules, or (judge, weight) with a weight over 0
    (default 1). They should score on one scale. filters: (judge, least score). A
    candidate to which a filter gives less, or no score, has no score and is counted as `filtered`.
    A candidate has no score either if one of `judges` gives it none: a mean over fewer judges does
    not measure the same thing. A judge that is given twice judges once. Each judgement is kept
    under the label of its member: m0, m1, ... in the order in which the judges first occur.
    """

    def __init__(self, judges: Sequence[Any], *, filters: Sequence[Any] = ()) -> None:
        weighted = [one if isinstance(one, tuple) else (one, 1.0) for one in judges]
        self._check(weighted, filters)
        different = {id(judge): judge for judge, _ in (*weighted, *filters)}
        members = {
            key: Member(make_judge(judge), f"m{i}")
            for i, (key, judge) in enumerate(different.items())
        }
        self.members = tuple(members.values())
        self.weighted = [(members[id(judge)], float(weight)) for judge, weight in weighted]
        self.filters = [(members[id(judge)], float(least)) for judge, least in filters]
        self.name = ", ".join(member.name for member in self.members)
        self.reads_weights = any(member.reads_weights for member in self.members)
        self.judges_blocks = any(member.judges_blocks for member in self.members)
        self.needs_all = any(member.needs_all for member in self.members)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        for member in self.members:
            yield from member.judge(ctx, prompts, candidates_PG)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all judgements of one prompt's candidates."""
        return [i for member in self.members for i in member.judgement_ids(candidates)]

    def judge_block(
        self,
        ctx: Context,
        candidates_PG: Sequence[Sequence[Candidate]],
        judgements: Sequence[Judgement],
    ) -> list[Judgement]:
        made = [member.judge_block(ctx, candidates_PG, judgements) for member in self.members]
        return list(chain.from_iterable(made))

    def weights_used(self) -> set[str]:
        return set().union(*(member.weights_used() for member in self.members))

    def scores(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> dict[str, float | None]:
        """The weighted mean of the members' scores of each of one prompt's candidates."""
        judgements = list(judgements)
        filtered = self.filtered(candidates, judgements)
        weighted = [(m.scores(candidates, judgements), weight) for m, weight in self.weighted]
        return {c.id: None if c.id in filtered else _mean(weighted, c.id) for c in candidates}

    def filtered(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> set[str]:
        """Ids of the candidates to which a filter gives less than its least score, or no score."""
        judgements, filtered = list(judgements), set[str]()
        for member, least in self.filters:
            scores = member.scores(candidates, judgements)
            filtered |= {i for i, score in scores.items() if score is None or score < least}
        return filtered

    def _check(self, weighted: Sequence[Any], filters: Sequence[Any]) -> None:
        if not weighted:
            raise JudgeError("an EnsembleJudge needs a judge that scores; filters alone do not.")
        for what, entries in (("judges", weighted), ("filters", filters)):
            for one in entries:
                good = isinstance(one, tuple) and len(one) == 2 and is_number(one[1])
                good = good and (hasattr(one[0], "judge") or callable(one[0]))
                if not good or (what == "judges" and one[1] <= 0):
                    form = "(judge, weight over 0)" if what == "judges" else "(judge, least score)"
                    raise JudgeError(
                        f"EnsembleJudge: {what} are given as {form}; got {one!r:.200}."
                    )


def _mean(
    weighted: Sequence[tuple[dict[str, float | None], float]], candidate_id: str
) -> float | None:
    """The weighted mean of the members' scores of a candidate; None if one gives it none."""
    known = [
        (exact(score), exact(weight))
        for scores, weight in weighted
        if (score := scores[candidate_id]) is not None
    ]
    if len(known) < len(weighted):
        return None
    total = exact_sum(weight for _, weight in known)
    return float(exact_sum(score * weight for score, weight in known) / total)
