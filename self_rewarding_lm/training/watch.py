"""The metrics of training, looked at by the checks while they come."""

import math
from collections import deque
from collections.abc import Mapping

from self_rewarding_lm.checks import Checker

WINDOW = 10
"""Steps that are looked at together; one batch alone says little."""


LEAST_PAIRS = 8
"""In the first step: with fewer, all of them may be right by chance (1 in 256 for eight)."""


LEAST_MARGIN = 0.1
"""Of implicit rewards; below it, signs are noise."""


NOTHING_LEARNT = math.log(2)
"""The loss of DPO while the policy is the reference: -log sigmoid(0)."""


AS_SHOWN = 5e-4
"""So near to it a loss reads 0.693."""


class Watcher:
    """Sees the metrics of each step of a training. begins_even: as an objective has it."""

    def __init__(self, checker: Checker, *, begins_even: bool = True) -> None:
        self.checker, self.begins_even = checker, begins_even
        self._stuck = 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def see(self, metrics: Mapping[str, float], *, step: int, rows: int) -> None:
        """metrics: of optimiser step `step` (the first is 1) on so many rows.

        Raises TrainingError where a check that is set to "error" is beyond its limit.
        """
        if "rewards/margins" not in metrics:
            return
        if step == 1 and self.begins_even and rows >= LEAST_PAIRS:
            self._see_start(metrics["rewards/accuracies"])
        self._see_loss(metrics)
        self._recent.append((metrics["rewards/chosen"], metrics["rewards/rejected"]))
        if len(self._recent) == WINDOW:
            self._see_falling()

    def _see_start(self, accuracy: float) -> None:
        self.checker.see(
            "accuracy_at_start",
            accuracy,
            f"rewards/accuracies is {accuracy} at step 1. The reference is what the model was "
            "when the stage began, so all rewards should be 0 there but for dropout and rounding: "
            "the pairs' reference log-probs are those of other weights, or of other tokens "
            "(another chat template or precision).",
        )

    def _see_loss(self, metrics: Mapping[str, float]) -> None:
        """A loss with the winner's NLL is another number: its margins alone are looked at."""
        reads = "nll" in metrics or abs(metrics["loss"] - NOTHING_LEARNT) <= AS_SHOWN
        still = reads and abs(metrics["rewards/margins"]) <= 2 * AS_SHOWN
        self._stuck = self._stuck + 1 if still else 0
        self.checker.see(
            "loss_stuck",
            self._stuck,
            f"for {self._stuck} steps the loss has been 0.693 (ln 2) with margins of 0: the model "
            "gives chosen and rejected what its reference gives them, so nothing is learnt. Unless "
            "this is a slow warm-up: raise optim.learning_rate or dpo_beta; see that weights are "
            "trained (requires_grad, an adapter that is switched on) and that their type can hold "
            "such small updates (lost_updates).",
        )

    def _see_falling(self) -> None:
        chosen, rejected = (sum(values) / WINDOW for values in zip(*self._recent, strict=True))
        margin = chosen - rejected
        if margin < LEAST_MARGIN:
            return
        self.checker.see(
            "both_fall",
            -chosen / margin,
            "the chosen responses become less likely together with the rejected ones (over "
            f"{WINDOW} steps rewards/chosen is {chosen:.3g} on average, rewards/rejected "
            f"{rejected:.3g}). DPO only widens the gap between them; the probability goes to texts "
            "that are in no pair. If that is not wanted: nll_weight=1 (arXiv:2404.19733), a larger "
            "dpo_beta, a lower learning rate, or pairs that differ more.",
        )
