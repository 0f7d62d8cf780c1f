"""Early stopping by the model's responses to held-out prompts: ready-made evaluations.

A stage takes one of them as `early_stopper_eval_module`. At each check it samples a response to
every prompt with the present weights and measures these responses. The noise is the same at every
check, so only the weights make a difference. Each of several processes takes a part of the prompts.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import nn

from self_rewarding_lm.config import ComparisonConfig, FromStage, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import Rows, read_prompt
from self_rewarding_lm.errors import ConfigError, DataError, JudgeError, typed
from self_rewarding_lm.evaluation.responses import outcome
from self_rewarding_lm.evaluation.verifying import Verifier
from self_rewarding_lm.generation.candidates import sample_candidates
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.make import check_judge, make_judge
from self_rewarding_lm.records import Candidate, Prompt
from self_rewarding_lm.runs.stored import id_order
from self_rewarding_lm.scores import candidate_scores, exact, mean_score
from self_rewarding_lm.text import amount

HALF = Fraction(1, 2)

Answered = tuple[Prompt, list[Candidate]]
"""A prompt and the model's responses to it."""


class HeldOutReward:
    """The mean score that a judge gives to the model's responses to held-out prompts.

    prompts: a dataset of prompts (docs/data.md). judge: a RewardConfig, with which `judge_model` (a
    module with the policy's tokens) is asked, by default the policy itself; or a Judge such as
    ServerJudge, a text function in TRL's form or a reward module. A policy that judges itself may
    come to like its responses without answering better. sampling, judging: default temperature 0.7,
    top-p 0.9. num_judgements: of each response; their mean is its score. Responses without a score
    are left out. Raises JudgeError if no response has a score.
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
        self._build_judge(None)  # its errors come here

    def check(self, ctx: Context) -> None:
        """Raise an error if prompts cannot be read or the judge's prompt cannot be used."""
        read_prompts(ctx, self.rows)
        check_judge(self.judge, ctx)

    def begin(self, ctx: Context) -> None:
        """Read the prompts and build the judge."""
        ctx = _held_out_context(ctx)
        self._prompts = ctx.runtime.share(read_prompts(ctx, self.rows))
        self._judge = self._build_judge(ctx)

    def measure(self, ctx: Context) -> dict[str, float]:
        """The mean over prompts of the mean score of their responses."""
        ctx = _held_out_context(ctx)
        scores = self._scores(ctx, self._sample(ctx))
        known = [score for _, score in scores if score is not None]
        if not known:
            raise JudgeError(
                f"{ctx.stage}: the judge gave no score to any response to "
                f"{amount(len(scores), 'held-out prompt')}; nothing to compare. Make its "
                "prompt fit what it writes, or raise judging.max_new_tokens."
            )
        return {"score": float(sum(map(exact, known)) / len(known))}

    def standing(self) -> Any:
        """What `resume` needs: nothing, as no check depends on another."""
        return None

    def resume(self, standing: Any) -> None:
        """Do nothing."""

    def _build_judge(self, ctx: Context | None) -> Judge:
        model = None if self.judge_model is None or ctx is None else ctx.adapt(self.judge_model)
        judge = make_judge(
            self.judge, judging=self.judging, num_judgements=self.num_judgements, model=model
        )
        judge.check_outside_stages()
        return judge

    def _sample(self, ctx: Context) -> list[Answered]:
        """The present weights' responses to this process's prompts."""
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
        responses: dict[str, list[Candidate]] = {prompt.id: [] for prompt in self._prompts}
        total = len(self._prompts) * self.num_samples
        candidates = ctx.runtime.counted(
            ctx.runtime.autocasted(sampled), total, "held-out response"
        )
        for candidate in candidates:
            responses[candidate.prompt_id].append(candidate)
        return [(p, sorted(responses[p.id], key=lambda c: id_order(c.id))) for p in self._prompts]

    def _scores(self, ctx: Context, answered: Sequence[Answered]) -> list[tuple[str, float | None]]:
        """The id of each prompt of all processes and the mean score of its responses, in order."""
        scores = self._judged(ctx, answered)
        means = [
            (prompt.id, mean_score(scores[c.id] for c in responses))
            for prompt, responses in answered
        ]
        return sorted(ctx.runtime.gather(means), key=lambda item: id_order(item[0]))

    def _judged(self, ctx: Context, answered: Sequence[Answered]) -> dict[str, float | None]:
        """The judge's scores of these responses by their ids.

        In runs of format 1 all judgements count alike, those of an ensemble's filters too.
        """
        if not answered:
            return {}
        prompts, candidates_PG = zip(*answered, strict=True)
        total = sum(len(self._judge.judgement_ids(group)) for group in candidates_PG)
        asked = self._judge.judge(ctx, prompts, candidates_PG)
        judgements = ctx.runtime.counted(asked, total, "held-out judgement")
        if ctx.format == 1:
            return candidate_scores([c for group in candidates_PG for c in group], judgements)
        return self._judge.scores_of_all(candidates_PG, judgements)


class VerifierAccuracy(HeldOutReward):
    """The share of responses to held-out prompts that a verifier calls correct.

    verifier: a text function in TRL's form, f(prompts, completions, **columns) -> numbers; 1 or
    more is correct, less is not, None is unknown and left out. The num_samples responses to each
    prompt are averaged first. For tasks of reasoning-gym see `reasoning_task`.
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
    """Whether the model still improves: its responses are compared with those of the last check.

    As in arXiv:2401.10020 (3.1.3), where a judge compares checkpoints of every 200 steps. judge: a
    ComparisonConfig, asked in both orders (if these disagree it is a tie), or any judge that
    scores: the higher score wins. All else is as in HeldOutReward, with one response to each
    prompt.

    The score of the first check is 0.5; each later check adds its win rate (a tie is half a win)
    minus a half. So the score rises as long as each check wins against the one before, and the best
    weights are those before the first check that does not. The win rate is logged as
    early_stopping/win_rate. The last responses are part of the state of training, so a run that was
    stopped goes on in the same way.
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
        """Read the prompts and build the judge; no check has been made yet."""
        super().begin(ctx)
        self.total, self.last = 0.5, {}

    def measure(self, ctx: Context) -> dict[str, float]:
        """Compare with the last responses, and keep the present ones for the next check."""
        ctx = _held_out_context(ctx)
        answered = self._sample(ctx)
        rate = self._win_rate(ctx, answered) if self.last else 0.5
        self.total = float(exact(self.total) + (exact(rate) - HALF))
        ids = [(prompt.id, responses[0].ids) for prompt, responses in answered]
        self.last = dict(ctx.runtime.gather(ids))
        return {"score": self.total, "win_rate": rate}

    def standing(self) -> Any:
        """The score and the last responses of all prompts."""
        return {"total": self.total, "last": self.last}

    def resume(self, standing: Any) -> None:
        """Go on from the score and the responses of `standing`."""
        self.total = standing["total"]
        self.last = {name: tuple(ids) for name, ids in standing["last"].items()}

    def _win_rate(self, ctx: Context, answered: Sequence[Answered]) -> float:
        """The present responses' win rate against the last ones, over prompts with a verdict."""
        groups = []
        for prompt, (now, *_) in answered:
            ids = self.last[prompt.id]
            before = replace(now, id=f"{prompt.id}/1", ids=ids, text=ctx.tokens.decode(ids))
            groups.append((prompt, [now, before]))
        scores = self._judged(ctx, groups)
        outcomes = [outcome(scores[now.id], scores[before.id]) for _, (now, before) in groups]
        known = [won for won in ctx.runtime.gather(outcomes) if won is not None]
        if not known:
            raise JudgeError(
                f"{ctx.stage}: the judge gave no verdict on any held-out prompt; nothing to "
                "compare. Make its prompt fit what it writes, or raise judging.max_new_tokens."
            )
        return sum(known) / len(known)


def open_prompts(prompts: Any) -> Rows:
    """Open a dataset of held-out prompts; DataError if it is no dataset or is empty."""

    def no_stage(source: FromStage) -> Sequence[Any]:
        raise DataError(f"from_stage({source.stage!r}) cannot give held-out prompts.")

    rows = Rows(prompts, "prompts", no_stage)
    if len(rows) == 0:
        raise DataError("prompts is empty; it needs at least one row.")
    return rows


def read_prompts(ctx: Context, rows: Rows) -> list[Prompt]:
    """All prompts of a dataset, with the ids <stage>/<row>/0."""
    limit, count = ctx.limit(None), len(rows)
    return [read_prompt(rows, i, f"{ctx.stage}/{i}/0", ctx.tokens, limit) for i in range(count)]


def _held_out_context(ctx: Context) -> Context:
    """The context with ids apart from the stage's, and an engine that has the weights in training.

    A server holds the weights with which the stage began.
    """
    return replace(ctx, stage=f"{ctx.stage}/held_out", engine=ctx.local_engine())
