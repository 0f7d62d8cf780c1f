"""Early stopping by what the model answers to held-out prompts: ready-made evaluations.

Each is given to a stage as `early_stopper_eval_module`. It samples a response to every prompt with
the present weights and looks at these. The noise is the same at every check, so that only the
weights make a difference. Several processes take a part of the prompts each.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from self_rewarding_lm.config import ComparisonConfig, FromStage, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import Rows, read_prompt
from self_rewarding_lm.errors import ConfigError, DataError, JudgeError, typed
from self_rewarding_lm.evaluation.responses import outcome
from self_rewarding_lm.evaluation.verifying import Verifier
from self_rewarding_lm.generation.candidates import sample_candidates
from self_rewarding_lm.judges.make import check_judge, make_judge
from self_rewarding_lm.records import Candidate, Prompt
from self_rewarding_lm.runs.stored import id_order
from self_rewarding_lm.scores import candidate_scores, mean_score

Answered = tuple[Prompt, list[Candidate]]


class HeldOutReward:
    """The mean score that a judge gives to the model's responses to held-out prompts.

    prompts: a dataset of prompts (docs/data.md). judge: a RewardConfig, with which `judge_model`
    (a module with the policy's tokens), or else the policy itself, is asked; or a judge object
    (ServerJudge), a text function in TRL's form or a reward module. A policy that judges itself
    may come to like its responses without answering better. sampling, judging: default temperature
    0.7, top-p 0.9; num_judgements of each response are averaged. Responses without a score are left
    out. Raises JudgeError where none has one.
    """

    @typed
    def __init__(
        self,
        prompts: Any,
        judge: Any,
        *,
        judge_model: nn.Module | None = None,
        sampling: SamplingConfig | None = None,
        judging: SamplingConfig | None = None,
        num_judgements: int = 1,
        num_samples: int = 1,
    ) -> None:
        if num_samples < 1:
            raise ConfigError(f"num_samples must be 1 or more; got {num_samples}.")
        if judge_model is not None and not isinstance(judge, RewardConfig | ComparisonConfig):
            raise ConfigError(
                "judge_model is asked with a prompt, so that judge must be a RewardConfig or a "
                f"ComparisonConfig; got {type(judge).__name__}. Leave judge_model out."
            )
        self.rows = open_prompts(prompts)
        self.sampling, self.num_samples = sampling or SamplingConfig(), num_samples
        self.judge, self.judge_model = judge, judge_model
        self.judging, self.num_judgements = judging, num_judgements
        self._made(None)

    def check(self, ctx: Context) -> None:
        """Raise where prompts cannot be read or the judge's prompt cannot be used."""
        read_prompts(ctx, self.rows)
        check_judge(self.judge, ctx)

    def begin(self, ctx: Context) -> None:
        """Read the prompts."""
        ctx = _own(ctx)
        self._prompts = ctx.runtime.share(read_prompts(ctx, self.rows))
        self._judge = self._made(ctx)

    def measure(self, ctx: Context) -> dict[str, float]:
        """The mean over prompts of their responses' mean scores."""
        ctx = _own(ctx)
        scores = self._scores(ctx, self._judge, self._answered(ctx))
        known = [found for _, found in scores if found is not None]
        if not known:
            raise JudgeError(
                f"{ctx.stage}: the judge gave no score to any of {len(scores)} held-out prompts' "
                "responses; nothing to compare. Make its prompt fit what it writes, or raise "
                "judging.max_new_tokens."
            )
        return {"score": sum(known) / len(known)}

    def standing(self) -> Any:
        """Nothing: each check stands alone."""
        return None

    def resume(self, standing: Any) -> None:
        """Nothing to do."""

    def _made(self, ctx: Context | None) -> Any:
        model = None if self.judge_model is None or ctx is None else ctx.adapt(self.judge_model)
        return make_judge(
            self.judge, judging=self.judging, num_judgements=self.num_judgements, model=model
        )

    def _answered(self, ctx: Context) -> list[Answered]:
        """This process's prompts with the present weights' responses."""
        sampled = sample_candidates(
            ctx.model,
            self._prompts,
            self.sampling,
            self.num_samples,
            engine=ctx.engine,
            tokens=ctx.tokens,
            seed=ctx.seed,
            limit=ctx.limit(None),
        )
        found: dict[str, list[Candidate]] = {prompt.id: [] for prompt in self._prompts}
        for candidate in ctx.runtime.autocasted(sampled):
            found[candidate.prompt_id].append(candidate)
        return [(p, sorted(found[p.id], key=lambda c: id_order(c.id))) for p in self._prompts]

    def _scores(
        self, ctx: Context, judge: Any, answered: Sequence[Answered]
    ) -> list[tuple[str, float | None]]:
        """Each prompt's mean score over its responses, of all processes, in their order."""
        judged = judge.judge(ctx, *zip(*answered, strict=True)) if answered else ()
        scores = candidate_scores([c for _, own in answered for c in own], judged)
        found = [(prompt.id, mean_score(scores[c.id] for c in own)) for prompt, own in answered]
        return sorted(ctx.runtime.gather(found), key=lambda item: id_order(item[0]))


class VerifierAccuracy(HeldOutReward):
    """The share of responses to held-out prompts that a verifier calls correct.

    verifier: a text function in TRL's form, f(prompts, completions, **columns) -> numbers; 1 or
    more is correct, anything less is not, None is unknown and left out. num_samples responses of
    each prompt are averaged first. For reasoning-gym's tasks see `reasoning_task`.
    """

    @typed
    def __init__(
        self,
        prompts: Any,
        verifier: Any,
        *,
        sampling: SamplingConfig | None = None,
        num_samples: int = 1,
    ) -> None:
        super().__init__(prompts, Verifier(verifier), sampling=sampling, num_samples=num_samples)


class WinRateOverLast(HeldOutReward):
    """Whether the model still beats itself: responses compared with those of the last check.

    As in arXiv:2401.10020 (3.1.3), where a judge compares checkpoints of every 200 steps. judge: a
    ComparisonConfig, asked in both orders (where these disagree it is a tie), or any judge that
    scores: the higher score wins. The rest as in HeldOutReward; one response to each prompt.

    The score of the first check is 0.5; each further one adds its win rate (ties as a half) less a
    half. So it rises as long as checks win against the one before, and the best weights are those
    before the first that does not. The win rate itself is logged as early_stopping/win_rate. Its
    last responses are part of the state of training, so that a run that is stopped goes on alike.
    """

    @typed
    def __init__(
        self,
        prompts: Any,
        judge: Any,
        *,
        judge_model: nn.Module | None = None,
        sampling: SamplingConfig | None = None,
        judging: SamplingConfig | None = None,
        num_judgements: int = 1,
    ) -> None:
        super().__init__(
            prompts,
            judge,
            judge_model=judge_model,
            sampling=sampling,
            judging=judging,
            num_judgements=num_judgements,
        )
        self.total, self.last = 0.5, dict[str, tuple[int, ...]]()

    def begin(self, ctx: Context) -> None:
        """Read the prompts; there is no last check."""
        super().begin(ctx)
        self.total, self.last = 0.5, {}

    def measure(self, ctx: Context) -> dict[str, float]:
        """Compare, and keep the present responses for the next check."""
        ctx = _own(ctx)
        answered, rate = self._answered(ctx), 0.5
        if self.last:
            rate = self._win_rate(ctx, answered)
        self.total += rate - 0.5
        own = [(prompt.id, found[0].ids) for prompt, found in answered]
        self.last = dict(ctx.runtime.gather(own))
        return {"score": self.total, "win_rate": rate}

    def standing(self) -> Any:
        return {"total": self.total, "last": self.last}

    def resume(self, standing: Any) -> None:
        self.total = standing["total"]
        self.last = {name: tuple(ids) for name, ids in standing["last"].items()}

    def _win_rate(self, ctx: Context, answered: Sequence[Answered]) -> float:
        """Of the present responses against the last ones, over the prompts with a verdict."""
        groups, found = [], []
        for prompt, (now, *_) in answered:
            ids = self.last[prompt.id]
            before = replace(now, id=f"{prompt.id}/1", ids=ids, text=ctx.tokens.decode(ids))
            groups.append([now, before])
        prompts = [prompt for prompt, _ in answered]
        judged = self._judge.judge(ctx, prompts, groups) if groups else ()
        scores = candidate_scores([c for group in groups for c in group], judged)
        for (prompt, _), (now, before) in zip(answered, groups, strict=True):
            found.append((prompt.id, outcome(scores[now.id], scores[before.id])))
        every = [won for _, won in ctx.runtime.gather(found) if won is not None]
        if not every:
            raise JudgeError(
                f"{ctx.stage}: the judge gave no verdict on any held-out prompt; nothing to "
                "compare. Make its prompt fit what it writes, or raise judging.max_new_tokens."
            )
        return sum(every) / len(every)


def open_prompts(prompts: Any) -> Rows:
    """A dataset of held-out prompts, opened; DataError where it is none, or empty."""

    def no_stage(source: FromStage) -> Sequence[Any]:
        raise DataError(f"from_stage({source.stage!r}) cannot give held-out prompts.")

    rows = Rows(prompts, "prompts", no_stage)
    if len(rows) == 0:
        raise DataError("prompts is empty; it needs at least one row.")
    return rows


def read_prompts(ctx: Context, rows: Rows) -> list[Prompt]:
    """All prompts of a dataset; ids are <stage>/<row>/0."""
    limit = ctx.limit(None)
    places = range(len(rows))
    return [read_prompt(rows, i, f"{ctx.stage}/{i}/0", ctx.tokens, limit) for i in places]


def _own(ctx: Context) -> Context:
    """The context with ids of its own, and an engine that holds the weights being trained."""
    return replace(ctx, stage=f"{ctx.stage}/held_out", engine=ctx.local_engine())
