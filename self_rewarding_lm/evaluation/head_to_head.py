"""Two models on the same held-out prompts: what they answer, and whose answers are better.

Both sample with the same noise, so that equal models give equal responses. What was sampled and
judged can be kept in a folder and is used again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from self_rewarding_lm.config import ComparisonConfig, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.tokenizers import Tokenizer
from self_rewarding_lm.errors import ConfigError, JudgeError, RunMismatchError, typed
from self_rewarding_lm.evaluation.contexts import opened
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
from self_rewarding_lm.records import Candidate, Judgement, Prompt, stable_hash
from self_rewarding_lm.runs.fingerprint import as_named_now, fingerprint_of
from self_rewarding_lm.runs.lines import batched
from self_rewarding_lm.runs.stage_folder import StageDir, read_json
from self_rewarding_lm.runs.stored import id_order
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.scores import candidate_scores
from self_rewarding_lm.stats import Rate, ratio_interval

AT_ONCE = 64  # records that are written together


@dataclass(frozen=True)
class Side:
    """What one of the models answered.

    responses: their texts measured. tokens: mean new tokens. clipped: the share that
    max_new_tokens cut off. reward: the mean score of a judge that scores; None of one that
    compares. accuracy, pass_at: by the verifier, pass@k by k. candidates: in the prompts' order.
    """

    responses: ResponseMeasures
    tokens: float
    clipped: float
    reward: Rate | None
    accuracy: Rate | None
    pass_at: dict[int, float]
    candidates: tuple[Candidate, ...]


def read_all(ctx: Context, rows: Rows) -> list[Prompt]:
    """All prompts; ConfigError where responses would have no text."""
    if ctx.tokens.tokenizer is None:
        raise ConfigError(
            "responses are compared as texts, so a tokenizer is needed; the model came without "
            "one. Give tokenizer=..."
        )
    return read_prompts(ctx, rows)


def kept_in(
    out: Path | None, name: str, runtime: Runtime, settings: dict[str, Any]
) -> StageDir | None:
    """A folder of records that were made with these settings, or will be."""
    if out is None:
        return None
    config, before = out / name / "config.json", None
    if runtime.from_main(config.exists()):
        before = as_named_now(read_json(config))
    if before is not None and before != settings:
        other = [key for key, value in settings.items() if before.get(key) != value]
        raise RunMismatchError(
            f"{config.parent} was made with other settings than now ({', '.join(other)}). Choose "
            "another `out`, or delete the folder to have it made again."
        )
    found = StageDir(config.parent, runtime)
    found.begin(settings)
    return found


def answer_all(
    ctx: Context,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    num_samples: int,
    out: StageDir | None,
) -> dict[str, Candidate]:
    """Every response by its id, <prompt id>/<sample>."""
    known = {} if out is None else {c.id: c for c in out.known(Candidate)}
    mine = ctx.runtime.share(list(prompts))
    total, found = len(mine) * num_samples, list[Candidate]()
    with ctx.runtime.progress(total, "compare: responses", "response") as bar:
        sampled = ctx.sample(mine, sampling, num_samples, known=known.keys())
        for some in batched(sampled, AT_ONCE):
            if out is not None:
                out.append(some)
            found += some
            bar.update(len(some))
    if out is not None:
        out.merge(Candidate)
    return known | {c.id: c for c in ctx.runtime.gather(found)}


def measured(
    ctx: Context,
    prompts: Sequence[Prompt],
    answered: dict[str, Candidate],
    num_samples: int,
    checker: Verifier | None,
) -> Side:
    """A model's responses, measured and verified; nothing of the judge."""
    samples = range(num_samples)
    groups = [[answered[f"{prompt.id}/{sample}"] for sample in samples] for prompt in prompts]
    groups = [[c for c in own if c.reason is None] for own in groups]
    every = [candidate for own in groups for candidate in own]
    checked: list[tuple[int, int]] = []
    if checker is not None:
        scores = {j.candidate_ids[0]: j.score for j in checker.judge(ctx, prompts, groups)}
        for own in groups:
            known = [score for c in own if (score := scores[c.id]) is not None]
            checked.append((len(known), sum(score == 1 for score in known)))
    total = max(1, len(every))
    return Side(
        responses=measure_responses([candidate.text or "" for candidate in every]),
        tokens=sum(len(candidate.ids) for candidate in every) / total,
        clipped=sum(candidate.finished is False for candidate in every) / total,
        reward=None,
        accuracy=None if checker is None else accuracy(checked, seed=ctx.seed),
        pass_at={} if checker is None else pass_at(checked, num_samples),
        candidates=tuple(every),
    )


SIDES = ("first", "second")


@dataclass(frozen=True)
class Comparison:
    """Two models on held-out prompts; `rates` are the first one's.

    position: of a judge that compares. judgements: all that the judge said; those of prompt i and
    sample s name the responses <stage>/i/s/0 (the first model's) and <stage>/i/s/1.
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
    """Let two models answer prompts, and a judge say which answers are better.

    first, second: a module, a folder or hub name, or "RUN:STAGE", a stage of a run by name or
    number (from 1; "initial" where it was kept). module: of models that are no Hugging Face ones,
    the module into which the weights of such names are loaded; it is afterwards as before.
    prompts: a dataset that neither was trained on. sampling: default temperature 0.7, top-p 0.9;
    num_samples responses of each to each prompt, the i-th against the i-th.

    judge: a ComparisonConfig, with which judge_model is asked in both orders (where they disagree
    it is a tie, as in arXiv:2401.10020); a RewardConfig, with which it scores, num_judgements each;
    or a Judge with a model of its own, a text function or a reward module. The higher score wins.
    A Judge that asks the context's model (ImplicitJudge) asks the second one.
    Default: the verifier, a text function that gives 1 for a correct completion. judge_tokenizer:
    default its own; a module's is `tokenizer`, with chat_template and eos_id. out: a folder in
    which everything is kept and used again by the same call; more samples may be asked for.
    tokenizer, chat_template, eos_id, engine: as for the trainer.

    Raises ConfigError for what does not go together, RunMismatchError where `out` was made with
    other settings, DataError for prompts that cannot be used.
    """
    judge = _checked_judge(judge, judge_model, verifier)
    if num_samples < 1:
        raise ConfigError(f"num_samples must be 1 or more; got {num_samples}.")
    checker = None if verifier is None else Verifier(verifier)
    made = make_judge(judge, judging=judging, num_judgements=num_judgements)
    if weights := sorted(made.weights_used()):
        raise ConfigError(
            f"the judge {made.name!r} asks for the weights {', '.join(weights)}, which a stage of "
            "a run can load and compare cannot. Take a judge that needs the present weights alone, "
            "such as ImplicitJudge(reference=None)."
        )
    contest = _Contest(
        judge=judge,
        made=made,
        told={"judge": fingerprint_of(judge), "judging": fingerprint_of(judging)},
        checks_here=judge_model is None,
        checker=checker,
        rows=open_prompts(prompts),
        sampling=sampling or SamplingConfig(),
        num_samples=num_samples,
        out=None if out is None else Path(out),
    )
    common: dict[str, Any] = {"seed": seed, "quiet": quiet, "stage": "compare"}
    said = {"chat_template": chat_template, "eos_id": eos_id, "engine": engine or LocalEngine()}
    own = {"engine": LocalEngine(), "tokenizer": judge_tokenizer, **common}
    own |= {"chat_template": None, "eos_id": None}
    if isinstance(judge_model, nn.Module) and judge_tokenizer is None:
        own |= {"tokenizer": tokenizer, "chat_template": chat_template, "eos_id": eos_id}
    if isinstance(judge_model, nn.Module):  # before any work; others are loaded when it is done
        with opened(judge_model, None, **own) as (ctx, _):
            check_judge(judge, ctx)
    for source in (first, second):
        with opened(source, module, tokenizer, **said, **common) as (ctx, name):
            contest.answer(ctx, name)
    if judge_model is None:
        return contest.judge_all(ctx, "none")
    del ctx  # its model, so that there is room for the judge's
    with opened(judge_model, None, **own) as (ctx, name):
        check_judge(judge, ctx)
        return contest.judge_all(ctx, name)


@dataclass
class _Contest:
    """A comparison while it is made.

    told: the judge in words. checks_here: the judge works with the contestants' own tokens.
    """

    judge: Any
    made: Judge
    told: dict[str, Any]
    checks_here: bool
    checker: Verifier | None
    rows: Rows
    sampling: SamplingConfig
    num_samples: int
    out: Path | None
    prompts: list[Prompt] = field(default_factory=list)
    answered: list[dict[str, Candidate]] = field(default_factory=list)
    sides: list[Side] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def answer(self, ctx: Context, name: str) -> None:
        """The next model's responses. name: of its weights."""
        if self.checks_here:
            check_judge(self.judge, ctx)
        self.prompts = read_all(ctx, self.rows)
        settings = {
            "weights": name,
            "prompts": stable_hash(*(str(prompt.ids) for prompt in self.prompts)),
            "sampling": fingerprint_of(self.sampling),
            "end_ids": list(ctx.tokens.end_ids),
            "seed": ctx.seed,
        }
        folder = kept_in(self.out, SIDES[len(self.sides)], ctx.runtime, settings)
        found = answer_all(ctx, self.prompts, self.sampling, self.num_samples, folder)
        self.answered.append(found)
        self.names.append(name)
        self.sides.append(measured(ctx, self.prompts, found, self.num_samples, self.checker))

    def judge_all(self, ctx: Context, name: str) -> Comparison:
        """What the judge says of all. name: of its weights."""
        settings = {"weights": [*self.names, name], **self.told, "seed": ctx.seed}
        folder = kept_in(self.out, "judged", ctx.runtime, settings)
        groups = _groups(self.prompts, self.answered, self.num_samples)
        return _compared(self.sides, groups, _judged(ctx, self.made, groups, folder), ctx.seed)


Group = tuple[Prompt, list[Candidate]]
"""A prompt, and the two models' responses to it as a judge is given them."""


def _checked_judge(judge: Any, judge_model: Any, verifier: Any) -> Any:
    """The judge, or the verifier in its place; ConfigError where nobody could judge."""
    asks = isinstance(judge, RewardConfig | ComparisonConfig)
    if judge is None and judge_model is not None:
        return ComparisonConfig()
    if judge is None and verifier is not None:
        return Verifier(verifier)
    if judge is None or (asks and judge_model is None):
        raise ConfigError(
            "who judges? Give judge_model (with judge=ComparisonConfig(...) or RewardConfig(...)), "
            "or judge= a judge object, a text function or a reward module, or a verifier."
        )
    if judge_model is not None and not asks:
        raise ConfigError(
            "judge_model is asked with a prompt, so that judge must be a RewardConfig or a "
            f"ComparisonConfig; got {type(judge).__name__}. Leave judge_model out."
        )
    return judge


def _groups(
    prompts: Sequence[Prompt], answered: Sequence[dict[str, Candidate]], num_samples: int
) -> list[Group]:
    """The i-th response of the first model beside the second's; ids <stage>/<row>/<i>/<0 or 1>."""
    found = []
    for prompt in prompts:
        for sample in range(num_samples):
            own = replace(prompt, id=f"{prompt.id.rpartition('/')[0]}/{sample}")
            both = [side[f"{prompt.id}/{sample}"] for side in answered]
            if all(candidate.reason is None for candidate in both):
                shown = [
                    replace(c, id=f"{own.id}/{i}", prompt_id=own.id) for i, c in enumerate(both)
                ]
                found.append((own, shown))
    return found


def _judged(
    ctx: Context, judge: Judge, groups: Sequence[Group], out: StageDir | None
) -> list[Judgement]:
    """All judgements, those that are known among them, in the order of their ids."""
    known = {} if out is None else {j.id: j for j in out.known(Judgement)}
    of_prompt: dict[str, list[Judgement]] = {}
    for judgement in known.values():
        of_prompt.setdefault(judgement.candidate_ids[0].rpartition("/")[0], []).append(judgement)
    mine = [
        (prompt, candidates)
        for prompt, candidates in ctx.runtime.share(list(groups))
        if not judge.has_judged(candidates, of_prompt.get(prompt.id, ()))
    ]
    found = list[Judgement]()
    with ctx.runtime.progress(None, "compare: judging", "judgement") as bar:
        coming = judge.judge(ctx, *map(list, zip(*mine, strict=True))) if mine else ()
        for some in batched(ctx.runtime.stopping.between(coming), AT_ONCE):
            new = [judgement for judgement in some if judgement.id not in known]
            if out is not None:
                out.append(new)
            found += new
            bar.update(len(some))
    if out is not None:
        out.merge(Judgement)
    shown = {candidate.id for _, own in groups for candidate in own}
    ids = {i for _, own in groups for i in judge.judgement_ids(own)} if judge.knows_ids else ()
    every = known | {j.id: j for j in ctx.runtime.gather(found)}
    asked = [
        j for j in every.values() if shown.issuperset(j.candidate_ids) and (not ids or j.id in ids)
    ]
    return sorted(asked, key=lambda j: id_order(j.id))


def _compared(
    sides: Sequence[Side], groups: Sequence[Group], judgements: Sequence[Judgement], seed: int
) -> Comparison:
    scores = candidate_scores([c for _, own in groups for c in own], judgements)
    outcomes = [outcome(scores[one.id], scores[other.id]) for _, (one, other) in groups]
    if not any(found is not None for found in outcomes):
        raise JudgeError(
            f"the judge gave no verdict on any of {len(groups)} pairs of responses. Make its "
            "prompt fit what it writes, or raise judging.max_new_tokens."
        )
    rates = win_rates(
        outcomes,
        [(float(len(one.text or "")), float(len(other.text or ""))) for _, (one, other) in groups],
        groups=[str(prompt.row) for prompt, _ in groups],
        seed=seed,
    )
    first, second = sides
    if any(len(j.candidate_ids) == 1 for j in judgements):
        first, second = (
            replace(side, reward=_reward(groups, scores, place, seed))
            for place, side in enumerate(sides)
        )
    return Comparison(first, second, rates, position_bias(judgements), tuple(judgements))


def _reward(
    groups: Sequence[Group], scores: Mapping[str, float | None], place: int, seed: int
) -> Rate:
    """The mean of one side's scores, by prompt."""
    sums: dict[int, list[float]] = {}
    for prompt, own in groups:
        if (score := scores[own[place].id]) is not None:
            sums.setdefault(prompt.row, []).append(score)
    parts, wholes = [sum(found) for found in sums.values()], [len(f) for f in sums.values()]
    value = sum(parts) / sum(wholes) if sums else None
    return Rate(value, ratio_interval(parts, wholes, seed=seed))
