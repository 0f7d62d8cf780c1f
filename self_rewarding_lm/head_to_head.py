"""Two models on the same held-out prompts: what they answer, and which answers are better.

Both sample with the same noise, so that equal models give equal responses. What was sampled and
judged can be kept in a folder and is used again. Measures are in `quality`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from self_rewarding_lm.answering import (
    AT_ONCE,
    Side,
    answer_all,
    kept_in,
    measured,
    read_all,
)
from self_rewarding_lm.batching import batched
from self_rewarding_lm.checkpoints import opened
from self_rewarding_lm.config import ComparisonConfig, RewardConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.datasets import Rows
from self_rewarding_lm.engine import Engine, LocalEngine
from self_rewarding_lm.errors import (
    ConfigError,
    JudgeError,
    typed,
)
from self_rewarding_lm.fingerprints import describe
from self_rewarding_lm.held_out import open_prompts
from self_rewarding_lm.judge_quality import PositionBias, position_bias
from self_rewarding_lm.judges import Judge
from self_rewarding_lm.judging import candidate_scores
from self_rewarding_lm.making_judges import check_judge, make_judge
from self_rewarding_lm.quality import (
    Rate,
    WinRates,
    outcome,
    ratio_interval,
    win_rates,
)
from self_rewarding_lm.records import Candidate, Judgement, Prompt
from self_rewarding_lm.sampling import stable_hash
from self_rewarding_lm.store import StageDir
from self_rewarding_lm.stored import id_order
from self_rewarding_lm.tokens import Tokenizer
from self_rewarding_lm.verifying import Verifier

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
    contest = _Contest(
        judge=judge,
        made=make_judge(judge, judging=judging, num_judgements=num_judgements),
        told={"judge": describe(judge), "judging": describe(judging)},
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
            "sampling": describe(self.sampling),
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
    judged = {candidate_id for j in known.values() for candidate_id in j.candidate_ids}
    ids_of = getattr(judge, "judgement_ids", None)

    def misses(candidates: list[Candidate]) -> bool:
        if ids_of is not None:
            return not known.keys() >= set(ids_of(candidates))
        return not judged.issuperset(c.id for c in candidates)

    mine = [group for group in ctx.runtime.share(list(groups)) if misses(group[1])]
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
    ids = None if ids_of is None else {i for _, own in groups for i in ids_of(own)}
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
