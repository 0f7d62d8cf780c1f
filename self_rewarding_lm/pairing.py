"""From scored candidates to a preference pair; everything that is dropped is counted by reason.

Knows nothing of models, tensors or files.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from self_rewarding_lm.records import Candidate, PreferencePair, Prompt

PickPair = Callable[[Sequence[float | None]], tuple[int, int]]


@dataclass
class DropCounts:
    """Why prompts gave no pair, and why candidates were not considered."""

    prompts: Counter[str] = field(default_factory=Counter)
    candidates: Counter[str] = field(default_factory=Counter)
    kept: int = 0

    def add(self, other: "DropCounts") -> None:
        """Count what another counted too."""
        self.prompts.update(other.prompts)
        self.candidates.update(other.candidates)
        self.kept += other.kept

    def metrics(self) -> dict[str, int]:
        """`pairs/kept`, `pairs/dropped_<reason>` and `candidates/dropped_<reason>`."""
        prompts = {f"pairs/dropped_{k}": n for k, n in sorted(self.prompts.items()) if n}
        candidates = {f"candidates/dropped_{k}": n for k, n in sorted(self.candidates.items())}
        return {"pairs/kept": self.kept, **prompts, **candidates}

    def in_words(self) -> str:
        """For a message: '3 tie, 1 unfinished'."""
        return ", ".join(f"{n} {reason}" for reason, n in self.prompts.most_common() if n) or "none"


def best_against_worst(scores: Sequence[float | None]) -> tuple[int, int]:
    """Indices of the highest and the lowest score; the first of several (arXiv:2401.10020, 2.3)."""
    valid = [i for i, score in enumerate(scores) if score is not None]
    best = max(valid, key=lambda i: (scores[i], -i))
    worst = min(valid, key=lambda i: (scores[i], i))
    return best, worst


def make_pair(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    scores: Mapping[str, float | None],
    drops: DropCounts,
    *,
    pick: PickPair = best_against_worst,
    is_valid_score: Callable[[float], bool] | None = None,
    is_valid_pair: Callable[[float, float], bool] | None = None,
    min_margin: float = 0.0,
) -> PreferencePair | None:
    """The pair of one prompt's candidates, or None; `drops` counts what was dropped and why.

    `scores` maps candidate ids to scores. Unfinished and unscored candidates are left out first.
    A prompt is dropped as `unfinished`, `unscored` or `invalid_score` (fewer than two candidates
    are left after that filter), `tie` (the same score), `identical` (the two texts are the same),
    `margin` (their difference is under `min_margin`) or `invalid_pair` (`is_valid_pair` says no).
    """

    def drop(reason: str) -> None:
        drops.prompts[reason] += 1

    filters: list[tuple[str, Callable[[Candidate], bool]]] = [
        ("unfinished", lambda c: c.finished is not False),
        ("unscored", lambda c: scores.get(c.id) is not None),
        ("invalid_score", lambda c: is_valid_score is None or bool(is_valid_score(scores[c.id]))),  # type: ignore[arg-type]
    ]
    left = list(candidates)
    for reason, keep in filters:
        kept = [c for c in left if keep(c)]
        drops.candidates.update({reason: len(left) - len(kept)} if len(kept) < len(left) else {})
        left = kept
        if len(left) < 2:
            return drop(reason)
    chosen, rejected = (left[i] for i in pick([scores[c.id] for c in left]))
    best, worst = scores[chosen.id], scores[rejected.id]
    assert best is not None and worst is not None
    if best == worst:
        return drop("tie")
    if _same_response(chosen, rejected):
        return drop("identical")
    if abs(best - worst) < min_margin:
        return drop("margin")
    if is_valid_pair is not None and not is_valid_pair(best, worst):
        return drop("invalid_pair")
    drops.kept += 1
    return PreferencePair(
        id=prompt.id,
        prompt_ids=prompt.ids,
        chosen_ids=chosen.ids,
        rejected_ids=rejected.ids,
        prompt=prompt.text,
        chosen=chosen.text,
        rejected=rejected.text,
        chosen_id=chosen.id,
        rejected_id=rejected.id,
        chosen_score=best,
        rejected_score=worst,
        messages=prompt.messages,
    )


def _same_response(one: Candidate, other: Candidate) -> bool:
    if one.ids == other.ids:
        return True
    return one.text is not None and one.text.strip() == (other.text or "").strip()
