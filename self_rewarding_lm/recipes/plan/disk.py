"""Computes the disk space of a run: weights, further weights while a stage trains, and records."""

from dataclasses import dataclass

from self_rewarding_lm.config import FinetuneConfig
from self_rewarding_lm.stages.base import TrainingConfig
from self_rewarding_lm.stages.ranges import NOTHING, UNKNOWN, Range, total
from self_rewarding_lm.stages.work import Work

RECORD = 160
"""Bytes of a record beside its token ids and texts: field names, its id and its parents' ids."""


TEXT = 4
"""Bytes of text per token, as is usual for English."""


FLAG = 7
"""Bytes of each target in a training row: "false, "."""


LOGPROB = 22
"""Bytes of a log-prob: a float32 as JSON writes it."""


METRICS = 400
"""Bytes of a line of metrics; each step writes one."""


@dataclass(frozen=True)
class StageDisk:
    """The disk space of one stage, in bytes.

    weights: its folder of weights. meanwhile: further weights while it trains. kept: the part of
    `meanwhile` that stays. records: its .jsonl files.
    """

    weights: int
    meanwhile: Range
    kept: Range
    records: Range


def stage_disk(
    stage: FinetuneConfig, work: Work, weights: int, vocab: int, *, states: int | None = 0
) -> StageDisk:
    """The disk space of one stage.

    weights: bytes of a folder of weights. vocab: tokens of the model's vocabulary. states: bytes of
    the optimiser's state, None if unknown. A state of training is written while the state before it
    still exists, so two are the most; a stage that ends before a state is due writes none.
    """
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
    """Bytes of all records of a stage, estimated from the numbers of their tokens."""
    # 1. prompts, candidates and judgements
    token = len(str(max(vocab - 1, 1))) + 2  # digits of an id, a comma and a space
    written = token + TEXT
    parts = [
        work.prompts.times(work.prompt.times(written) + Range.of(RECORD)),
        work.candidates.count.times(RECORD) + work.candidates.written.times(written),
        work.judgements.count.times(RECORD) + work.judgements.written.times(TEXT),
    ]
    # 2. demonstrations of a stage that does not train
    training = work.training
    if training is None:
        example = work.example.times(written) + Range.of(4 * RECORD)  # with replies and their ranks
        return total([*parts, work.made.times(example)])
    # 3. pairs or training rows, and lines of metrics
    row = training.row
    if training.pairs:
        answers = row.answer.times(2)
        pair = row.tokens.times(written) + answers.times(LOGPROB) + Range.of(2 * RECORD)
        parts.append(training.rows.times(pair))
    else:
        parts.append(training.rows.times(row.tokens.times(token + FLAG) + Range.of(RECORD)))
    return total([*parts, training.steps.times(METRICS)])


@dataclass(frozen=True)
class RunDisk:
    """The disk space of a whole run, in bytes.

    initial: the weights before the first stage, 0 if no stage uses them. weights: the folders of
    weights that are kept. meanwhile: the most that exists only while a stage works. records: the
    records of all stages.
    """

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
    """The disk space of a run.

    uses_initial: whether a stage uses the weights before the first stage. merged: bytes of the
    merged model, 0 for none. keep: how many stages keep their weights, None for all; one more
    folder exists while the next is written.
    """
    most = len(stages) if keep is None else min(len(stages), keep + 1)
    folders = sorted((stage.weights for stage in stages), reverse=True)
    initial = max((stage.weights for stage in stages), default=0) if uses_initial else 0
    temporary = [stage.meanwhile for stage in stages if stage.meanwhile != stage.kept]
    return RunDisk(
        initial,
        Range.of(sum(folders[:most]) + merged) + total(stage.kept for stage in stages),
        max(temporary, key=lambda r: r.most or 0, default=NOTHING),
        total(stage.records for stage in stages),
    )
