"""Known troubles of training that its metrics show: said once, with what they mean."""

import logging
from collections import deque
from collections.abc import Mapping

logger = logging.getLogger(__name__)

WINDOW = 10
"""Steps that are looked at together; one batch alone says little."""
LEAST_PAIRS = 8
"""In the first step: with fewer, all of them may be right by chance (1 in 256 for eight)."""
LEAST_MARGIN = 0.1
"""Of implicit rewards; below it, signs are noise."""


class Watcher:
    """Sees the metrics of each step of a training, and warns of two troubles once each."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._said_falling = False

    def see(self, metrics: Mapping[str, float], *, step: int, rows: int) -> None:
        """metrics: of optimiser step `step` (the first is 1) on so many rows."""
        if "rewards/margins" not in metrics:
            return
        if step == 1 and rows >= LEAST_PAIRS and metrics["rewards/accuracies"] == 1.0:
            logger.warning(
                "%s: rewards/accuracies is 1.0 at step 1. The reference is what the model was when "
                "the stage began, so all rewards should be 0 there but for dropout and rounding: "
                "the pairs' reference log-probs are those of other weights, or of other tokens "
                "(another chat template or precision).",
                self.stage,
            )
        self._recent.append((metrics["rewards/chosen"], metrics["rewards/rejected"]))
        if len(self._recent) == WINDOW and not self._said_falling:
            self._see_falling()

    def _see_falling(self) -> None:
        chosen, rejected = (sum(values) / WINDOW for values in zip(*self._recent, strict=True))
        margin = chosen - rejected
        if margin < LEAST_MARGIN or chosen > -margin / 2:
            return
        self._said_falling = True
        logger.warning(
            "%s: the chosen responses become less likely together with the rejected ones (over %d "
            "steps rewards/chosen is %.3g on average, rewards/rejected %.3g). DPO only widens the "
            "gap between them; the probability goes to texts that are in no pair. If that is not "
            "wanted: nll_weight=1 (arXiv:2404.19733), a larger dpo_beta, a lower learning rate, or "
            "pairs that differ more.",
            self.stage,
            WINDOW,
            chosen,
            rejected,
        )
