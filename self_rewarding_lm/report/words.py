"""What stages and numbers of a run are called on the page, and in which order they come."""

import re

CURVES = {
    "loss": "Loss",
    "rewards/margins": "Margin: implicit reward of chosen minus rejected",
    "rewards/accuracies": "Pairs whose chosen response has the higher implicit reward",
    "rewards/chosen": "Implicit reward, chosen",
    "rewards/rejected": "Implicit reward, rejected",
    "logps/chosen": "Log-probability, chosen",
    "logps/rejected": "Log-probability, rejected",
    "nll": "NLL of chosen, per token",
    "grad_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
    "early_stopping/score": "Score of early stopping",
}
"""Curves that are always shown; eval/... comes after them, all others on demand."""


ROUNDS = {
    "judge/score_mean": "Mean score",
    "judge/parse_rate": "Parse rate: judgements with a score",
    "judge/tie_rate": "Tie rate: prompts whose best and worst score are equal",
    "judge/modal_share": "Modal share: scores that are the commonest one",
    "judge/self_agreement": "Self-agreement: a judge's scores of one response that are equal",
    "judge/position_agreement": "Comparisons with one verdict in both orders",
    "judge/score_mass": "Probability of all allowed scores together",
    "judge/forced_share": "Judgements whose ending was forced",
    "judge/cut": "Judgements that were cut off",
    "judge/too_long": "Judgements without a score: more to read than the judge's model takes",
    "judge/skipped": "Responses that were not judged, because no pair can have them",
    "completions/mean_length": "Mean length of responses, tokens",
    "completions/clipped_ratio": "Responses that were cut off",
    "pairs/kept": "Pairs that were kept",
    "responses/kept": "Responses that were kept, of groups whose scores differ",
    "pairs/chosen_length": "Mean length of chosen responses, tokens",
    "pairs/rejected_length": "Mean length of rejected responses, tokens",
}
"""Numbers of a stage's data, in their order; anchor/... comes first, all others after them."""


SHARES = {
    *("judge/parse_rate", "judge/tie_rate", "judge/modal_share", "judge/self_agreement"),
    *("judge/position_agreement", "judge/score_mass", "judge/forced_share"),
    *("judge/cut", "judge/too_long", "completions/clipped_ratio"),
    *("rewards/accuracies", "eval/rewards/accuracies"),
    *("policy/clipped_low", "policy/clipped_high"),
}
"""Numbers from 0 to 1: their charts show all of that, so that a small change looks small."""


MORE = {
    "num_tokens": "Tokens of a step",
    "padding_share": "Padding, share of a step's tokens",
    "rows/truncated": "Rows that max_seq_len cut",
    "rows/skipped": "Rows that could not be used",
    "pairs/judge_kept": "Pairs of judgements that were kept",
    "prompts/kept": "New prompts that were kept",
    "completions/re_encoded": "Responses whose text has other tokens than were sampled",
    "next/replaced": "Responses that the next model's replaced",
    "contrast/identical_rate": "Contrasts whose two responses are the same",
    "consistency/tau_mean": "Mean rank correlation of two judges",
    "consistency/undefined_share": "Prompts without a rank correlation",
    "meta/comparisons": "Comparisons of judgements",
    "meta/parse_rate": "Comparisons of judgements with a verdict",
    "meta/tie_rate": "Comparisons of judgements that tie",
    "meta/position_bias": "Verdicts for the judgement that was shown first",
    "meta/prefers_higher_score": "Verdicts for the judgement with the higher score",
    "anchor/accuracy_ties_half": "Anchor: accuracy, a tie counts half",
}
"""Of other numbers of the library what they are called."""


UNITS = {
    "loss": "loss",
    "rewards/accuracies": "share of pairs",
    "rewards/": "implicit reward",
    "logps/": "log-probability",
    "nll": "NLL",
    "grad_norm": "norm",
    "early_stopping/": "score",
    "num_tokens": "tokens",
    "padding_share": "share of tokens",
    "judge/score_mean": "score",
    "judge/tie_rate": "share of prompts",
    "judge/modal_share": "share of scores",
    "judge/score_mass": "probability",
    "judge/skipped": "responses",
    "judge/": "share of judgements",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "share of responses",
    "pairs/kept": "pairs",
    "pairs/judge_kept": "pairs",
    "pairs/": "tokens",
}
"""What the axis of a number, or of all that begin so, is called; the first that fits."""


UNCHARTED = ("rows/", "prompts/", "eft/")
"""Beginnings of numbers that say how many rows there were: they have no chart."""


COUNTS = (
    "prompts",
    "candidates",
    "judgements",
    "pairs",
    "responses",
    "demonstrations",
    "rows",
    "steps",
)


TOKENS = {
    "sampled": "tokens sampled",
    "judge_characters": "characters of judges",
    "trained": "tokens trained",
}
"""Tokens of a stage that the page counts, and what they are called."""


DROPPED = {
    "tie": "best and worst score are equal",
    "identical": "chosen and rejected are the same text",
    "unfinished": "cut off before the end",
    "unscored": "no judgement with a score",
    "margin": "the two scores differ by less than min_margin",
    "invalid_score": "is_valid_reward refused the score",
    "invalid_pair": "is_valid_reward_pair refused the two scores",
    "surplus": "more than were asked for",
    "bad_row": "a row that cannot be used",
}
"""Why a prompt or a candidate was left out."""


REASONS = {
    "no_score": "no score in it",
    "no_verdict": "no verdict in it",
    "no_answer": "no answer in it",
    "unfinished": "cut off",
    "low_mass": "the allowed scores are all unlikely",
}
"""Why a judgement has no score, where its name does not say it."""


PARTS = {"eval": "Held out", "losses": "Part of the loss", "eft": "EFT"}
"""Of names of numbers the part before the first `/`, where it is no word."""


def words_of(key: str) -> str:
    """What a number is called."""
    known = CURVES.get(key) or ROUNDS.get(key) or MORE.get(key)
    if known is not None:
        return known
    part, _, rest = key.rpartition("dropped_")
    if part:
        what = _capital(part.rstrip("/_").replace("/", ", "))
        return f"{what}: {DROPPED.get(rest, _plain(rest))}"
    part, _, rest = key.partition("/")
    if not rest:
        return _capital(key)
    return f"{PARTS.get(part) or _capital(part)}: {_small(words_of(rest))}"


def unit_of(key: str) -> str:
    """What the axis of a number is called."""
    key = key.removeprefix("eval/")
    fits = (
        unit
        for name, unit in UNITS.items()
        if key == name or (name.endswith("/") and key.startswith(name))
    )
    return next(fits, "share" if key in SHARES else _plain(key.rpartition("/")[2]))


def reason_words(reason: str) -> str:
    """Why a judgement has no score."""
    return REASONS.get(reason) or _plain(reason)


def kind_words(kind: str) -> str:
    """A stage's class in words: SelfRewardDPOConfig is "self reward DPO"."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^A-Z]+", kind.removesuffix("Config"))
    return " ".join(part if part.isupper() else part.lower() for part in parts) or kind


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _capital(name: str) -> str:
    words = _plain(name)
    return words[:1].upper() + words[1:]


def _small(words: str) -> str:
    """Words after a colon; NLL stays as it is."""
    return words if words[:2].isupper() else words[:1].lower() + words[1:]


def in_order(keys: set[str], known: dict[str, str], first: str) -> list[str]:
    """Keys as they are shown: those that begin with `first`, the known ones, all others."""
    order = list(known)
    return sorted(
        keys,
        key=lambda k: (not k.startswith(first), order.index(k) if k in known else len(order), k),
    )
