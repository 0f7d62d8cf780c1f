"""A model's responses to held-out prompts: sampled, kept in a folder, measured.

Knows nothing of judges, nor of another model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from self_rewarding_lm.batching import batched
from self_rewarding_lm.config import SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.datasets import Rows
from self_rewarding_lm.errors import ConfigError, RunMismatchError
from self_rewarding_lm.fingerprints import as_named_now
from self_rewarding_lm.held_out import read_prompts
from self_rewarding_lm.quality import Rate, ResponseMeasures, measure_responses
from self_rewarding_lm.records import Candidate, Prompt
from self_rewarding_lm.rollout import rollout
from self_rewarding_lm.runtime import Runtime
from self_rewarding_lm.store import StageDir, read_json
from self_rewarding_lm.verifying import Verifier, accuracy, pass_at

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
        sampled = rollout(ctx, mine, sampling, num_samples, known=known.keys())
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
