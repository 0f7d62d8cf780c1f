"""From scored candidates to preference pairs; everything that is dropped is counted by reason.

Knows nothing of models, tensors or files. Importing this needs no torch.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import inf
from typing import Annotated, Literal

from pydantic import Field, model_validator

from self_rewarding_lm.config import Config
from self_rewarding_lm.records import Candidate, Judgement, PreferencePair, Prompt, same_text
from self_rewarding_lm.scores import Number, exact, exact_sum

Rho = Annotated[float, Field(ge=0, le=1)]


Pick = Literal["best_worst", "best_random", "top_bottom", "all_margins"]


class PairingConfig(Config):
    """How pairs are picked from scored candidates (docs/pairs.md).

    A candidate's length is counted in characters of its text, or in tokens if it has no text.
    """

    pick: Pick = "best_worst"
    """best_worst (arXiv:2401.10020, 2.3); best_random: the best against another one, drawn at
    random; top_bottom: the j-th best against the j-th worst; all_margins: any two, those with the
    greatest difference of scores first."""
    pairs_per_prompt: int = Field(default=1, ge=1)
    """Pairs of one prompt at most; best_worst gives one."""
    length_control: Rho | tuple[Rho, ...] = 0.0
    """rho of Meta-Rewarding (arXiv:2407.19594, 2.2), for best_worst: of the candidates whose score
    is within rho of the best the shortest wins, of those within rho of the worst the longest loses;
    rho is a share of the spread of scores. A tuple: one for each round, the last for all later
    ones. 0: off."""
    length_penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Subtracted from a score for each 1,000 characters; candidates are compared by the rest."""
    max_chosen_length: int | None = Field(default=None, ge=1)
    """Greatest length of a winner (2,500 in the first round of arXiv:2407.19594)."""
    min_chosen_score: float | None = Field(default=None, allow_inf_nan=False)
    """Least score of a winner (tau of arXiv:2411.04109)."""
    tie_break: Literal["first", "shorter", "variance"] = "first"
    """Which of several candidates with the best or the worst score is taken: "first", the first
    sampled; "shorter", the shortest of the best and the longest of the worst; "variance", the one
    whose judgements vary least."""
    weight_by_margin: bool = False
    """Weight each pair's loss by the difference of its two scores (arXiv:2411.04109)."""

    @model_validator(mode="after")
    def _go_together(self) -> "PairingConfig":
        if self.pick == "best_worst" and self.pairs_per_prompt > 1:
            raise ValueError(
                "pick best_worst gives one pair a prompt; for pairs_per_prompt "
                f"{self.pairs_per_prompt} take top_bottom, best_random or all_margins"
            )
        if self.length_control == ():
            raise ValueError("length_control has no value; give a number, or one a round")
        if self.pick != "best_worst" and self.length_control != 0.0:
            raise ValueError(
                f"length_control is a rule for pick best_worst; pick is {self.pick}. A "
                "length_penalty goes with all"
            )
        return self

    @property
    def picks_otherwise(self) -> bool:
        """Whether it says who is picked, other than by default."""
        names = ("pick", "pairs_per_prompt", "length_control", "length_penalty", "tie_break")
        return any(getattr(self, n) != type(self).model_fields[n].default for n in names)

    def of_round(self, round: int) -> "PairingConfig":
        """The settings of one round, from 0 on, with one length_control."""
        if not isinstance(self.length_control, tuple):
            return self
        place = min(round, len(self.length_control) - 1)
        return self.model_copy(update={"length_control": self.length_control[place]})


ROUNDING = 1e-9
"""Share of the spread of scores by which a limit of length control may be missed by rounding."""


@dataclass
class DropCounts:
    """Why prompts gave no pair, and why candidates were not considered. kept: pairs."""

    prompts: Counter[str] = field(default_factory=Counter)
    candidates: Counter[str] = field(default_factory=Counter)
    kept: int = 0

    def add(self, other: "DropCounts") -> None:
        """Count what another counted too."""
        self.prompts.update(other.prompts)
        self.candidates.update(other.candidates)
        self.kept += other.kept

    def metrics(self, made: str = "pairs", of: str = "pairs") -> dict[str, int]:
        """`pairs/kept`, `pairs/dropped_<reason>` and `candidates/dropped_<reason>`.

        made: in place of "pairs", what is kept. of: what is dropped with a whole prompt.
        """
        prompts = {f"{of}/dropped_{k}": n for k, n in sorted(self.prompts.items()) if n}
        candidates = {f"candidates/dropped_{k}": n for k, n in sorted(self.candidates.items())}
        return {f"{made}/kept": self.kept, **prompts, **candidates}

    def in_words(self) -> str:
        """For a message: '3 tie, 1 unfinished'."""
        return ", ".join(f"{n} {reason}" for reason, n in self.prompts.most_common() if n) or "none"


@dataclass(frozen=True)
class Rated:
    """A candidate with the numbers by which it is picked.

    value: its score less the length penalty, by which it is compared; exact, so that rounding makes
    no difference of a tie. length: see `length_of`. variance: of its judgements; infinite if it is
    not known.
    """

    candidate: Candidate
    score: float
    value: Number
    length: int
    variance: Number = inf


Picker = Callable[[Sequence[Rated]], Iterable[tuple[Rated, Rated]]]
"""Who is chosen and who is rejected, in the order in which the pairs are wanted."""


def make_pairs(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    scores: Mapping[str, float | None],
    drops: DropCounts,
    *,
    pairing: PairingConfig,
    pick: Picker | None = None,
    noise: Callable[[str], int] | None = None,
    variances: Mapping[str, Number] = {},
    is_valid_score: Callable[[float], bool] | None = None,
    is_valid_pair: Callable[[float, float], bool] | None = None,
    min_margin: float = 0.0,
) -> list[PreferencePair]:
    """The pairs of one prompt's candidates; `drops` counts what was dropped and why.

    scores, variances: by candidate ids. pick: in place of the settings' own. noise: a number for an
    id, by which best_random draws. The first pair has the prompt's id, the next ones
    `<prompt id>/p1`, `/p2` and so on.

    Unfinished and unscored candidates are left out first. A prompt is dropped as `unfinished`,
    `unscored` or `invalid_score` (fewer than two candidates are left after that filter), `unpaired`
    (nothing is picked), or, where nothing that is picked can be a pair, for what is wrong with the
    first: `tie` (the same score), `identical` (the same response), `inverted` (the winner is the
    worse one), `margin` (their difference is under `min_margin`), `low_score`, `too_long_chosen`
    (limits of the settings) or `invalid_pair` (`is_valid_pair` says no).
    """
    # 1. leave out the candidates that cannot be in a pair
    rated = _rated(candidates, scores, drops, pairing.length_penalty, variances, is_valid_score)
    # 2. pick, and take those that can be pairs
    pairs, problems = list[PreferencePair](), list[str]()
    picks = pick or picker(pairing, noise)
    for chosen, rejected in picks(rated) if rated else ():
        problem = _problem(chosen, rejected, pairing, min_margin, is_valid_pair)
        if problem == "inverted" and pick is not None:  # a picker of the caller's may mean it
            problem = None
        if problem is not None:
            problems.append(problem)
            continue
        pair_id = f"{prompt.id}/p{len(pairs)}" if pairs else prompt.id
        pairs.append(_pair(pair_id, prompt, chosen, rejected, weighted=pairing.weight_by_margin))
        if len(pairs) == pairing.pairs_per_prompt:
            break
    # 3. count
    drops.kept += len(pairs)
    if rated and not pairs:
        drops.prompts[problems[0] if problems else "unpaired"] += 1
    return pairs


def picker(pairing: PairingConfig, noise: Callable[[str], int] | None = None) -> Picker:
    """The picker that settings of one round name; noise: for best_random."""
    rho = pairing.length_control
    assert isinstance(rho, float), "PairingConfig.of_round has one"

    def best_worst(rated: Sequence[Rated]) -> Iterable[tuple[Rated, Rated]]:
        best, worst = ranked(rated, pairing.tie_break)
        return [_length_controlled(best, worst, rho) if rho else (best[0], worst[0])]

    def best_random(rated: Sequence[Rated]) -> Iterable[tuple[Rated, Rated]]:
        assert noise is not None
        best, *others = ranked(rated, pairing.tie_break)[0]
        drawn = sorted((noise(one.candidate.id), place) for place, one in enumerate(others))
        return [(best, others[place]) for _, place in drawn]

    def top_bottom(rated: Sequence[Rated]) -> Iterable[tuple[Rated, Rated]]:
        best, worst = ranked(rated, pairing.tie_break)
        return list(zip(best, worst, strict=True))[: len(rated) // 2]

    def all_margins(rated: Sequence[Rated]) -> Iterable[tuple[Rated, Rated]]:
        twos = combinations(ranked(rated, pairing.tie_break)[0], 2)
        return sorted(twos, key=lambda two: two[1].value - two[0].value)

    return {f.__name__: f for f in (best_worst, best_random, top_bottom, all_margins)}[pairing.pick]


def ranked(rated: Sequence[Rated], tie_break: str) -> tuple[list[Rated], list[Rated]]:
    """The best first, and the worst first; of equal ones whom tie_break names, then the first."""

    def key(one: Rated, sign: int) -> tuple[Number, Number]:
        ties = {"first": 0, "shorter": sign * one.length, "variance": one.variance}
        return -sign * one.value, ties[tie_break]

    return sorted(rated, key=lambda r: key(r, 1)), sorted(rated, key=lambda r: key(r, -1))


def _length_controlled(
    best: Sequence[Rated], worst: Sequence[Rated], rho: float
) -> tuple[Rated, Rated]:
    """The shortest near the best, the longest near the worst (arXiv:2407.19594, 2.2)."""
    high, low = best[0].value, worst[0].value
    span = rho * (high - low) * (1 + ROUNDING)
    return (
        min((one for one in best if one.value >= high - span), key=lambda r: r.length),
        max((one for one in worst if one.value <= low + span), key=lambda r: r.length),
    )


def score_variances(judgements: Iterable[Judgement]) -> dict[str, Number]:
    """The variance of each candidate's scores by its id; candidates judged once are left out.

    So are those whose score is that of another candidate. A judgement of two candidates gives its
    score to the first, and 1 less its score to the second.
    """
    judgements = list(judgements)
    scores_by_id: dict[str, list[Number]] = {}
    for judgement in judgements:
        if judgement.score is not None:
            score = exact(judgement.score)
            pair = zip(judgement.candidate_ids, (score, 1 - score), strict=False)
            for candidate_id, own_score in pair:
                scores_by_id.setdefault(candidate_id, []).append(own_score)
    moved = {j.candidate_ids[0] for j in judgements if j.is_moved}
    variances = {}
    for candidate_id, scores in scores_by_id.items():
        if len(scores) > 1 and candidate_id not in moved:
            mean = exact_sum(scores) / len(scores)
            variances[candidate_id] = exact_sum((s - mean) ** 2 for s in scores) / len(scores)
    return variances


Filters = dict[str, Callable[[Candidate], bool]]
"""By the reason that is counted for a candidate that does not pass."""

WHOLE: Filters = {"unfinished": lambda c: c.finished is not False}
"""What a response must be to be learnt from, whatever it is scored."""


def learnable(candidates: Sequence[Candidate], drops: DropCounts, *, least: int) -> list[Candidate]:
    """The candidates that can be learnt from, whatever they are scored; [] if fewer than `least`.

    They have a response, and it was not cut off. Counts as `passing` does.
    """
    reasons = dict.fromkeys(c.reason for c in candidates if c.reason is not None)
    responses = {reason: lambda c, given=reason: c.reason != given for reason in reasons}
    return passing(candidates, {**responses, **WHOLE}, drops, least=least)


def pairable(
    candidates: Sequence[Candidate],
    drops: DropCounts,
    *,
    may_win: Callable[[Candidate], bool] | None = None,
    max_chosen_length: int | None = None,
) -> list[Candidate]:
    """The candidates of a prompt that can be in a pair, whatever they are scored; [] if none can.

    They are `learnable`, two of them differ, and each may win or differs from one that may: one
    that is no longer than `max_chosen_length` and of which `may_win` says so. If there is no pair,
    the prompt is dropped as `identical`, `unpaired` (none may win) or `too_long_chosen`, or as
    `learnable` says.
    """
    left = learnable(candidates, drops, least=2)
    allowed = [c for c in left if may_win is None or may_win(c)]
    longest = inf if max_chosen_length is None else max_chosen_length
    winners = [c for c in allowed if length_of(c) <= longest]
    problems = {
        "identical": lambda: all(same_text(left[0], c) for c in left[1:]),
        "unpaired": lambda: not allowed,
        "too_long_chosen": lambda: not winners,
    }
    problem = next((name for name, holds in problems.items() if left and holds()), None)
    if problem is not None:
        drops.prompts[problem] += 1
        return []
    # who may not win and says what every winner says can neither win nor lose
    kept = [c for c in left if c in winners or not all(same_text(c, w) for w in winners)]
    if len(kept) < len(left):
        drops.candidates["identical"] += len(left) - len(kept)
    return kept


def score_filters(
    scores: Mapping[str, float | None], is_valid_score: Callable[[float], bool] | None
) -> Filters:
    """What a candidate must be to be learnt from: finished, and with a score that is valid."""
    return {
        **WHOLE,
        "unscored": lambda c: scores.get(c.id) is not None,
        "invalid_score": lambda c: is_valid_score is None or bool(is_valid_score(scores[c.id])),  # type: ignore[arg-type]
    }


def passing(
    candidates: Sequence[Candidate], filters: Filters, drops: DropCounts, *, least: int
) -> list[Candidate]:
    """The candidates that pass all filters, one filter after the other.

    Counts the others by reason. Returns [], and counts the prompt too, at the first filter after
    which fewer than `least` remain.
    """
    left = list(candidates)
    for reason, passes in filters.items():
        kept = [c for c in left if passes(c)]
        drops.candidates.update({reason: len(left) - len(kept)} if len(kept) < len(left) else {})
        left = kept
        if len(left) < least:
            drops.prompts[reason] += 1
            return []
    return left


def _rated(
    candidates: Sequence[Candidate],
    scores: Mapping[str, float | None],
    drops: DropCounts,
    penalty: float,
    variances: Mapping[str, Number],
    is_valid_score: Callable[[float], bool] | None,
) -> list[Rated]:
    """The candidates that may be picked; [], and the prompt is dropped, if fewer than two may."""
    left = passing(candidates, score_filters(scores, is_valid_score), drops, least=2)
    known = [(c, score, length_of(c)) for c in left if (score := scores[c.id]) is not None]
    each = exact(penalty)
    return [
        Rated(one, score, exact(score) - each * length / 1000, length, variances.get(one.id, inf))
        for one, score, length in known
    ]


def _problem(
    chosen: Rated,
    rejected: Rated,
    pairing: PairingConfig,
    min_margin: float,
    is_valid_pair: Callable[[float, float], bool] | None,
) -> str | None:
    """Why two candidates cannot be a pair; None if they can."""
    margin = chosen.value - rejected.value
    least, most = pairing.min_chosen_score, pairing.max_chosen_length
    problems = {
        "tie": lambda: margin == 0,
        "identical": lambda: same_text(chosen.candidate, rejected.candidate),
        "margin": lambda: abs(margin) < exact(min_margin),
        "low_score": lambda: least is not None and chosen.score < least,
        "too_long_chosen": lambda: most is not None and chosen.length > most,
        "invalid_pair": lambda: (
            is_valid_pair is not None and not is_valid_pair(chosen.score, rejected.score)
        ),
        "inverted": lambda: margin < 0,
    }
    return next((name for name, holds in problems.items() if holds()), None)


def _pair(
    pair_id: str, prompt: Prompt, chosen: Rated, rejected: Rated, *, weighted: bool
) -> PreferencePair:
    one, other = chosen.candidate, rejected.candidate
    return PreferencePair(
        id=pair_id,
        prompt_ids=prompt.ids,
        chosen_ids=one.ids,
        rejected_ids=other.ids,
        prompt=prompt.text,
        chosen=one.text,
        rejected=other.text,
        chosen_id=one.id,
        rejected_id=other.id,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        messages=prompt.messages,
        weight=float(abs(chosen.value - rejected.value)) if weighted else None,
    )


def length_of(candidate: Candidate) -> int:
    """Characters of its text; tokens if it has none."""
    return len(candidate.ids) if candidate.text is None else len(candidate.text)
