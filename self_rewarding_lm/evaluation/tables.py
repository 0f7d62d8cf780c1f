"""What an evaluation found, as aligned lines of text: a judge, or two models side by side."""

from collections.abc import Sequence

from self_rewarding_lm.evaluation.head_to_head import Comparison, Side
from self_rewarding_lm.evaluation.judge_quality import JudgeEvaluation
from self_rewarding_lm.stats import Interval, Rate
from self_rewarding_lm.text import aligned


def judge_table(found: "JudgeEvaluation") -> str:
    """A judge's measures in lines."""
    own, pairs, at = found.agreement, found.agreement.pairs, found.intervals
    rows = [
        ("pairwise accuracy", pairs.accuracy, at["accuracy"], _of(pairs.agree + pairs.disagree)),
        ("  ties as a half", pairs.accuracy_ties_half, at["accuracy_ties_half"], ""),
        ("  tie rate", pairs.tie_rate, at["tie_rate"], f"{pairs.tied} tied"),
        ("5-best", own.best_precision, at["best_precision"], f"of {own.best_count} top scores"),
        ("exact match", own.exact_match, at["exact_match"], f"of {own.ordered} instructions"),
        ("Spearman", own.spearman, at["spearman"], f"{own.uncorrelated} undefined, left out"),
        ("Kendall tau-b", own.kendall, at["kendall"], f"{own.uncorrelated} undefined, left out"),
        ("parse rate", found.parse_rate, None, f"of {len(found.judgements)} judgements"),
        ("self-agreement", found.self_agreement, None, "same score, not corrected for chance"),
    ]
    if found.position is not None:
        seen = found.position
        words = f"of {seen.first + seen.second} verdicts, {seen.ties} ties"
        rows.append(("for the first shown", seen.first_share, None, words))
        rows.append(("both orders agree", seen.consistency, None, f"of {seen.compared} pairs"))
    if found.calibration is not None:
        words = f"bins of 0.1, {found.calibration.pairs} pairs"
        rows.append(("calibration error", found.calibration.error, None, words))
    head = f"{own.replies} replies to {own.instructions} prompts in {own.groups} groups"
    lines = [head, "", *_measures_in_lines(rows)]
    if found.calibration is not None:
        bins = [
            (f"{b.predicted:.2f}", f"{b.agreed:.2f}", f"{b.count}") for b in found.calibration.bins
        ]
        lines += ["", *aligned([("how sure", "people agree", "pairs"), *bins], ">")]
    if found.histogram:
        counts = [(f"{score:.1f}", f"{count}") for score, count in found.histogram.items()]
        lines += ["", *aligned([("score", "judgements"), *counts], "><")]
    return "\n".join(lines)


def comparison_table(found: "Comparison", names: Sequence[str]) -> str:
    """A comparison in lines; `names` of both models."""
    rates = found.rates
    shown: list[tuple[str, Rate, str]] = [
        ("won", rates.won, f"{rates.wins}"),
        ("tied", rates.tied, f"{rates.ties}"),
        ("lost", rates.lost, f"{rates.losses}"),
        ("win rate", rates.win_rate, "ties as a half"),
        ("  length-controlled", rates.length_controlled, "had both been as long"),
    ]
    rows = [(label, rate.value, rate.interval, words) for label, rate, words in shown]
    if found.position is not None:
        rows.append(("for the first shown", found.position.first_share, None, "of verdicts"))
        rows.append(("both orders agree", found.position.consistency, None, "of pairs"))
    first, second = _measures(found.first), _measures(found.second)
    unknown = f", {rates.unknown} without a verdict" if rates.unknown else ""
    lines = [f"{names[0]} against {names[1]}: {rates.prompts} prompts{unknown}", ""]
    sides = [(f"{label:18}", _number(first[label]), _number(second[label])) for label in first]
    lines += [*_measures_in_lines(rows), "", *aligned([("", "first", "second"), *sides], "<>")]
    return "\n".join(lines)


def _measures(side: "Side") -> dict[str, float | None]:
    seen = side.responses
    return {
        **({} if side.reward is None else {"held-out reward": side.reward.value}),
        **({} if side.accuracy is None else {"accuracy": side.accuracy.value}),
        **{f"pass@{k}": value for k, value in side.pass_at.items() if k > 1},
        "characters": seen.characters,
        "tokens": side.tokens,
        "cut off": side.clipped,
        **{f"distinct-{n}": value for n, value in seen.distinct.items()},
        "repeated 3-grams": seen.repetition,
    }


def _of(count: int) -> str:
    return f"of {count} untied pairs"


def _measures_in_lines(rows: Sequence[tuple[str, float | None, Interval, str]]) -> list[str]:
    """A measure a line, with its interval and words about it."""
    cells = [
        (
            f"{label:20}",
            _number(value),
            "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
            words,
        )
        for label, value, interval, words in rows
    ]
    return aligned(cells, "<><")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
