"""An evaluation as aligned lines of text: of a judge, or of two models side by side."""

from collections.abc import Sequence

from self_rewarding_lm.evaluation.head_to_head import Comparison, Side
from self_rewarding_lm.evaluation.judge_quality import JudgeEvaluation
from self_rewarding_lm.judges.tally import unread_reasons
from self_rewarding_lm.stats import Interval, Rate
from self_rewarding_lm.text import aligned, amount


def judge_table(evaluation: JudgeEvaluation) -> str:
    """A judge's measures, one a line."""
    agreed, pairs = evaluation.agreement, evaluation.agreement.pairs
    interval, undefined = evaluation.intervals, f"{agreed.uncorrelated} undefined, left out"
    untied = f"of {amount(pairs.agree + pairs.disagree, 'untied pair')}"
    top = f"of {amount(agreed.best_count, 'top score')}"
    ordered = f"of {amount(agreed.ordered, 'instruction')}"
    judgements = f"of {amount(len(evaluation.judgements), 'judgement')}"
    if unread := unread_reasons(evaluation.judgements):
        judgements += f"; without a score: {unread}"
    rows = [
        ("pairwise accuracy", pairs.accuracy, interval["accuracy"], untied),
        ("  ties as a half", pairs.accuracy_ties_half, interval["accuracy_ties_half"], ""),
        ("  tie rate", pairs.tie_rate, interval["tie_rate"], f"{pairs.tied} tied"),
        ("5-best", agreed.best_precision, interval["best_precision"], top),
        ("exact match", agreed.exact_match, interval["exact_match"], ordered),
        ("Spearman", agreed.spearman, interval["spearman"], undefined),
        ("Kendall tau-b", agreed.kendall, interval["kendall"], undefined),
        ("parse rate", evaluation.parse_rate, None, judgements),
        ("self-agreement", evaluation.self_agreement, None, "same score, not corrected for chance"),
    ]
    position, calibration = evaluation.position, evaluation.calibration
    if position is not None:
        verdicts = amount(position.first + position.second, "verdict")
        words = f"of {verdicts}, {amount(position.ties, 'tie')}"
        rows.append(("for the first shown", position.first_share, None, words))
        words = f"of {amount(position.compared, 'pair')}"
        rows.append(("both orders agree", position.consistency, None, words))
    if calibration is not None:
        words = f"bins of 0.1, {amount(calibration.pairs, 'pair')}"
        rows.append(("calibration error", calibration.error, None, words))
    head = (
        f"{amount(agreed.replies, 'reply', 'replies')} to {amount(agreed.instructions, 'prompt')} "
        f"in {amount(agreed.groups, 'group')}"
    )
    lines = [head, "", *_measures_in_lines(rows)]
    if calibration is not None:
        bins = [(f"{b.predicted:.2f}", f"{b.agreed:.2f}", f"{b.count}") for b in calibration.bins]
        lines += ["", *aligned([("how sure", "people agree", "pairs"), *bins], ">")]
    if evaluation.histogram:
        counts = [(f"{score:.1f}", f"{count}") for score, count in evaluation.histogram.items()]
        lines += ["", *aligned([("score", "judgements"), *counts], "><")]
    return "\n".join(lines)


def comparison_table(comparison: Comparison, names: Sequence[str]) -> str:
    """A comparison's rates and both sides' measures, one a line. names: of the two models."""
    rates = comparison.rates
    labelled: list[tuple[str, Rate, str]] = [
        ("won", rates.won, f"{rates.wins}"),
        ("tied", rates.tied, f"{rates.ties}"),
        ("lost", rates.lost, f"{rates.losses}"),
        ("win rate", rates.win_rate, "ties as a half"),
        ("  length-controlled", rates.length_controlled, "had both been as long"),
    ]
    rows = [(label, rate.value, rate.interval, words) for label, rate, words in labelled]
    position = comparison.position
    if position is not None:
        rows.append(("for the first shown", position.first_share, None, "of verdicts"))
        rows.append(("both orders agree", position.consistency, None, "of pairs"))
    first, second = _measures(comparison.first), _measures(comparison.second)
    lines = [f"{names[0]} against {names[1]}: {amount(rates.prompts, 'prompt')}"]
    if rates.unknown:
        unread = unread_reasons(comparison.judgements)
        why = f"; judgements without a score: {unread}" if unread else ""
        lines += [f"{rates.unknown:,} without a verdict{why}"]
    lines += [""]
    sides = [(f"{label:18}", _number(first[label]), _number(second[label])) for label in first]
    lines += [*_measures_in_lines(rows), "", *aligned([("", "first", "second"), *sides], "<>")]
    return "\n".join(lines)


def _measures(side: Side) -> dict[str, float | None]:
    responses = side.responses
    return {
        **({} if side.reward is None else {"held-out reward": side.reward.value}),
        **({} if side.accuracy is None else {"accuracy": side.accuracy.value}),
        **{f"pass@{k}": value for k, value in side.pass_at.items() if k > 1},
        "characters": responses.characters,
        "tokens": side.tokens,
        "cut off": side.clipped,
        **{f"distinct-{n}": value for n, value in responses.distinct.items()},
        "repeated 3-grams": responses.repetition,
    }


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
