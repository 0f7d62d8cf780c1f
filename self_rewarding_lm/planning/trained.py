"""What a stage trains on: rows, their tokens, steps. Arithmetic on settings and lengths."""

import math
from dataclasses import dataclass

from self_rewarding_lm.planning.lengths import Lengths
from self_rewarding_lm.planning.ranges import NOTHING, UNKNOWN, Range
from self_rewarding_lm.stages.base import TrainingConfig


@dataclass(frozen=True)
class RowShape:
    """A row of training. tokens: of all of it, a prompt that two answers share once. answer: of one
    answer. longest, sequence: tokens of the longest row, and of the longest prompt with one answer;
    None where that is not known. answers: how many a row has."""

    tokens: Range = UNKNOWN
    answer: Range = UNKNOWN
    longest: int | None = None
    sequence: int | None = None
    answers: int = 1

    def capped(self, limit: int | None) -> "RowShape":
        """The same with sequences of at most `limit` tokens."""
        if limit is None:
            return self
        whole = limit * self.answers
        return RowShape(
            self.tokens.capped(whole),
            self.answer.capped(limit),
            whole if self.longest is None else min(self.longest, whole),
            limit if self.sequence is None else min(self.sequence, limit),
            self.answers,
        )

    def beside(self, other: "RowShape") -> "RowShape":
        """Rows of both shapes."""
        least = min(self.tokens.least, other.tokens.least)
        return RowShape(
            Range(least, _greater(self.tokens.most, other.tokens.most)),
            Range(0, _greater(self.answer.most, other.answer.most)),
            _greater(self.longest, other.longest),
            _greater(self.sequence, other.sequence),
        )


@dataclass(frozen=True)
class Training:
    """rows: in one pass, each of `row`; steps, tokens: of all passes."""

    rows: Range
    row: RowShape
    steps: Range
    tokens: Range

    @property
    def pairs(self) -> bool:
        return self.row.answers == 2

    def repeated(self, times: int) -> "Training":
        """The same so many times over."""
        return Training(self.rows, self.row, self.steps.times(times), self.tokens.times(times))


def given_row(lengths: Lengths | None, answers: int) -> RowShape:
    """A row that is in a dataset."""
    if lengths is None:
        return RowShape(answers=answers)
    return RowShape(
        Range.of(round(lengths.prompt + answers * lengths.answer)),
        Range.of(round(lengths.answer)),
        lengths.longest,
        lengths.longest_prompt + lengths.longest_answer,
        answers,
    )


def sampled_row(lengths: Lengths | None, new: Range, answers: int) -> RowShape:
    """A dataset's prompt with answers that the model gives, of `new` tokens each."""
    if lengths is None:
        return RowShape(answer=new, answers=answers)
    most = new.most or 0
    return RowShape(
        Range.of(round(lengths.prompt)) + new.times(answers),
        new,
        lengths.longest_prompt + answers * most,
        lengths.longest_prompt + most,
        answers,
    )


def played_row(lengths: Lengths | None, new: Range) -> RowShape:
    """A dataset's row with its answer and one that the model gives."""
    own = given_row(lengths, 1)
    if lengths is None or own.longest is None:
        return RowShape(answers=2)
    most = new.most or 0
    return RowShape(
        own.tokens + new,
        Range(min(own.answer.least, new.least), max(own.answer.most or 0, most)),
        own.longest + most,
        lengths.longest_prompt + max(lengths.longest_answer, most),
        2,
    )


def training_on(stage: TrainingConfig, rows: Range, row: RowShape) -> Training:
    """A stage's training on rows of one shape."""
    batch = stage.optim.batch_size
    if stage.num_train_steps is not None:
        steps = Range.of(stage.num_train_steps)
        trained = NOTHING if rows.most == 0 else steps.times(batch)
    else:
        epochs = stage.optim.epochs or stage.default_epochs
        most = None if rows.most is None else epochs * math.ceil(rows.most / batch)
        steps = Range(epochs * math.ceil(rows.least / batch), most)
        trained = rows.times(epochs)
    if stage.early_stopper_eval_module is not None:
        first = min(stage.optim.eval_every, steps.least)
        steps = Range(first, steps.most)
        trained = Range(min(first * batch, trained.least), trained.most)
    return Training(rows, row, steps, trained.times(row.tokens))


def _greater(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)
