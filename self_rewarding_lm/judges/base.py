"""What a judge is: candidates in, judgements out, and what the rest of the library asks it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from self_rewarding_lm.context import Context
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.runs.stage_files import FORMAT
from self_rewarding_lm.scores import candidate_scores


class Judge:
    """The base class of judges, which score candidates. A subclass writes `judge`.

    Everything else has a default; any object with a method `judge` gets these defaults too.
    """

    name: str = "judge"
    """Who made the judgements; written into each of them."""
    num_judgements: int = 1
    """Judgements of each candidate."""
    reads_weights: bool = True
    """Whether its judgements may change when the weights in the context's model change."""
    knows_ids: bool = True
    """Whether `judgement_ids` holds. If not, the judgements of each candidate are counted."""
    judges_blocks: bool = False
    """Whether `judge_block` has judgements to add."""
    needs_all: bool = False
    """Whether its judgement of a candidate needs the other candidates of the prompt, also those
    that can be in no pair. Other judges do not get these."""

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterable[Judgement]:
        """Judgements of all candidates, in any order; ids <candidate id>/j<k>.

        candidates_PG: for each prompt the list of its candidates.
        """
        raise NotImplementedError

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        """Ids of all judgements of one prompt's candidates."""
        numbers = range(self.num_judgements)
        return [f"{candidate.id}/j{k}" for candidate in candidates for k in numbers]

    def has_judged(
        self,
        candidates: Sequence[Candidate],
        judgements: Iterable[Judgement],
        format: int = FORMAT,
    ) -> bool:
        """Whether these are all judgements of one prompt's candidates. format: of the run."""
        if self.knows_ids:
            ids, wanted = {j.id for j in judgements}, self.judgement_ids(candidates)
            if format == 1:
                wanted = [i if i in ids else as_in_format_1(i) for i in wanted]
            return ids.issuperset(wanted)
        counts = Counter(candidate_id for j in judgements for candidate_id in j.candidate_ids)
        return all(counts[candidate.id] >= self.num_judgements for candidate in candidates)

    def judge_block(
        self,
        ctx: Context,
        candidates_PG: Sequence[Sequence[Candidate]],
        judgements: Sequence[Judgement],
    ) -> list[Judgement]:
        """Further judgements, made from those of a stage's whole block, over all its processes.

        candidates_PG: for each prompt of the block its candidates. judgements: all that `judge`
        gave for them. It uses no model and gives the same in each process; its ids are none of
        `judgement_ids`.
        """
        return []

    def scores(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> dict[str, float | None]:
        """The scores of one prompt's candidates, by candidate id; None if a score is unknown."""
        return candidate_scores(candidates, judgements)

    def scores_of_all(
        self, candidates_PG: Sequence[Sequence[Candidate]], judgements: Iterable[Judgement]
    ) -> dict[str, float | None]:
        """The scores of several prompts' candidates, by candidate id."""
        place_of = {c.id: place for place, group in enumerate(candidates_PG) for c in group}
        judgements_PG: list[list[Judgement]] = [[] for _ in candidates_PG]
        for judgement in judgements:
            if (place := place_of.get(judgement.candidate_ids[0])) is not None:
                judgements_PG[place].append(judgement)
        scores: dict[str, float | None] = {}
        for candidates, own in zip(candidates_PG, judgements_PG, strict=True):
            scores |= self.scores(candidates, own)
        return scores

    def filtered(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> set[str]:
        """Ids of candidates that this judge excludes from all pairs."""
        return set()

    def own(self, judgements: Iterable[Judgement]) -> list[Judgement]:
        """Those of a stage's judgements that the stage's own judge made."""
        return list(judgements)

    def weights_used(self) -> set[str]:
        """Names of the weights that the judge needs: "initial", stages, paths."""
        return set()

    def check_outside_stages(self) -> None:
        """Raise JudgeError if it judges whole blocks (`judge_block`), which only stages have."""
        if self.judges_blocks:
            raise JudgeError(
                f"the judge {self.name!r} moves scores among the candidates of a stage's block, so "
                "it is a judge for stages. An evaluation has no blocks; give it the judge whose "
                "scores are moved."
            )


class WrappedJudge(Judge):
    """Any object with a method `judge`: what it does not define itself is as in `Judge`."""

    def __init__(self, judge: Any) -> None:
        self.inner = judge
        self.name = getattr(judge, "name", type(judge).__name__)
        self.num_judgements = getattr(judge, "num_judgements", 1)
        self.reads_weights = getattr(judge, "reads_weights", True)
        self.knows_ids = hasattr(judge, "judgement_ids")
        self.judges_blocks = getattr(judge, "judges_blocks", False)
        self.needs_all = getattr(judge, "needs_all", False)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterable[Judgement]:
        return self.inner.judge(ctx, prompts, candidates_PG)

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        return self._method("judgement_ids")(candidates)

    def judge_block(
        self,
        ctx: Context,
        candidates_PG: Sequence[Sequence[Candidate]],
        judgements: Sequence[Judgement],
    ) -> list[Judgement]:
        return self._method("judge_block")(ctx, candidates_PG, judgements)

    def scores(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> dict[str, float | None]:
        return self._method("scores")(candidates, judgements)

    def filtered(
        self, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
    ) -> set[str]:
        return self._method("filtered")(candidates, judgements)

    def weights_used(self) -> set[str]:
        return self._method("weights_used")()

    def _method(self, name: str) -> Any:
        return getattr(self.inner, name, getattr(super(), name))


def as_in_format_1(judgement_id: str) -> str:
    """An id as in runs of format 1, where a comparison's has only the last part of the second's."""
    first, versus, second = judgement_id.rpartition("/vs/")
    return f"{first}{versus}{second.rsplit('/', 1)[-1]}" if versus else judgement_id
