"""Measures of a stage's candidates and judgements, counted prompt by prompt, and their checks.

Only numbers are kept of a prompt, and sums are exact, so neither the order of the prompts nor the
number of processes changes a measure. The checks look at the counts while they grow.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from itertools import combinations, islice
from typing import Any

from self_rewarding_lm.checks import PAGE, Checker
from self_rewarding_lm.errors import setting
from self_rewarding_lm.generation.score_trie import MIN_SCORE_MASS
from self_rewarding_lm.judges.asking import FIRST_LOOK
from self_rewarding_lm.records import Candidate, Judgement, MetaJudgement
from self_rewarding_lm.scores import both_orders, candidate_scores
from self_rewarding_lm.text import amount


@dataclass
class Share:
    """A part of a whole; `part` is an exact fraction as long as all parts are finite."""

    part: Any = 0
    whole: int = 0

    def add(self, part: float, whole: int) -> None:
        """Add to the part and to the whole."""
        exact = isinstance(part, float) and math.isfinite(part)
        self.part += Fraction(part) if exact else part
        self.whole += whole


@dataclass
class JudgeTally:
    """Counts of a judge's judgements; those of all candidates of a prompt are added at once."""

    parsed: Share = field(default_factory=Share)
    score: Share = field(default_factory=Share)
    self_agreement: Share = field(default_factory=Share)
    position_agreement: Share = field(default_factory=Share)
    tie: Share = field(default_factory=Share)
    mass: Share = field(default_factory=Share)
    forced: Share = field(default_factory=Share)
    cut: Share = field(default_factory=Share)
    too_long: Share = field(default_factory=Share)
    rounded: Counter[float] = field(default_factory=Counter)

    def add(
        self,
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
        scores: Mapping[str, float | None] | None = None,
    ) -> None:
        """Count one or more prompts. scores: by candidate id; default `candidate_scores`."""
        self._add_singles(judgements)
        known = candidate_scores(candidates, judgements) if scores is None else scores
        by_prompt: dict[str, list[float]] = {}
        for candidate in candidates:
            if (score := known[candidate.id]) is not None:
                by_prompt.setdefault(candidate.prompt_id, []).append(score)
        several = [of_prompt for of_prompt in by_prompt.values() if len(of_prompt) >= 2]
        self.tie.add(sum(max(s) == min(s) for s in several), len(several))
        compared = both_orders(j for j in judgements if len(j.candidate_ids) == 2).values()
        orders = [(there, back) for there, back in compared if None not in (there, back)]
        self.position_agreement.add(sum(a == b for a, b in orders), len(orders))
        self.parsed.add(sum(j.score is not None for j in judgements), len(judgements))
        masses = [j.score_mass for j in judgements if j.score_mass is not None]
        self.mass.add(math.fsum(masses), len(masses))
        self.forced.add(sum(j.source == "forced" for j in judgements), len(judgements))
        self.cut.add(sum(j.finished is False for j in judgements), len(judgements))
        self.too_long.add(sum(j.reason == "too_long" for j in judgements), len(judgements))

    def _add_singles(self, judgements: Sequence[Judgement]) -> None:
        """Count judgements of one candidate, and how far several by one judge agree."""
        singles: dict[tuple[str, str], list[float]] = {}
        for j in judgements:
            if j.score is not None and len(j.candidate_ids) == 1:
                singles.setdefault((j.candidate_ids[0], j.judge), []).append(j.score)
        for scores in singles.values():
            self.score.add(math.fsum(scores), len(scores))
            rounded = [round(score, 1) for score in scores]
            self.rounded.update(rounded)
            pairs = list(combinations(rounded, 2))
            self.self_agreement.add(sum(a == b for a, b in pairs), len(pairs))

    def metrics(self) -> dict[str, float]:
        """The measures that `judge_metrics` describes."""
        modal = Share(max(self.rounded.values(), default=0), self.score.whole)
        shares = {
            "judge/parse_rate": self.parsed,
            "judge/score_mean": self.score,
            "judge/modal_share": modal,
            "judge/self_agreement": self.self_agreement,
            "judge/position_agreement": self.position_agreement,
            "judge/tie_rate": self.tie,
            "judge/score_mass": self.mass,
            "judge/forced_share": self.forced if self.forced.part else Share(),
            "judge/cut": self.cut if self.cut.part else Share(),
            "judge/too_long": self.too_long if self.too_long.part else Share(),
        }
        return {name: float(s.part / s.whole) for name, s in shares.items() if s.whole}


@dataclass
class StageTally:
    """Counts of a stage's prompts, candidates and judgements; see `together` for processes."""

    prompts: int = 0
    candidates: int = 0
    judgements: int = 0
    skipped: int = 0
    """Responses that no judge was shown, for no pair could have them."""
    answered: int = 0
    tokens: int = 0
    clipped: int = 0
    encoded: int = 0
    judge: JudgeTally = field(default_factory=JudgeTally)

    def add(
        self,
        candidates: Sequence[Candidate],
        judgements: Sequence[Judgement],
        scores: Mapping[str, float | None] | None = None,
        *,
        skipped: int = 0,
        again: bool = False,
    ) -> None:
        """Count one prompt. scores: of its candidates, as in a JudgeTally. skipped: of these.

        again: whether other candidates of the prompt were counted before.
        """
        self.prompts += not again
        self.skipped += skipped
        self.candidates += len(candidates)
        self.judgements += len(judgements)
        lengths = [len(c.ids) for c in candidates if c.reason is None]
        self.answered += len(lengths)
        self.tokens += sum(lengths)
        self.clipped += sum(c.finished is False for c in candidates)
        self.encoded += sum(c.tokens is not None for c in candidates)
        self.judge.add(candidates, judgements, scores)

    def metrics(self) -> dict[str, float]:
        """`completions/...` and `judge/...`; re_encoded and skipped only if there are any."""
        return {
            "completions/mean_length": self.tokens / max(1, self.answered),
            "completions/clipped_ratio": self.clipped / max(1, self.answered),
            **({"completions/re_encoded": self.encoded} if self.encoded else {}),
            **({"judge/skipped": self.skipped} if self.skipped else {}),
            **self.judge.metrics(),
        }


def together(tallies: Sequence[Any]) -> Any:
    """The sum of several tallies of one kind, field by field."""
    first = tallies[0]
    if not isinstance(first, JudgeTally | StageTally | Share):
        return sum(tallies[1:], first)
    names = [f.name for f in fields(first)]
    return type(first)(**{n: together([getattr(t, n) for t in tallies]) for n in names})


def judge_metrics(
    candidates: Sequence[Candidate], judgements: Sequence[Judgement]
) -> dict[str, float]:
    """Measures of a judge on a stage's candidates; a measure of nothing is left out.

    judge/parse_rate: the share of judgements with a score. judge/tie_rate: the share of prompts
    with two scored candidates whose best and worst score are equal. judge/score_mass: the mean
    probability of all allowed scores together. judge/forced_share: the share of judgements whose
    ending was forced, if any was. judge/cut: the share of judgements whose text was cut off, if any
    was. judge/too_long: the share that has no score because the text to be judged, or the judge's
    prompt with it, is longer than the model takes, if any is.
    Of judgements of one candidate: judge/score_mean; judge/modal_share, the share of the commonest
    score (1.0 for a judge that always gives the same); judge/self_agreement, the share of pairs of
    judgements of a candidate by one judge that give the same score. The last two round scores to
    one decimal.
    Of judgements of two candidates: judge/position_agreement, the share of comparisons known in
    both orders that have the same verdict in both.
    """
    tally = JudgeTally()
    tally.add(candidates, judgements)
    return tally.metrics()


SHOWN = 3  # unreadable texts of a judge that an error shows


ADVICE = (
    "Change one of these: train the model on judge examples first (an SFT stage); make the "
    "reward prompt's reward_regex_template, score_range, marks or parse_reward fit what the judge "
    "writes; set its forced_ending, which takes a score where none is written; raise "
    "judging.max_new_tokens if its texts are cut off; use another "
    "rewarding_model; or lower min_parse_rate."
)


def unread_reasons(judgements: Iterable[Judgement | MetaJudgement]) -> str:
    """Why judgements have no score, counted, the commonest first; "" if all have one."""
    reasons = Counter(str(j.reason) for j in judgements if j.score is None).most_common()
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons)


def unread_texts(judgements: Iterable[Judgement | MetaJudgement]) -> str:
    """The first judgements without a score in lines: the reason, and what the judge wrote."""
    unread = islice((j for j in judgements if j.score is None), SHOWN)
    return "\n".join(f"  {j.reason}: {(j.text or '')[:300]!r}" for j in unread)


AT_ONCE_ADVICE = (
    "Change one of these: end the prompt_template so that a number is what must follow (it is "
    "asked "
    "after the words before {{{{ reward }}}} of reward_regex_template); train the model on judge "
    "examples first (an SFT stage); {}, by which it writes a review before its score; use another "
    "rewarding_model; or lower min_parse_rate."
)
"""What can be done where a score is asked for at once and none is likely."""


class JudgeWatcher:
    """Checks the judgements of a stage on one of `world` processes.

    Its methods return the text of an error, or None: all processes have to raise it together.
    """

    def __init__(self, checker: Checker, *, min_parse_rate: float, world: int = 1) -> None:
        self.checker, self.min_parse_rate = checker, min_parse_rate
        self.look = math.ceil(FIRST_LOOK / world)
        self.scored = self.judged = self.not_finite = 0
        self.unread: list[Judgement | MetaJudgement] = []
        """The first judgements without a score, which an error shows."""

    def count(self, judgements: Sequence[Judgement | MetaJudgement]) -> None:
        """Count judgements: new ones, or those that an earlier attempt stored."""
        self.judged += len(judgements)
        without = [j for j in judgements if j.score is None]
        self.scored += len(judgements) - len(without)
        self.not_finite += sum(j.reason == "not_finite" for j in without)
        self.unread += without[: SHOWN - len(self.unread)]

    def see_new(self, judgements: Sequence[Judgement]) -> str | None:
        """The check `scores_not_finite`, of judgements that are counted and not stored yet."""
        ids = [j.id for j in judgements if j.reason == "not_finite"]
        if not ids:
            return None
        return self.checker.failing(
            "scores_not_finite",
            self.not_finite / self.judged,
            f"{self.not_finite} of {amount(self.judged, 'judgement')} gave NaN or infinity, such "
            f"as {', '.join(ids[:8])}. A reward function or module has to give finite numbers, or "
            "None if there is no score; with a judging model its logits are not finite: the "
            "training before has diverged, or its type is too narrow. The last ones are not "
            "stored and will be judged again.",
        )

    def see_parsed(
        self, stage: str, where: object, *, noun: str = "judgements", advice: str = ADVICE
    ) -> str | None:
        """The check `min_parse_rate`. where: the stage's folder. noun: names what was counted."""
        if self.judged < self.look or self.scored >= self.min_parse_rate * self.judged:
            return None
        if all(j.reason == "low_mass" and not j.text for j in self.unread):
            masses = ", ".join(f"{j.score_mass:.2g}" for j in self.unread)
            shown = (
                "The judge is asked for its score at once and writes no text. There all the scores "
                f"that it may give had so little probability together: {masses}; at least "
                f"{MIN_SCORE_MASS:g} counts.\n"
            )
            advice = AT_ONCE_ADVICE.format(setting("forced_ending", True))
        else:
            shown = f"Three of the judge's texts:\n{unread_texts(self.unread)}\n"
        return (
            f"{stage}: only {self.scored} of {self.judged} {noun} "
            f"({self.scored / self.judged:.0%}) gave a score; at least "
            f"{self.min_parse_rate:.0%} must. {shown}"
            f"{advice} All records made so far are kept in {where}. "
            f"(check min_parse_rate, told in {PAGE}.)"
        )

    def see_scores(self, tally: JudgeTally) -> str | None:
        """The checks `one_score`, `follows_position` and `ties`, of all judgements so far.

        Scores that tie because the judge follows the position are no matter for `ties`.
        """
        metrics, failure = tally.metrics(), None
        if tally.score.whole >= self.look:
            commonest, count = tally.rounded.most_common(1)[0]
            failure = self.checker.failing(
                "one_score",
                metrics["judge/modal_share"],
                f"{count} of {tally.score.whole} scores are {commonest:g} (rounded to one decimal; "
                "judge/modal_share): the judge does not tell responses apart, and what is left are "
                "ties and noise. "
                f"If it writes its scores, take {setting('score_mode', 'expected')}; or take a "
                "comparison, another reward prompt or "
                "rewarding_model, train it on judge examples first, or, if it marks the items "
                "of a rubric and adds them up badly, count its marks (`marks` of the reward "
                "prompt). Where scores differ by "
                "less than 0.1 on purpose, switch this check off.",
            )
        agreed = metrics.get("judge/position_agreement", 1.0)
        compared = tally.position_agreement.whole
        limit, action = self.checker.checks.of("follows_position")
        follows = action != "off" and compared >= self.look and agreed < limit
        if failure is None and follows:
            failure = self.checker.failing(
                "follows_position",
                agreed,
                f"of {compared} comparisons in both orders {agreed:.0%} have one verdict "
                "(judge/position_agreement): the judge prefers the place and not the response, the "
                "two orders cancel out, and nearly all pairs tie. More judgements or another "
                "temperature change nothing. Train the model on comparisons first "
                "(BuildEFTConfig), let it score each response by itself, or take another "
                "comparison prompt or judge.",
            )
        elif failure is None and tally.tie.whole >= self.look:
            failure = self.checker.failing(
                "ties",
                metrics["judge/tie_rate"],
                f"of {tally.tie.whole} prompts {metrics['judge/tie_rate']:.0%} have the same score "
                "for their best and their worst response (judge/tie_rate) and give no pair. Take "
                f"{setting('score_mode', 'expected')} (of a judge that writes its scores), more "
                "num_sampled_reward_responses, a higher generation.temperature or another judge.",
            )
        return failure
