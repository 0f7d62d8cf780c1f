"""Candidates to judgements: a model with a reward prompt, a text function, a reward module."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from self_rewarding_lm.context import Context
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.scores import candidate_scores


@runtime_checkable
class Judge(Protocol):
    """Scores candidates. `candidates_PG`: for each prompt the list of its candidates.

    It may have `num_judgements`, those of each candidate (default 1), or
    `judgement_ids(candidates)`, the ids of all judgements of one prompt's candidates; a stage that
    goes on asks for the prompts that miss some. It may have `scores(candidates, judgements)`, what
    its judgements come to for one prompt's candidates (by id, None where unknown; default
    `judging.candidate_scores`), `filtered(candidates, judgements)`, the ids of those that it lets
    through to no pair, and `weights_used()`, names of the weights that it asks the context for.
    """

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterable[Judgement]:
        """Judgements of all candidates, in any order; ids <candidate id>/j<k>."""
        ...


def ids_of_judgements(judge: Judge, candidates: Sequence[Candidate]) -> list[str]:
    """Ids of all judgements that a judge makes of one prompt's candidates."""
    told = getattr(judge, "judgement_ids", None)
    if told is not None:
        return told(candidates)
    numbers = range(getattr(judge, "num_judgements", 1))
    return [f"{candidate.id}/j{k}" for candidate in candidates for k in numbers]


def judged_scores(
    judge: Judge, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
) -> dict[str, float | None]:
    """What a judge's judgements come to for each of one prompt's candidates, by its id."""
    return getattr(judge, "scores", candidate_scores)(candidates, judgements)


def filtered_out(
    judge: Judge, candidates: Sequence[Candidate], judgements: Iterable[Judgement]
) -> set[str]:
    """Ids of the candidates that a judge lets through to no pair, whatever their score."""
    told = getattr(judge, "filtered", None)
    return set() if told is None else told(candidates, judgements)


def weights_of_judge(judge: Any) -> set[str]:
    """Names of the weights that a judge asks for: "initial", stages, paths."""
    return getattr(judge, "weights_used", set)()
