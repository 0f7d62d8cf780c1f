"""What a judge should say of replies that people ranked: agreement, scores of ranks, thinning.

Pure: scores, ranks and ids in, choices and texts out.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from self_rewarding_lm.agreement import agreeing, orders_agree
from self_rewarding_lm.config import RewardConfig
from self_rewarding_lm.errors import ConfigError
from self_rewarding_lm.judges import score_parser
from self_rewarding_lm.judging import template_parts
from self_rewarding_lm.sampling import stable_hash
from self_rewarding_lm.statements import number_text

Accept = Literal["instruction", "reply"]


def first_agreeing(
    ranks: Sequence[float], scores_KG: Sequence[Sequence[float | None]], *, accept: Accept
) -> list[int | None]:
    """For each reply the first attempt whose scores agree with the ranks; None where none does.

    scores_KG: for each attempt the scores of all replies. accept: "instruction" takes or leaves
    all replies of an attempt (`agreement.orders_agree`). "reply" leaves out replies without a
    score, and takes each one that stands rightly to all others (`agreement.agreeing`), if there is
    one that people ranked differently.
    """
    picked: list[int | None] = [None] * len(ranks)
    for k, scores in enumerate(scores_KG):
        if accept == "instruction":
            places = list(range(len(ranks))) if orders_agree(ranks, scores) else []
        else:
            places = _standing_rightly(ranks, scores)
        for place in places:
            if picked[place] is None:
                picked[place] = k
    return picked


def _standing_rightly(ranks: Sequence[float], scores: Sequence[float | None]) -> list[int]:
    scored = [place for place, score in enumerate(scores) if score is not None]
    known = [ranks[place] for place in scored]
    if len(set(known)) < 2:  # nothing to compare with
        return []
    flags = agreeing(known, [scores[place] for place in scored])
    return [place for place, flag in zip(scored, flags, strict=True) if flag]


def thinned(
    of_ids: Mapping[str, float],
    *,
    seed: int,
    max_share: float | None,
    max_per_score: int | None,
    scores: Collection[float] = (),
) -> set[str]:
    """The ids that are kept where no score may be over-represented.

    of_ids: the score of each id. scores: such as count though no id may have them. All have one
    cap: the highest with which none has more than `max_share` of what is kept (with n scores that
    cannot be under 1/n, which is taken then), and not over `max_per_score`. Which ids of a score
    stay is a function of the seed and the ids.
    """
    counts = Counter(dict.fromkeys(scores, 0))
    counts.update(of_ids.values())
    cap = max(counts.values(), default=0)
    if max_share is not None and counts:
        share = max(max_share, 1 / len(counts))
        while cap > (fair := int(share * sum(min(n, cap) for n in counts.values()) + 1e-9)):
            cap = fair  # falls to the highest cap that holds
    if max_per_score is not None:
        cap = min(cap, max_per_score)
    by_score: dict[float, list[str]] = {}
    for record_id in sorted(of_ids, key=lambda i: (stable_hash(seed, "thinned", i), i)):
        by_score.setdefault(of_ids[record_id], []).append(record_id)
    return {record_id for ids in by_score.values() for record_id in ids[:cap]}


def scores_of_ranks(ranks: Sequence[float], allowed: Sequence[float]) -> list[float]:
    """Scores made of ranks: the best rank gets the highest allowed score, the worst the lowest.

    The different ranks between them are spread evenly and rounded to the nearest allowed score,
    halves up; equal ranks get equal scores. Of 0 to 5: two ranks 5, 0; three 5, 3, 0; four
    5, 3, 2, 0. With more ranks than scores neighbours share one. Needs two different ranks.
    """
    order = sorted(set(ranks))
    last, low, high = len(order) - 1, min(allowed), max(allowed)

    def score_at(place: int) -> float:
        # compared as multiples of 1/last, so that whole numbers stay exact
        wanted = high * last - place * (high - low)
        return min(allowed, key=lambda score: (abs(score * last - wanted), -score))

    return [score_at(order.index(rank)) for rank in ranks]


def score_targets(reward: RewardConfig, stage: str) -> dict[float, str]:
    """For each allowed score what a judge says to give it: the reward template, filled in.

    Raises ConfigError where the reward prompt does not say its scores (`allowed_numbers`) or has no
    template, and where it reads another score in a text.
    """
    template = reward.reward_regex_template
    allowed = reward.allowed_numbers()
    if template is None or len(allowed) < 2:
        raise ConfigError(
            f"{stage}: method='ranks' writes scores in the form of the reward prompt, which needs "
            "reward_regex_template (for example 'Score: {{ reward }}') and at least two scores, by "
            "allowed_scores or score_range."
        )
    before, after = template_parts(template)
    targets = {score: f"{before}{number_text(score)}{after}" for score in allowed}
    parse = score_parser(reward)
    for score, text in targets.items():
        if parse(text).score != score:
            raise ConfigError(
                f"{stage}: method='ranks' would teach {text!r} for the score {score:g}, but the "
                f"reward prompt reads {parse(text).score} in it."
            )
    return targets
