"""What the numbers of a run are called on the page, and in which order they come."""

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
"""Curves that are always shown; eval/... comes behind them, all others on demand."""


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
    "judge/skipped": "Responses that were not judged, for no pair could have them",
    "completions/mean_length": "Mean length of responses, tokens",
    "completions/clipped_ratio": "Responses that were cut off",
    "pairs/kept": "Pairs that were kept",
    "pairs/chosen_length": "Mean length of chosen responses, tokens",
    "pairs/rejected_length": "Mean length of rejected responses, tokens",
}
"""Numbers of a stage's data, in their order; anchor/... comes first, all others behind them."""


SHARES = {
    *("judge/parse_rate", "judge/tie_rate", "judge/modal_share", "judge/self_agreement"),
    *("judge/position_agreement", "judge/score_mass", "judge/forced_share"),
    *("judge/cut", "completions/clipped_ratio", "rewards/accuracies", "eval/rewards/accuracies"),
}
"""Numbers from 0 to 1: their charts show all of that, so that a small change looks small."""


UNCHARTED = ("rows/", "prompts/", "eft/")
"""Beginnings of numbers that say how many rows there were: they have no chart."""


COUNTS = ("prompts", "candidates", "judgements", "pairs", "demonstrations", "rows", "steps")


DROPPED = {
    "tie": "best and worst score are equal",
    "identical": "chosen and rejected are the same text",
    "unfinished": "cut off before its end",
    "unscored": "no judgement with a score",
    "margin": "the two scores differ by less than min_margin",
    "invalid_score": "is_valid_reward refused the score",
    "invalid_pair": "is_valid_reward_pair refused the two scores",
    "surplus": "more than were asked for",
    "bad_row": "a row that cannot be used",
}
"""Why a prompt or a candidate was left out."""


def words_of(key: str) -> str:
    """What a number is called."""
    words = CURVES.get(key) or ROUNDS.get(key)
    if words is not None:
        return words
    reason = key.rpartition("dropped_")[2]
    return f"{key}: {DROPPED[reason]}" if "dropped_" in key and reason in DROPPED else key


def in_order(keys: set[str], known: dict[str, str], first: str) -> list[str]:
    """Keys as they are shown: those that begin with `first`, the known ones, all others."""
    order = list(known)
    return sorted(
        keys,
        key=lambda k: (not k.startswith(first), order.index(k) if k in known else len(order), k),
    )
