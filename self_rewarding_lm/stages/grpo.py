"""Self-rewarding without pairs: policy gradients on how much better each response is than others.

A group of responses to each prompt is scored by any judge; what a score is above its group's is the
response's advantage, and the model is trained by a clipped policy gradient (GRPO,
arXiv:2402.03300, and what followed it). This file holds, in this order: what makes advantages, the
settings and the stage, and the arithmetic.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from self_rewarding_lm.checks import Checker
from self_rewarding_lm.config import SamplingConfig
from self_rewarding_lm.context import START, Context
from self_rewarding_lm.data.rows import truncated
from self_rewarding_lm.errors import NoPairError, setting
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.self_judge import PairwiseJudge
from self_rewarding_lm.records import Advantage, Candidate, Judgement, same_text
from self_rewarding_lm.runs.lines import Picked
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.stored import Groups
from self_rewarding_lm.scores import both_orders, exact, exact_sum
from self_rewarding_lm.stages.base import see_cut
from self_rewarding_lm.stages.pair_maker import JudgedPrompt, PairMaker
from self_rewarding_lm.stages.pairing import (
    DropCounts,
    learnable,
    length_of,
    passing,
    score_filters,
)
from self_rewarding_lm.stages.preference import NO_REFERENCE, OF_ROUND
from self_rewarding_lm.stages.ranges import NOTHING, Range
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.work import Asking, Counting, Training, Work
from self_rewarding_lm.training.policy_gradient import (
    Normalise,
    PolicyGradientObjective,
    PolicyLoss,
    Ratio,
    StoredResponses,
)

Scale = Literal["std", "none", "batch"]


Baseline = Literal["mean", "others"]


JUDGEMENTS = "the judgements that are trained on are not counted as rows"
"""The note in a plan of a stage with `judge_reward`."""


EPSILON = 1e-4
"""What is added to a standard deviation that is divided by; TRL's."""


class GroupMaker(PairMaker):
    """Makes an advantage for each response of a group whose scores differ."""

    record_type: ClassVar[type[Any]] = Advantage
    noun: ClassVar[str] = "response"
    counted: ClassVar[tuple[str, str]] = ("responses", "groups")
    asks_logprobs: ClassVar[bool] = True
    config: "SelfRewardGRPOConfig"

    @property
    def cut_responses(self) -> str:
        punishes = self.config.cut_off == "lowest"
        return "they get the lowest score" if punishes else "they are left out of their groups"

    def learnable(self, judged: JudgedPrompt, drops: DropCounts) -> list[Candidate]:
        punished = self.punished(judged)
        candidates = [c for c in judged.candidates if c not in punished]
        left = learnable(candidates, drops, least=max(1, 2 - len(punished)))
        if left and all(same_text(left[0], c) for c in (*left, *punished)):
            drops.prompts["identical"] += 1
            return []
        return left

    def punished(self, judged: JudgedPrompt) -> list[Candidate]:
        """The candidates that get the lowest score because they were cut off."""
        if self.config.cut_off == "drop":
            return []
        return [candidate for candidate in judged.answers if candidate.finished is False]

    def pair(self, judged: JudgedPrompt, drops: DropCounts) -> list[Advantage]:
        scores = self.scores_of_group(judged, drops)
        made = self.of_responses(judged, scores, drops) if scores else []
        if self.config.judge_reward:
            made += self.of_judgements(judged, scores)
        drops.kept += len(made)
        return made

    def scores_of_group(self, judged: JudgedPrompt, drops: DropCounts) -> dict[str, float]:
        """The score of each response that is learnt from; {} if there are fewer than two."""
        punished = self.punished(judged)
        least = max(1, 2 - len(punished))
        usable = self.usable_candidates(judged, drops, least=least)
        candidates = [candidate for candidate in usable if candidate not in punished]
        known = self.judged_scores(candidates, judged.judgements) if candidates else {}
        filters = score_filters(known, self.config.is_valid_reward)
        scored = passing(candidates, filters, drops, least=least) if usable else []
        if not scored:
            return {}
        scores = {c.id: score for c in scored if (score := known[c.id]) is not None}
        if punished:
            lowest = [*scores.values(), *(self.config.score_scale(self.ctx) or ())]
            scores |= dict.fromkeys((c.id for c in punished), min(lowest))
        return scores

    def judged_scores(
        self, candidates: Sequence[Candidate], judgements: Sequence[Judgement]
    ) -> Mapping[str, float | None]:
        """What the judge's judgements come to, controlled for length if the stage asks for it."""
        within = self.config.length_window
        if within is None:
            return self.judge.scores(candidates, judgements)
        return wins_of_like_length(candidates, judgements, within)

    def of_responses(
        self, judged: JudgedPrompt, scores: Mapping[str, float], drops: DropCounts
    ) -> list[Advantage]:
        """The advantages of a prompt's responses; none if their scores are equal."""
        if len(set(scores.values())) == 1:
            drops.prompts["tie"] += 1
            return []
        group = [candidate for candidate in judged.candidates if candidate.id in scores]
        advantages = group_advantages(
            [scores[candidate.id] for candidate in group],
            scale=self.config.scale,
            baseline=self.config.baseline,
        )
        return [
            Advantage(
                id=f"{self.ctx.stage}/{candidate.id.partition('/')[2]}",
                candidate_id=candidate.id,
                prompt_ids=judged.prompt.ids,
                completion_ids=candidate.ids,
                score=scores[candidate.id],
                advantage=advantage,
            )
            for candidate, advantage in zip(group, advantages, strict=True)
        ]

    def of_judgements(self, judged: JudgedPrompt, scores: Mapping[str, float]) -> list[Advantage]:
        """The advantages of a prompt's comparisons, those of one question against each other.

        A judgement that was cut off is left out: its end must not be learnt. Judgements are stored
        as texts, so the ids are those of the text and its end token.
        """
        shown = {c.id: self.as_judged(c).text or "" for c in judged.candidates if c.id in scores}
        groups: dict[tuple[str, ...], list[Judgement]] = {}
        for judgement in judged.judgements:
            if set(judgement.candidate_ids) <= shown.keys() and not judgement.is_cut:
                groups.setdefault(judgement.candidate_ids, []).append(judgement)
        made, tokens, judge = list[Advantage](), self.ctx.tokens, self.judge
        assert isinstance(judge, PairwiseJudge)
        for (first, second), group in groups.items():
            rewards = [consistency(j.score, scores[first], scores[second]) for j in group]
            if len(set(rewards)) == 1:
                continue
            advantages = group_advantages(
                rewards, scale=self.config.scale, baseline=self.config.baseline
            )
            question = judge.render(judged.prompt.text or "", shown[first], shown[second])
            prompt_ids = tokens.prompt(question).ids
            made += [
                Advantage(
                    id=judgement.id,
                    candidate_id=judgement.id,
                    prompt_ids=prompt_ids,
                    completion_ids=tokens.response(question, judgement.text or ""),
                    score=reward,
                    advantage=advantage,
                )
                for judgement, reward, advantage in zip(group, rewards, advantages, strict=True)
            ]
        return made

    def nothing_made(self, prompts: str, drops: DropCounts) -> Exception:
        counts = f", or {setting('cut_off', 'lowest')}" if self.config.cut_off != "lowest" else ""
        return NoPairError(
            f"{self.ctx.stage}: of {prompts} none has responses with different scores, so there "
            f"is nothing to learn from. Dropped: {drops.in_words()}. 'unfinished' asks for more "
            f"max_new_tokens{counts}; 'tie' for a judge with finer "
            "scores, more judgements or more candidates; 'identical' for a higher temperature; "
            f"'unscored' for a judge that can be read. The records are in {self.out.path}."
        )


class SelfRewardGRPOConfig(SelfRewardDPOConfig):
    """Policy gradients on scored responses instead of pairs: GRPO and its relatives.

    Each of G responses to a prompt becomes likelier by how far its score is above the group's mean
    (GRPO, arXiv:2402.03300). Other settings give DAPO (arXiv:2503.14476, the defaults here), Dr.
    GRPO (arXiv:2503.20783), RLOO (arXiv:2402.14740) or GSPO (arXiv:2507.18071); VoteJudge as the
    judge gives TTRL (arXiv:2504.16084), the model's own scores RLSR (arXiv:2505.08827),
    `comparison` with `judge_reward` SERL (arXiv:2511.07922). `optim.batch_size` counts responses.
    With `rounds` each round samples fresh responses: see docs/policy_gradients.md. Settings of
    pairs (dpo_beta, min_margin, ...) are refused.
    """

    folder_name: ClassVar[str] = "grpo"
    default_learning_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-6)
    maker: ClassVar[type[PairMaker]] = GroupMaker
    unused: ClassVar[tuple[str, ...]] = (
        *("dpo_beta", "nll_weight", "loss", "min_margin", "pairing", "mix_pairs", "consistency"),
        *("num_generated_preference_pairs", "unless_few_prompts"),
        *("is_valid_reward_pair", "pick_paired_rewards_fn"),
    )

    num_candidate_responses: int = Field(default=8, ge=2)
    """G, the responses of a group. Default: TRL's."""
    generation: SamplingConfig = SamplingConfig(temperature=1.0, top_p=None)
    """How responses are sampled. By default from the policy itself, without filters: the ratio does
    not correct for filters and other temperatures."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in training, of adapters too; it is noise in the ratio."""
    baseline: Baseline = "mean"
    """What a score is compared with: the group's "mean", or the mean of the "others" (RLOO)."""
    scale: Scale = "std"
    """What the difference is divided by: "std", the standard deviation of the group's scores
    (GRPO); "none" (Dr. GRPO, RLOO); "batch", that of all scores of the round."""
    normalise: Normalise = "token"
    """What a step's loss is a mean over: "sequence", responses, each the mean of its tokens (GRPO);
    "token", all tokens (DAPO); "constant", responses of generation.max_new_tokens each (Dr.
    GRPO)."""
    ratio: Ratio = "token"
    """What is compared with its probability at the start of the round: each "token", or each whole
    response, per token ("sequence": GSPO, whose clip_low and clip_high are about 3e-4 and
    4e-4)."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """Below a ratio of 1 - clip_low, a bad response is not made less likely."""
    clip_high: float = Field(default=0.28, gt=0)
    """Above a ratio of 1 + clip_high, a good response is not made likelier. Default: DAPO's."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the distance (k3) from `reference`. 0: no reference is computed."""
    cut_off: Literal["drop", "lowest"] = "drop"
    """Responses without an end: "drop" leaves them out of their group; "lowest" gives them the
    judge's lowest score, or that of their group if the judge's scale is not known."""
    length_window: float | None = Field(default=None, gt=0, lt=1)
    """With `comparison`: a win counts only if the two lengths differ by no more than this
    share, and then |loser| / |winner| (0.2 in SERL). None: lengths do not count."""
    judge_reward: bool = False
    """With `comparison`: train on the judgements too, each by whether it agrees
    with the ranking that all of them give (SERL). Each comparison in each order then has
    num_sampled_reward_responses judgements (8 in SERL), which are a group."""

    @model_validator(mode="after")
    def _compares(self) -> "SelfRewardGRPOConfig":
        if self.length_window is None and not self.judge_reward:
            return self
        if self.comparison is None or self.judge is not None:
            raise ValueError(
                "length_window and judge_reward need comparisons; give comparison, and no judge"
            )
        if not self.judge_reward:
            return self
        texts = self.comparison.score_mode == "sampled" and not self.comparison.forced_ending
        if self.rewarding_model is not None or self.candidates_from is not None or not texts:
            raise ValueError(
                "judge_reward trains what the model itself wrote as a judge; leave out "
                "rewarding_model, candidates_from, and score_mode and forced_ending of comparison"
            )
        if self.num_sampled_reward_responses < 2:
            raise ValueError(
                "judge_reward compares judgements of one question; num_sampled_reward_responses "
                "must be 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _no_pairs(self) -> "SelfRewardGRPOConfig":
        refused = [name for name in self.unused if name in self.model_fields_set]
        if refused:
            raise ValueError(f"{', '.join(refused)}: for pairs only, and this stage makes none")
        if "reference" not in self.model_fields_set:
            return self
        if self.beta == 0:
            raise ValueError("beta is 0, so no reference is read; give a beta, or no reference")
        if not isinstance(self.reference, str) or self.reference == NO_REFERENCE:
            raise ValueError(
                "reference must have fixed weights: 'start', 'round', 'initial', the name of an "
                f"earlier stage or a path; got {self.reference!r}"
            )
        return self

    @property
    def most_of_prompt(self) -> int:
        """The most responses of a prompt that are learnt from."""
        return self.num_candidate_responses

    @property
    def sets_adapters(self) -> bool:
        return True

    def reference_from_start(self) -> bool:
        return self.beta > 0 and self.reference == START

    def build_judge(self, ctx: Context) -> Judge:
        if not self.judge_reward:
            return super().build_judge(ctx)
        return PairwiseJudge(self.comparison, self.judging, self.num_sampled_reward_responses)

    def judging_work(
        self, counting: Counting, candidates: Asking, prompt: Range
    ) -> tuple[Asking, tuple[str, ...]]:
        asking, notes = super().judging_work(counting, candidates, prompt)
        if not self.judge_reward:
            return asking, notes
        times = self.num_sampled_reward_responses
        return replace(asking, count=asking.count.times(times)), (*notes, JUDGEMENTS)

    def trained(self, ctx: Context, out: StageDir, pairs: Sequence[Any]) -> Sequence[Any]:
        """The round's responses; `scale` "batch" divides their advantages by the round's spread."""
        if self.scale != "batch":
            return pairs
        divisor = spread(record.score for record in pairs) + EPSILON
        out.log({"step": ctx.round.first_step, "responses/score_std": divisor - EPSILON})
        return Picked(pairs, change=lambda r: replace(r, advantage=r.advantage / divisor))

    def objective(
        self,
        ctx: Context,
        out: StageDir,
        pairs: Sequence[Any],
        *,
        beta: float | None = None,
        round: int = 0,
    ) -> Any:
        """Responses with their log-probs under the round's first weights, and under the reference.

        The first are computed if the round takes more than one optimiser step, the others if `beta`
        is not 0.
        """
        responses = self._cut(ctx, out, pairs)
        longest = [self.generation.max_new_tokens]
        if self.judge_reward:
            longest.append(self.judging.max_new_tokens)
        settings = PolicyLoss(
            normalise=self.normalise,
            ratio=self.ratio,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            beta=self.beta,
            constant=max(longest),
        )
        found = PolicyGradientObjective(responses, settings, sampled=_sampled(out, responses))
        moves = self.planned_steps(len(responses)) > 1
        if not moves and self.beta == 0:
            return found
        budget = self.micro_batch_tokens(ctx, out, found)

        def under(weights: str | None) -> Sequence[Any]:
            asked = StoredResponses(ctx, out, token_budget=budget, round=round, weights=weights)
            return asked.tokens(responses)

        old = under(None) if moves else None
        reference = under(self._reference_weights(ctx)) if self.beta > 0 else None
        return replace(found, old=old, reference=reference)

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        judged, _ = self.for_rehearsal(self.maker, ctx, out).rehearse()
        first = judged.candidates[0]
        row = Advantage(first.id, first.id, judged.prompt.ids, first.ids, 1.0, 1.0)
        self.try_fit(ctx, out, self.objective(ctx, out, [row]))

    def work(self, counting: Counting) -> Work:
        return self.sampled_work(counting, answers=1)

    def reference_tokens(self, training: Training) -> Range:
        asked = set[str]()
        if training.steps.most is None or training.steps.most > self.rounds:
            asked.add(OF_ROUND)
        if self.beta > 0:
            is_first = self.reference == START and self.rounds == 1
            asked.add(OF_ROUND if is_first else str(self.reference))
        if not asked:
            return NOTHING
        return training.rows.times(self.rounds * len(asked)).times(training.row.tokens)

    def _cut(
        self, ctx: Context, out: StageDir, responses: Sequence[Advantage]
    ) -> Sequence[Advantage]:
        """Responses cut to the length limit, each when it is asked for; counted and checked."""
        limit = ctx.limit(self.max_seq_len)

        def short(response: Advantage) -> Advantage:
            prompt, where = response.prompt_ids, f"response {response.id}"
            ids, _ = truncated((*prompt, *response.completion_ids), len(prompt), limit, where)
            return replace(response, completion_ids=ids[len(prompt) :])

        lengths = (len(r.prompt_ids) + len(r.completion_ids) for r in responses)
        cut = sum(limit is not None and length > limit for length in lengths)
        out.log({"step": ctx.round.first_step, "rows/truncated": cut})
        checker = Checker(self.checks, ctx.stage, warns=ctx.runtime.is_main, tell=out.tell)
        see_cut(checker, cut, len(responses), limit)
        return Picked(responses, change=short) if cut else responses


def consistency(verdict: float | None, first: float, second: float) -> float:
    """1 if a comparison's verdict is for the one with the higher score, -1 if for the other.

    0 if either says that they are equal; -1 without a verdict. verdict: 1 for the first, 0 for the
    second (arXiv:2511.07922; how a tie counts is ours).
    """
    if verdict is None:
        return -1.0
    said = (verdict > 0.5) - (verdict < 0.5)
    return float(said * ((first > second) - (first < second)))


def wins_of_like_length(
    candidates: Sequence[Candidate], judgements: Iterable[Judgement], within: float
) -> dict[str, float | None]:
    """Each candidate's mean over its known comparisons: |loser| / |winner| if it won, else 0.

    It wins in both orders, and only if its length is no other than by this share of the loser's
    (arXiv:2511.07922). Lengths are in characters. None without a known comparison.
    """
    lengths = {c.id: max(1, length_of(c)) for c in candidates}
    gains: dict[str, list[Fraction]] = {c.id: [] for c in candidates}
    for (one, other), (there, back) in both_orders(judgements).items():
        if there is None or back is None or not {one, other} <= lengths.keys():
            continue
        for winner, loser, wins in ((one, other, 1.0), (other, one, 0.0)):
            ratio = Fraction(lengths[winner], lengths[loser])
            has_won = there == back == wins and abs(ratio - 1) <= exact(within)
            gains[winner].append(1 / ratio if has_won else Fraction())
    return {i: float(sum(of_one) / len(of_one)) if of_one else None for i, of_one in gains.items()}


def _sampled(out: StageDir, responses: Sequence[Advantage]) -> Sequence[Candidate] | None:
    """The responses' candidates, if all have log-probs of the sampler."""
    by_id, ids = Groups(out.known(Candidate)), [r.candidate_id for r in responses]
    has_all = all((found := by_id[i]) and found[0].logprobs for i in ids)
    return by_id.in_order(ids) if has_all else None


def group_advantages(scores: Sequence[float], *, scale: Scale, baseline: Baseline) -> list[float]:
    """A_i = r_i - the baseline, over the spread of the group's scores if `scale` is "std".

    baseline: "mean" (arXiv:2402.03300) or the mean of the others (arXiv:2402.14740), with which
    A_i is n / (n - 1) times as much. They add up to 0. "batch" divides nothing yet: the spread is
    that of several groups.
    """
    numbers = [exact(score) for score in scores]
    mean = exact_sum(numbers) / len(numbers)
    above = [number - mean for number in numbers]
    if baseline == "others":
        above = [number * len(numbers) / (len(numbers) - 1) for number in above]
    divisor = spread(scores) + EPSILON if scale == "std" else 1.0
    return [float(number) / divisor for number in above]


def spread(scores: Iterable[float]) -> float:
    """The standard deviation of two scores or more, over n - 1."""
    numbers = [exact(score) for score in scores]
    mean = exact_sum(numbers) / len(numbers)
    squares = exact_sum((number - mean) ** 2 for number in numbers)
    return math.sqrt(squares / (len(numbers) - 1))
