"""What judges and the metrics of training show, as it comes, put before the checks."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

from self_rewarding_lm.checks import PAGE, Checker
from self_rewarding_lm.judges import FIRST_LOOK
from self_rewarding_lm.records import Judgement, MetaJudgement
from self_rewarding_lm.tally import JudgeTally

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


SHOWN = 3  # texts of a judge that cannot be read, in the error
ADVICE = (
    "Change one of these: train the model on judge examples first (an SFT stage); make the "
    "reward prompt's reward_regex_template, score_range or parse_reward fit what the judge "
    "writes; set its forced_ending, which takes a score where none is written; raise "
    "judging.max_new_tokens if its texts are cut off; use another "
    "rewarding_model; or lower min_parse_rate."
)


class JudgeWatcher:
    """Sees the judgements of a stage on one of `world` processes.

    Its methods give the words of an error, or None: all processes have to raise together.
    """

    def __init__(self, checker: Checker, *, min_parse_rate: float, world: int = 1) -> None:
        self.checker, self.min_parse_rate = checker, min_parse_rate
        self.look = math.ceil(FIRST_LOOK / world)
        self.scored = self.judged = self.not_finite = 0
        self.unread: list[Judgement | MetaJudgement] = []
        """The first without a score, to show."""

    def count(self, judgements: Sequence[Judgement | MetaJudgement]) -> None:
        """Count judgements, new ones or those of an attempt before."""
        self.judged += len(judgements)
        without = [j for j in judgements if j.score is None]
        self.scored += len(judgements) - len(without)
        self.not_finite += sum(j.reason == "not_finite" for j in without)
        self.unread += without[: SHOWN - len(self.unread)]

    def see_new(self, judgements: Sequence[Judgement]) -> str | None:
        """Check `scores_not_finite`: of judgements that were counted and are not stored yet."""
        found = [j.id for j in judgements if j.reason == "not_finite"]
        if not found:
            return None
        return self.checker.failing(
            "scores_not_finite",
            self.not_finite / self.judged,
            f"{self.not_finite} of {self.judged} judgements gave NaN or infinity, such as "
            f"{', '.join(found[:8])}. A reward function or module has to give finite numbers, or "
            "None where there is no score; with a judging model its logits are not finite: the "
            "training before has diverged, or its type is too narrow. The last ones are not "
            "stored and will be judged again.",
        )

    def see_parsed(
        self, stage: str, where: object, *, noun: str = "judgements", advice: str = ADVICE
    ) -> str | None:
        """Check `min_parse_rate`. where: the stage's folder. noun: what was counted."""
        if self.judged < self.look or self.scored >= self.min_parse_rate * self.judged:
            return None
        texts = "\n".join(f"  {j.reason}: {(j.text or '')[:300]!r}" for j in self.unread)
        return (
            f"{stage}: only {self.scored} of {self.judged} {noun} "
            f"({self.scored / self.judged:.0%}) gave a score; at least "
            f"{self.min_parse_rate:.0%} must. Three of the judge's texts:\n{texts}\n"
            f"{advice} All records made so far are kept in {where}. "
            f"(check min_parse_rate, told in {PAGE}.)"
        )

    def see_scores(self, tally: JudgeTally) -> str | None:
        """Checks `one_score` and `ties`, of all that was judged so far."""
        found, failure = tally.metrics(), None
        if tally.score.whole >= self.look:
            commonest, count = tally.rounded.most_common(1)[0]
            failure = self.checker.failing(
                "one_score",
                found["judge/modal_share"],
                f"{count} of {tally.score.whole} scores are {commonest:g} (rounded to one decimal; "
                "judge/modal_share): the judge does not tell responses apart, and what is left are "
                "ties and noise. Take score_mode='expected', a comparison, another reward prompt "
                "or rewarding_model, or train it on judge examples first. Where scores differ by "
                "less than 0.1 on purpose, switch this check off.",
            )
        if failure is None and tally.tie.whole >= self.look:
            failure = self.checker.failing(
                "ties",
                found["judge/tie_rate"],
                f"of {tally.tie.whole} prompts {found['judge/tie_rate']:.0%} have the same score "
                "for their best and their worst response (judge/tie_rate) and give no pair. Take "
                "score_mode='expected', more num_sampled_reward_responses, a higher "
                "generation.temperature or another judge.",
            )
        return failure


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
