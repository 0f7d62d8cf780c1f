"""Two models answer the same held-out prompts, and a judge says whose responses are better.

Both sample with the same noise, so that equal models give equal responses. Responses and judgements
can be kept in a folder, from which a later call goes on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from self_rewarding_lm.config import ComparisonConfig, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.tokenizers import Tokenizer
from self_rewarding_lm.errors import (
    ConfigError,
    JudgeError,
    RunMismatchError,
    give_tokenizer,
    said,
    typed,
)
from self_rewarding_lm.evaluation.contexts import Opening, opened
from self_rewarding_lm.evaluation.held_out import open_prompts, read_prompts
from self_rewarding_lm.evaluation.judge_quality import PositionBias, position_bias
from self_rewarding_lm.evaluation.responses import (
    ResponseMeasures,
    WinRates,
    measure_responses,
    outcome,
    win_rates,
)
from self_rewarding_lm.evaluation.verifying import Verifier, accuracy, pass_at
from self_rewarding_lm.generation.engine import Engine
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.make import check_judge, make_judge
from self_rewarding_lm.judges.tally import unread_texts
from self_rewarding_lm.records import Candidate, Judgement, Prompt, stable_hash
from self_rewarding_lm.runs.fingerprint import as_named_now, fingerprint_of
from self_rewarding_lm.runs.lines import batched
from self_rewarding_lm.runs.stage_files import read_json
from self_rewarding_lm.runs.stage_folder import RECORDS_AT_ONCE, StageDir
from self_rewarding_lm.runs.stored import id_order
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.stats import Rate, ratio_interval
from self_rewarding_lm.text import amount

T = TypeVar("T", Candidate, Judgement)


@dataclass(frozen=True)
class Side:
    """What one of the models answered.

    responses: measures of their texts. tokens: mean number of new tokens. clipped: the share that
    max_new_tokens cut off. reward: the mean score; None if the judge compares. accuracy, pass_at:
    by the verifier; pass@k by k. candidates: in the order of the prompts.
    """

    responses: ResponseMeasures
    tokens: float
    clipped: float
    reward: Rate | None
    accuracy: Rate | None
    pass_at: dict[int, float]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Comparison:
    """Two models on held-out prompts; `rates` are those of the first.

    position: only if the judge compares. judgements: all of the judge's; for prompt i and sample s
    they name the responses <stage>/i/s/0 (of the first model) and <stage>/i/s/1.
    """

    first: Side
    second: Side
    rates: WinRates
    position: PositionBias | None
    judgements: tuple[Judgement, ...]


@typed
def compare(
    first: nn.Module | str | Path,
    second: nn.Module | str | Path,
    prompts: Any,
    *,
    judge: Any = None,
    judge_model: nn.Module | str | Path | None = None,
    judge_tokenizer: Tokenizer | None = None,
    judging: SamplingConfig | None = None,
    num_judgements: int = 1,
    verifier: Any = None,
    sampling: SamplingConfig | None = None,
    num_samples: int = 1,
    module: nn.Module | None = None,
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    eos_id: int | None = None,
    seed: int = 0,
    engine: Engine | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Comparison:
    """Let two models answer prompts, and let a judge say whose responses are better.

    first, second: a module, a folder or hub name, or "RUN:STAGE", a stage of a run by its name or
    number (from 1; "initial" if it was kept). module: if the models are not of Hugging Face, the
    module into which the weights of such names are loaded; it has its own weights afterwards.
    prompts: a dataset that neither model was trained on. sampling: default temperature 0.7, top-p
    0.9. Each model gives num_samples responses to each prompt; the i-th of one is compared with
    the i-th of the other.

    judge: a ComparisonConfig, with which judge_model compares in both orders (if they disagree it
    is a tie, as in arXiv:2401.10020); a RewardConfig, with which it gives num_judgements scores to
    each response; or a Judge, a text function or a reward module. The higher score wins. A Judge
    that asks the context's model, such as ImplicitJudge, asks the second model. Default: the
    verifier, a text function that gives 1 for a correct completion. judge_tokenizer: default that
    of judge_model; for a module it is `tokenizer`, with chat_template and eos_id. out: a folder
    that keeps all records; the same call goes on from them, and may ask for more samples.
    tokenizer, chat_template, eos_id, engine: as for the trainer.

    Raises ConfigError for settings that contradict each other, RunMismatchError if `out` was made
    with other settings, DataError for prompts that cannot be used.
    """
    # 1. who judges, and with which settings
    judge = _judge_or_verifier(judge, judge_model, verifier)
    if num_samples < 1:
        raise ConfigError(f"num_samples must be 1 or more; got {num_samples}.")
    contest = _Contest(
        judge=make_judge(judge, judging=judging, num_judgements=num_judgements),
        judge_settings={"judge": fingerprint_of(judge), "judging": fingerprint_of(judging)},
        verifier=None if verifier is None else Verifier(verifier),
        rows=open_prompts(prompts),
        sampling=sampling or SamplingConfig(),
        num_samples=num_samples,
        out=None if out is None else Path(out),
    )
    contest.judge.check_outside_stages()
    _check_weights(contest.judge)
    models = Opening(
        tokenizer, chat_template, eos_id, seed, engine or LocalEngine(), quiet, stage="compare"
    )
    shares_tokenizer = isinstance(judge_model, nn.Module) and judge_tokenizer is None
    judges = replace(models, engine=LocalEngine())
    if not shares_tokenizer:
        judges = replace(judges, tokenizer=judge_tokenizer, chat_template=None, eos_id=None)
    if isinstance(judge_model, nn.Module):  # before any work; others are loaded when it is done
        with opened(judge_model, None, judges) as (ctx, _):
            check_judge(judge, ctx)
    # 2. both models answer; a judge without a model of its own judges with the second model's
    contestants: list[Contestant] = []
    for name, source in zip(CONTESTANTS, (first, second), strict=True):
        with opened(source, module, models) as (ctx, weights):
            if judge_model is None:
                check_judge(judge, ctx)
            contestants.append(contest.answer(ctx, name, weights))
            if judge_model is None and len(contestants) == 2:
                return contest.decide(ctx, "none", contestants)
    # 3. the judging model judges, once the others are gone
    del ctx
    with opened(judge_model, None, judges) as (ctx, weights):  # type: ignore[arg-type]
        check_judge(judge, ctx)
        return contest.decide(ctx, weights, contestants)


CONTESTANTS = ("first", "second")
"""Names of their folders."""


Group = tuple[Prompt, list[Candidate]]
"""A prompt, and the two models' responses to it as a judge is given them."""


@dataclass(frozen=True)
class Contestant:
    """One of the two models. weights: their hash. prompts: in its own tokens.

    responses: by id, <prompt id>/<sample>. side: their measures.
    """

    weights: str
    prompts: list[Prompt]
    responses: dict[str, Candidate]
    side: Side


@dataclass(frozen=True)
class _Contest:
    """What both contestants are asked, and who judges. judge_settings: what `out` keeps of it."""

    judge: Judge
    judge_settings: dict[str, Any]
    verifier: Verifier | None
    rows: Rows
    sampling: SamplingConfig
    num_samples: int
    out: Path | None

    def answer(self, ctx: Context, name: str, weights: str) -> Contestant:
        """Sample what is missing of a model's responses, and measure all of them."""
        if ctx.tokens.tokenizer is None:
            raise ConfigError(
                "responses are compared as texts, so a tokenizer is needed; the model came without "
                f"one. {give_tokenizer()}"
            )
        prompts = read_prompts(ctx, self.rows)
        settings = {
            "weights": weights,
            "prompts": stable_hash(*(str(prompt.ids) for prompt in prompts)),
            "sampling": fingerprint_of(self.sampling),
            "end_ids": list(ctx.tokens.end_ids),
            "seed": ctx.seed,
        }
        folder = self._folder(name, ctx.runtime, settings)
        known = {} if folder is None else {c.id: c for c in folder.known(Candidate)}
        mine = ctx.runtime.share(prompts)
        sampled = ctx.sample(mine, self.sampling, self.num_samples, known=known.keys())
        total = len(mine) * self.num_samples
        new = _kept(ctx, folder, Candidate, sampled, "responses", "response", total)
        responses = known | {c.id: c for c in new}
        side = self._measure(ctx, prompts, responses)
        return Contestant(weights, prompts, responses, side)

    def _measure(
        self, ctx: Context, prompts: list[Prompt], responses: Mapping[str, Candidate]
    ) -> Side:
        """A model's responses, measured and verified; the judge has not seen them yet."""
        groups = [
            [
                response
                for sample in range(self.num_samples)
                if (response := responses[f"{prompt.id}/{sample}"]).reason is None
            ]
            for prompt in prompts
        ]
        candidates = [candidate for group in groups for candidate in group]
        counts: list[tuple[int, int]] = []  # of each prompt: how many were verified, are correct
        if self.verifier is not None:
            judged = self.verifier.judge(ctx, prompts, groups)
            scores = {j.candidate_ids[0]: j.score for j in judged}
            for group in groups:
                known = [score for c in group if (score := scores[c.id]) is not None]
                counts.append((len(known), sum(score == 1 for score in known)))
        total = max(1, len(candidates))
        return Side(
            responses=measure_responses([candidate.text or "" for candidate in candidates]),
            tokens=sum(len(candidate.ids) for candidate in candidates) / total,
            clipped=sum(candidate.finished is False for candidate in candidates) / total,
            reward=None,
            accuracy=None if self.verifier is None else accuracy(counts, seed=ctx.seed),
            pass_at={} if self.verifier is None else pass_at(counts, self.num_samples),
            candidates=tuple(candidates),
        )

    def decide(self, ctx: Context, weights: str, contestants: Sequence[Contestant]) -> Comparison:
        """Judge what is missing and compare. weights: the hash of the judge's."""
        hashes = [*(contestant.weights for contestant in contestants), weights]
        settings = {"weights": hashes, **self.judge_settings, "seed": ctx.seed}
        folder = self._folder("judged", ctx.runtime, settings)
        groups = _groups(contestants, self.num_samples)
        judgements = self._judgements(ctx, groups, folder)
        return _comparison(contestants, groups, judgements, self.judge, ctx.seed)

    def _judgements(
        self, ctx: Context, groups: Sequence[Group], out: StageDir | None
    ) -> list[Judgement]:
        """All judgements of the groups, known ones among them, in the order of their ids."""
        judge = self.judge
        # 1. the groups that miss judgements
        known = {} if out is None else {j.id: j for j in out.known(Judgement)}
        of_prompt: dict[str, list[Judgement]] = {}
        for judgement in known.values():
            prompt_id = judgement.candidate_ids[0].rpartition("/")[0]
            of_prompt.setdefault(prompt_id, []).append(judgement)
        missing = [
            (prompt, candidates)
            for prompt, candidates in ctx.runtime.share(list(groups))
            if not judge.has_judged(candidates, of_prompt.get(prompt.id, ()))
        ]

        # 2. judge them
        def judged() -> Iterator[Judgement]:
            if missing:
                prompts, candidates_PG = map(list, zip(*missing, strict=True))
                yield from (
                    j for j in judge.judge(ctx, prompts, candidates_PG) if j.id not in known
                )

        new = _kept(ctx, out, Judgement, judged(), "judging", "judgement", None)
        every = known | {j.id: j for j in new}
        # 3. leave out judgements of an earlier call that asked for more samples or judgements
        responses = {candidate.id for _, group in groups for candidate in group}
        wanted = [j for j in every.values() if responses.issuperset(j.candidate_ids)]
        if judge.knows_ids:
            ids = {i for _, group in groups for i in judge.judgement_ids(group)}
            wanted = [j for j in wanted if j.id in ids]
        return sorted(wanted, key=lambda j: id_order(j.id))

    def _folder(self, name: str, runtime: Runtime, settings: dict[str, Any]) -> StageDir | None:
        """The folder of records made with these settings, begun if it is new; None without `out`.

        Raises RunMismatchError if it was made with other settings.
        """
        if self.out is None:
            return None
        config, before = self.out / name / "config.json", None
        if runtime.from_main(config.exists()):
            before = as_named_now(read_json(config))
        if before is not None and before != settings:
            other = [key for key, value in settings.items() if before.get(key) != value]
            raise RunMismatchError(
                f"{config.parent} was made with other settings than now ({', '.join(other)}). "
                "Choose another `out`, or delete the folder to have it made again."
            )
        folder = StageDir(config.parent, runtime)
        folder.begin(settings)
        return folder


def _kept(
    ctx: Context,
    out: StageDir | None,
    record_type: type[T],
    records: Iterable[T],
    label: str,
    unit: str,
    total: int | None,
) -> list[T]:
    """The records that all processes make, behind a progress bar; on disk if there is a folder."""
    made: list[T] = []
    with ctx.runtime.progress(total, f"compare: {label}", unit, is_share=True) as bar:
        between, counted = ctx.runtime.stopping.between, bar.counting(records)
        lists = batched(between(counted), RECORDS_AT_ONCE) if out is None else out.keep(counted)
        for some in lists:
            made += some
    if out is not None:
        out.merge(record_type)
    return ctx.runtime.gather(made)


def _judge_or_verifier(judge: Any, judge_model: Any, verifier: Any) -> Any:
    """The judge, by default the verifier; ConfigError if nobody could judge."""
    asks = isinstance(judge, RewardConfig | ComparisonConfig)
    if judge is None and judge_model is not None:
        return ComparisonConfig()
    if judge is None and verifier is not None:
        return Verifier(verifier)
    if judge is None or (asks and judge_model is None):
        ways = said(
            "judge_model (with judge=ComparisonConfig(...) or RewardConfig(...)), or judge= a "
            "judge "
            "object, a text function or a reward module, or a verifier",
            "--judge-model (with --pairwise or --reward), --judge or --verifier",
        )
        raise ConfigError(f"who judges? Give {ways}.")
    if judge_model is not None and not asks:
        raise ConfigError(
            f"{said('judge_model', '--judge-model')} is asked with a prompt, so that "
            f"{said('judge', '--judge')} must be a RewardConfig or a ComparisonConfig; got "
            f"{type(judge).__name__}. Leave one of them out."
        )
    return judge


def _check_weights(judge: Judge) -> None:
    """Raise ConfigError if a judge asks for weights of a run by name."""
    if weights := sorted(judge.weights_used()):
        raise ConfigError(
            f"the judge {judge.name!r} asks for the weights {', '.join(weights)}, which a stage of "
            "a run can load and compare cannot. Take a judge that needs the present weights alone, "
            "such as ImplicitJudge(reference=None)."
        )


def _groups(contestants: Sequence[Contestant], num_samples: int) -> list[Group]:
    """The i-th response of the first model beside the second's; ids <stage>/<row>/<i>/<0 or 1>."""
    groups = []
    for prompt in contestants[-1].prompts:
        for sample in range(num_samples):
            renamed = replace(prompt, id=f"{prompt.id.rpartition('/')[0]}/{sample}")
            both = [contestant.responses[f"{prompt.id}/{sample}"] for contestant in contestants]
            if all(candidate.reason is None for candidate in both):
                candidates = [
                    replace(candidate, id=f"{renamed.id}/{place}", prompt_id=renamed.id)
                    for place, candidate in enumerate(both)
                ]
                groups.append((renamed, candidates))
    return groups


def _comparison(
    contestants: Sequence[Contestant],
    groups: Sequence[Group],
    judgements: Sequence[Judgement],
    judge: Judge,
    seed: int,
) -> Comparison:
    scores = judge.scores_of_all([candidates for _, candidates in groups], judgements)
    outcomes = [outcome(scores[one.id], scores[other.id]) for _, (one, other) in groups]
    if not any(known is not None for known in outcomes):
        none = f"the judge gave no verdict on any of {amount(len(groups), 'pair')} of responses."
        if judgements and all(j.reason == "low_mass" and not j.text for j in judgements):
            write = said("without forced_ending='at_once'", "without --at-once")
            raise JudgeError(
                f"{none} It is asked for a label at once, and finds no label likely there. End its "
                f"prompt so that a label must follow, let it write before ({write}), or take "
                "another judge."
            )
        wrote = f" What it wrote:\n{unread_texts(judgements)}\n" if judgements else " "
        labels = said(
            "score_mode='expected', forced_ending='at_once' of the comparison prompt",
            "--score expected --at-once",
        )
        raise JudgeError(
            f"{none}{wrote}Make its prompt fit what it writes, raise judging.max_new_tokens, or "
            f"take the labels' probabilities ({labels})."
        )
    rates = win_rates(
        outcomes,
        [(float(len(one.text or "")), float(len(other.text or ""))) for _, (one, other) in groups],
        groups=[str(prompt.row) for prompt, _ in groups],
        seed=seed,
    )
    first, second = (contestant.side for contestant in contestants)
    if any(len(j.candidate_ids) == 1 for j in judgements):
        first, second = (
            replace(side, reward=_reward(groups, scores, place, seed))
            for place, side in enumerate((first, second))
        )
    return Comparison(first, second, rates, position_bias(judgements), tuple(judgements))


def _reward(
    groups: Sequence[Group], scores: Mapping[str, float | None], place: int, seed: int
) -> Rate:
    """The mean score of one contestant's responses, resampled by prompt. place: 0 or 1."""
    of_row: dict[int, list[float]] = {}
    for prompt, candidates in groups:
        if (score := scores[candidates[place].id]) is not None:
            of_row.setdefault(prompt.row, []).append(score)
    sums, counts = map(sum, of_row.values()), map(len, of_row.values())
    parts, wholes = list(sums), list(counts)
    value = sum(parts) / sum(wholes) if parts else None
    return Rate(value, ratio_interval(parts, wholes, seed=seed))
