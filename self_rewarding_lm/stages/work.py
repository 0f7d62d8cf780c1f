"""Counts what a stage has to do, from its settings: candidates, judgements, rows, tokens, steps.

Each stage counts its own work in its method `work(counting)`. This file defines `Work`, the value
that it returns, and `Counting`, what it counts with. Numbers that only the run can tell, such as
the lengths of answers or how many prompts give a pair, are ranges: from the least that the settings
ask for to the most that they allow. Bytes and seconds are not counted here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from self_rewarding_lm.config import (
    ComparisonConfig,
    FinetuneConfig,
    RewardConfig,
    SamplingConfig,
)
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.stages.lengths import Counted, Lengths, Measure, counted, sources
from self_rewarding_lm.stages.ranges import NOTHING, UNKNOWN, Range, total


@dataclass(frozen=True)
class Asking:
    """Texts of one kind that are sampled: answers, or judgements in words.

    count: how many texts. new: new tokens of each. read: prompt tokens that are computed for all of
    them. longest: tokens of the longest prompt, None if unknown. at_once: how many texts one call
    of the engine asks for, None if it asks for all. shared: how many tokens at their beginning all
    prompts have in common. here: whether the model of the run writes the texts.
    """

    count: Range = NOTHING
    new: Range = NOTHING
    read: Range = NOTHING
    longest: int | None = None
    at_once: int | None = None
    shared: int = 0
    here: bool = True

    @property
    def written(self) -> Range:
        """New tokens of all texts."""
        return self.count.times(self.new)


NOTHING_ASKED = Asking()


def combined(parts: Sequence[Asking]) -> Asking:
    """The judgements by several judge prompts, one after the other, as one."""
    if len(parts) == 1:
        return parts[0]
    longest = [part.longest for part in parts]
    return Asking(
        total(part.count for part in parts),
        Range(min(part.new.least for part in parts), max(part.new.most or 0 for part in parts)),
        total(part.read for part in parts),
        None if None in longest else max(n for n in longest if n is not None),
        max(part.at_once or 0 for part in parts) or None,
        min(part.shared for part in parts),
    )


@dataclass(frozen=True)
class RowShape:
    """The lengths of a training row.

    tokens: of the whole row; two answers share the tokens of their prompt. answer: tokens of each
    answer. longest: tokens of the longest row. sequence: tokens of the longest prompt with one
    answer. `longest` and `sequence` are None if unknown. answers: how many answers a row has.
    """

    tokens: Range = UNKNOWN
    answer: Range = UNKNOWN
    longest: int | None = None
    sequence: int | None = None
    answers: int = 1

    def capped(self, limit: int | None) -> "RowShape":
        """This shape if sequences are cut to `limit` tokens; None cuts nothing."""
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
        """The shape of a dataset in which some rows have this shape and others have `other`."""
        least = min(self.tokens.least, other.tokens.least)
        return RowShape(
            Range(least, _greater(self.tokens.most, other.tokens.most)),
            Range(0, _greater(self.answer.most, other.answer.most)),
            _greater(self.longest, other.longest),
            _greater(self.sequence, other.sequence),
            self.answers,
        )


def row_shape(lengths: Lengths | None, answers: int) -> RowShape:
    """The shape of a dataset's rows, from their measured lengths; None if these are unknown."""
    if lengths is None:
        return RowShape(answers=answers)
    return RowShape(
        Range.of(round(lengths.prompt + answers * lengths.answer)),
        Range.of(round(lengths.answer)),
        lengths.longest,
        lengths.longest_prompt + lengths.longest_answer,
        answers,
    )


@dataclass(frozen=True)
class Training:
    """The training of a stage.

    rows: how many rows one pass has. row: the shape of each. steps, tokens: of all passes.
    """

    rows: Range
    row: RowShape
    steps: Range
    tokens: Range

    @property
    def pairs(self) -> bool:
        """Whether a row is a pair of answers."""
        return self.row.answers == 2

    def repeated(self, times: int) -> "Training":
        """This training, `times` times over."""
        return Training(self.rows, self.row, self.steps.times(times), self.tokens.times(times))

    def plus(self, other: "Training") -> "Training":
        """This training with the steps and tokens of another one added."""
        return replace(self, steps=self.steps + other.steps, tokens=self.tokens + other.tokens)


@dataclass(frozen=True)
class Work:
    """What a stage has to do.

    prompts: how many prompts it reads. prompt: tokens of each. candidates, judgements: what is
    sampled. training: None if it does not train. made: how many pairs or demonstrations it makes,
    on which later stages may train. example: tokens of each demonstration. notes: what is not
    counted, and why. remarks: what else is worth knowing before the stage begins.
    """

    prompts: Range = NOTHING
    prompt: Range = UNKNOWN
    candidates: Asking = NOTHING_ASKED
    judgements: Asking = NOTHING_ASKED
    training: Training | None = None
    made: Range = NOTHING
    example: Range = NOTHING
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass
class Counting:
    """Counts the work of a recipe's stages, one after the other.

    rewards: reward prompts by name. tokens: None if there is no tokenizer. max_len: tokens that the
    model takes at most, None if there is no limit. made: how many records each stage so far makes,
    by the stage's name. works: the work of each.
    """

    rewards: Mapping[str, RewardConfig]
    tokens: Tokens | None
    max_len: int | None
    made: dict[str, Range] = field(default_factory=dict)
    works: dict[str, Work] = field(default_factory=dict)

    def work(self, stage: FinetuneConfig, name: str) -> Work:
        """The work of the next stage, which has the name `name`."""
        work = stage.work(self) or Work(notes=(unknown_work(stage),))
        self.made[name], self.works[name] = work.made, work
        return work

    def data(self, dataset: Any, measure: Measure) -> Counted:
        """How many rows a dataset has, and how long they are as `measure` measures them."""
        return counted(dataset, "rows", self.made, measure=measure, tokens=self.tokens)

    def row(self, dataset: Any, data: Counted, answers: int) -> RowShape:
        """The shape of a dataset's rows, of which some may be those that an earlier stage makes.

        data: what was counted of it. answers: how many a row has.
        """
        shapes = [
            row_shape(data.lengths, answers) if stage is None else self._made_row(stage, answers)
            for stage in sources(dataset)
        ]
        return reduce(RowShape.beside, shapes)

    def _made_row(self, stage: str, answers: int) -> RowShape:
        """The shape of the rows of an earlier stage, as far as it is known."""
        work = self.works.get(stage, Work())
        if work.training is not None and work.training.row.answers == answers:
            return work.training.row
        if work.training is None and answers == 1 and work.example != NOTHING:
            longest = work.example.most
            return RowShape(work.example, UNKNOWN, longest, longest)
        return RowShape(answers=answers)

    def limit(self, max_seq_len: int | None) -> int | None:
        """The most tokens of a sequence: the lower of max_seq_len and the model's limit."""
        known = [n for n in (max_seq_len, self.max_len) if n is not None]
        return min(known) if known else None

    def sizes(self, texts: Sequence[str]) -> Range:
        """Tokens of each of the texts inside a prompt, without tokens of the chat template."""
        if self.tokens is None:
            return UNKNOWN
        sizes = [len(self.tokens.encode_part(text)) for text in texts]
        return Range(min(sizes), max(sizes))

    def judgements(
        self,
        asks: RewardConfig | ComparisonConfig | None,
        judging: SamplingConfig,
        answers: Asking,
        times: int,
        shown: Range,
        longest: int | None,
    ) -> Asking:
        """The judgements by one judge prompt, `times` of each answer.

        asks: the judge prompt, None if unknown. shown: tokens of the prompt and answers that one
        judge prompt contains. longest: the most of these tokens, None if unknown.
        """
        # 1. how many there are
        compares = isinstance(asks, ComparisonConfig)
        writes_nothing = asks is not None and asks.forced_ending == "at_once"
        times = 1 if writes_nothing and not compares else times
        count = answers.count.times(times)
        # 2. the judge prompts: several judgements of one answer read the same one, once
        prompts = count if compares else answers.count
        rubric, shared = self.rubric(asks)
        longest_total = None if longest is None or rubric is None else longest + rubric
        if longest_total is not None and self.max_len is not None:
            longest_total = min(longest_total, self.max_len)
        unshared = UNKNOWN if rubric is None else Range.of(rubric - shared)
        return Asking(
            count,
            NOTHING if writes_nothing else new_tokens(judging),
            prompts.times(shown + unshared) + Range.of(shared),
            longest_total,
            None if answers.at_once is None else answers.at_once * times,
            shared,
        )

    def rubric(self, asks: RewardConfig | ComparisonConfig | None) -> tuple[int | None, int]:
        """Tokens of a judge prompt without the prompt and answers that it contains, None if
        unknown; and how many of them stand before the first of these, computed once for all."""
        if self.tokens is None or asks is None:
            return None, 0
        text = asks.prompt_template
        before = text.partition("{{")[0].strip()
        shared = len(self.tokens.encode_part(before)) if before else 0
        return len(self.tokens.prompt(text).ids), shared


def unknown_work(stage: FinetuneConfig) -> str:
    """The note on a stage that does not count its own work."""
    return f"what a {type(stage).__name__} does is not known here"


def new_tokens(sampling: SamplingConfig) -> Range:
    """New tokens of a sampled text."""
    least = max(1, sampling.min_new_tokens)
    return Range(least, max(least, sampling.max_new_tokens))


def prompt_tokens(lengths: Lengths | None, limit: int | None) -> Range:
    """Tokens of a prompt: the measured average, or 0 to `limit` if nothing was measured."""
    return Range(0, limit) if lengths is None else Range.of(round(lengths.prompt))


def longest_prompt(lengths: Lengths | None, max_seq_len: int | None, new: Range) -> int | None:
    """Tokens of the longest prompt: of those that were measured, otherwise what max_seq_len leaves
    beside `new` tokens; None if neither is known."""
    if lengths is not None:
        return lengths.longest_prompt
    return None if max_seq_len is None else max(1, max_seq_len - (new.most or 0))


def _greater(first: int | None, second: int | None) -> int | None:
    """The greater number, None if one of them is unknown."""
    return None if first is None or second is None else max(first, second)
