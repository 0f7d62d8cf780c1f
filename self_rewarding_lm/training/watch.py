"""The checks of a training's metrics, made step by step as they come."""

import math
from collections import deque
from collections.abc import Mapping

from self_rewarding_lm.checks import Checker

WINDOW = 10
"""Steps whose metrics are averaged; one batch alone says little."""


LEAST_PAIRS = 8
"""In the first step: of fewer, all may be right by chance (1 in 256 for eight)."""


LEAST_MARGIN = 0.1
"""Of implicit rewards; below it, signs are noise."""


NOTHING_LEARNT = math.log(2)
"""The loss of DPO while the policy is the reference: -log sigmoid(0)."""


SHOWN_DIGIT = 5e-4
"""A loss this near to ln 2 is shown as 0.693."""


class Watcher:
    """Checks the metrics of each step of a training.

    begins_even: whether the reference is the policy itself at the first step.
    """

    def __init__(self, checker: Checker, *, begins_even: bool = True) -> None:
        self.checker, self.begins_even = checker, begins_even
        self._stuck_steps = 0
        self._recent_rewards: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """(chosen, rejected) of the last steps."""

    def see(self, metrics: Mapping[str, float], *, step: int, rows: int) -> None:
        """Check the metrics of optimiser step `step`, from 1, which trained on `rows` rows.

        Raises TrainingError if a check that is set to "error" is beyond its limit.
        """
        if "rewards/margins" not in metrics:
            return
        if step == 1 and self.begins_even and rows >= LEAST_PAIRS:
            self._check_start(metrics["rewards/accuracies"])
        self._check_stuck(metrics)
        self._recent_rewards.append((metrics["rewards/chosen"], metrics["rewards/rejected"]))
        if len(self._recent_rewards) == WINDOW:
            self._check_falling()

    def _check_start(self, accuracy: float) -> None:
        self.checker.see(
            "accuracy_at_start",
            accuracy,
            f"rewards/accuracies is {accuracy} at step 1. The reference is what the model was "
            "when the stage began, so all rewards should be 0 except for dropout and rounding: "
            "the pairs' reference log-probs belong to other weights or other tokens "
            "(another chat template or precision).",
        )

    def _check_stuck(self, metrics: Mapping[str, float]) -> None:
        # with the winner's NLL the loss is another number, and the margins alone can tell
        is_ln2 = "nll" in metrics or abs(metrics["loss"] - NOTHING_LEARNT) <= SHOWN_DIGIT
        is_stuck = is_ln2 and abs(metrics["rewards/margins"]) <= 2 * SHOWN_DIGIT
        self._stuck_steps = self._stuck_steps + 1 if is_stuck else 0
        self.checker.see(
            "loss_stuck",
            self._stuck_steps,
            f"for {self._stuck_steps} steps the loss has been 0.693 (ln 2) with margins of 0: the "
            "log-probs of the pairs are still those of the reference, so nothing is learnt. "
            "Unless this is a slow warm-up: raise optim.learning_rate or dpo_beta; see that "
            "weights are trained (requires_grad, an adapter that is switched on) and that their "
            "type can hold such small updates (lost_updates).",
        )

    def _check_falling(self) -> None:
        sides = zip(*self._recent_rewards, strict=True)
        chosen, rejected = (sum(rewards) / WINDOW for rewards in sides)
        margin = chosen - rejected
        if margin < LEAST_MARGIN:
            return
        self.checker.see(
            "both_fall",
            -chosen / margin,
            "the chosen responses become less likely together with the rejected ones (over "
            f"{WINDOW} steps rewards/chosen is {chosen:.3g} on average, rewards/rejected "
            f"{rejected:.3g}). DPO only widens the gap between them; the probability goes to texts "
            "that are in no pair. That need not be bad: in a few dozen steps of an adapter "
            "responses can still get better, so measure them on held-out prompts before you change "
            "anything. If they get worse, as they may over many steps: set nll_weight "
            "(arXiv:2404.19733 takes 1), a larger dpo_beta, a lower learning rate, fewer epochs, "
            "or pairs that differ more.",
        )
