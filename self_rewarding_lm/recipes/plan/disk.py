"""What a run writes: weights, those that are kept while a stage trains, and records."""

from dataclasses import dataclass

from self_rewarding_lm.config import FinetuneConfig
from self_rewarding_lm.stages.base import TrainingConfig
from self_rewarding_lm.stages.ranges import NOTHING, UNKNOWN, Range, total
from self_rewarding_lm.stages.work import Work

RECORD = 160
"""Bytes of a record beside its ids and texts: names of fields, its own id and its parents'."""


TEXT = 4
"""Bytes of text of a token, as usual for English."""


FLAG = 7
"""Bytes of a target in a training row: "false, "."""


LOGPROB = 22
"""Bytes of a log-prob: a float32 as JSON writes it."""


METRICS = 400
"""Bytes of a line of metrics, one a step."""


@dataclass(frozen=True)
class StageDisk:
    """Bytes. weights: the stage's model folder; meanwhile: further weights while it trains, of
    which `kept` stay; records: what is in its .jsonl files."""

    weights: int
    meanwhile: Range
    kept: Range
    records: Range


def stage_disk(
    stage: FinetuneConfig, work: Work, weights: int, vocab: int, *, states: int | None = 0
) -> StageDisk:
    """What a stage writes. weights: bytes of a folder of weights; vocab: of the model; states: of
    what its optimiser keeps. A state of training is written beside the one before; a stage that is
    through before one is due has none."""
    meanwhile = kept = NOTHING
    if isinstance(stage, TrainingConfig):
        steps = work.training.steps if work.training is not None else UNKNOWN
        every = stage.optim.checkpoint_every
        if every is not None:
            most = None if steps.most is None else steps.most // every
            kept = Range(steps.least // every, most).times(weights)
        saves = (stage.optim.save_state_every, stage.optim.save_state_minutes) != (None, None)
        if saves:
            most = None if states is None else 2 * (weights + states)
            meanwhile = meanwhile + Range(0, most)
        if stage.early_stopper_eval_module is not None:
            meanwhile = meanwhile + Range.of(weights)
        meanwhile = meanwhile + Range.of(stage.own_weights() * weights)
    return StageDisk(weights, meanwhile + kept, kept, records(work, vocab))


def records(work: Work, vocab: int) -> Range:
    """Bytes of all records of a stage, by the number of their tokens."""
    token = len(str(max(vocab - 1, 1))) + 2  # a number, a comma and a space
    written = token + TEXT
    parts = [
        work.prompts.times(work.prompt.times(written) + Range.of(RECORD)),
        work.candidates.count.times(RECORD) + work.candidates.written.times(written),
        work.judgements.count.times(RECORD) + work.judgements.written.times(TEXT),
    ]
    training = work.training
    if training is None:
        example = work.example.times(written) + Range.of(4 * RECORD)  # replies and their ranks too
        return total([*parts, work.made.times(example)])
    row = training.row
    if training.pairs:
        both = row.answer.times(2)
        pair = row.tokens.times(written) + both.times(LOGPROB) + Range.of(2 * RECORD)
        parts.append(training.rows.times(pair))
    else:
        parts.append(training.rows.times(row.tokens.times(token + FLAG) + Range.of(RECORD)))
    return total([*parts, training.steps.times(METRICS)])


@dataclass(frozen=True)
class RunDisk:
    """Bytes of a whole run. initial: the weights from before the first stage, where a stage asks
    for them; weights: of the stages whose weights are kept; meanwhile: the most that is there only
    while a stage works; records: of all stages."""

    initial: int
    weights: Range
    meanwhile: Range
    records: Range

    @property
    def total(self) -> Range:
        return Range.of(self.initial) + self.weights + self.meanwhile + self.records


def run_disk(
    stages: list[StageDisk], *, uses_initial: bool, merged: int, keep: int | None
) -> RunDisk:
    """What a run writes. merged: bytes of the merged model, 0 for none. keep: of how many stages
    the weights are kept, None for all; one more is there while the next is written."""
    most = len(stages) if keep is None else min(len(stages), keep + 1)
    folders = sorted((stage.weights for stage in stages), reverse=True)
    initial = max((stage.weights for stage in stages), default=0) if uses_initial else 0
    extra = [stage.meanwhile for stage in stages if stage.meanwhile != stage.kept]
    return RunDisk(
        initial,
        Range.of(sum(folders[:most]) + merged) + total(stage.kept for stage in stages),
        max(extra, key=lambda r: r.most or 0, default=NOTHING),
        total(stage.records for stage in stages),
    )
