"""What a stage has to do, counted from its settings: candidates, judgements, rows, tokens, steps.

Numbers that only the run will show, such as the lengths of answers or how many prompts give a pair,
are ranges between what the settings ask for at least and allow at most. Knows nothing of bytes or
seconds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch, singledispatchmethod
from typing import Any

from self_rewarding_lm.config import FinetuneConfig, RewardConfig, SamplingConfig, SelfInstruct
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.stages import lengths as measures
from self_rewarding_lm.stages.base import TrainingConfig
from self_rewarding_lm.stages.contrastive import ContrastiveDPOConfig
from self_rewarding_lm.stages.dpo import DPOConfig
from self_rewarding_lm.stages.eft import BuildEFTConfig
from self_rewarding_lm.stages.external import ExternalRewardDPOConfig
from self_rewarding_lm.stages.lengths import Counted, Lengths, Measure, counted
from self_rewarding_lm.stages.meta_rewarding import MetaRewardDPOConfig
from self_rewarding_lm.stages.ranges import NOTHING, UNKNOWN, Range, total
from self_rewarding_lm.stages.sampled import SampledPreferenceConfig
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.self_reward_sft import SelfRewardSFTConfig
from self_rewarding_lm.stages.sft import SFTConfig
from self_rewarding_lm.stages.spin import SelfPlayConfig
from self_rewarding_lm.stages.temporal import TemporalDPOConfig


@dataclass(frozen=True)
class Asking:
    """Texts of one kind that are sampled: answers, or judgements in words.

    count: texts; new: tokens of one. read: prompt tokens that are computed for all of them.
    longest: tokens of the longest prompt, None where that is not known; shared: with which all of
    them begin. at_once: texts that one call of the engine is asked for, None for all. here: whether
    the policy writes them.
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
        """Tokens of all texts."""
        return self.count.times(self.new)


NOTHING_ASKED = Asking()


def together(parts: list[Asking]) -> Asking:
    """Judgements by several judge prompts, one after the other."""
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


COMPARING = "comparing judgements is not counted, nor are their pairs; see docs/meta_rewarding.md"


@singledispatch
def answering(stage: SampledPreferenceConfig) -> int:
    """Models that answer each prompt."""
    return 1


@answering.register
def _(stage: TemporalDPOConfig) -> int:
    return 1 + (stage.rejected_from is not None) + stage.chosen_from_next


@singledispatch
def trainings(stage: SampledPreferenceConfig) -> int:
    """Trainings of a round; the pairs of those before the last are trained on alone."""
    return 1


@trainings.register
def _(stage: TemporalDPOConfig) -> int:
    return 1 + stage.chosen_from_next


@singledispatch
def beside_prompts(stage: SampledPreferenceConfig) -> list[str]:
    """Texts of which each candidate's prompt has one beside it; empty where there are none."""
    return []


@beside_prompts.register
def _(stage: ContrastiveDPOConfig) -> list[str]:
    return [text for c in stage.pairs() for text in (c.positive, c.negative)]


@singledispatch
def is_judged(stage: SampledPreferenceConfig) -> bool:
    """Whether anybody scores the candidates."""
    return True


@is_judged.register
def _(stage: ContrastiveDPOConfig) -> bool:
    return stage.is_judged


@singledispatch
def sides(stage: SampledPreferenceConfig) -> int:
    """Responses of a row that is trained on."""
    return 2


@sides.register
def _(stage: SelfRewardSFTConfig) -> int:
    return 1


@singledispatch
def made_of_prompt(stage: SampledPreferenceConfig) -> int:
    """Rows to train on that a prompt gives at most."""
    return stage.pairing.pairs_per_prompt


@made_of_prompt.register
def _(stage: SelfRewardSFTConfig) -> int:
    return stage.num_candidate_responses


@singledispatch
def mixed_in(stage: SampledPreferenceConfig) -> Any:
    """The dataset whose rows are trained on beside the sampled ones."""
    return None


@mixed_in.register
def _(stage: SelfRewardSFTConfig) -> Any:
    return stage.train_dataset


@singledispatch
def not_counted(stage: SampledPreferenceConfig) -> tuple[str, ...]:
    """Words on what a plan leaves out."""
    return ()


@not_counted.register
def _(stage: MetaRewardDPOConfig) -> tuple[str, ...]:
    return (COMPARING,) if stage.train_judge else ()


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


OBJECT = "its judge is an object, of which nothing is known here"


OTHER = "another model judges: its memory and time are not in this plan"


WRITING = "writing the new prompts is not counted, as it is not known how many lists that takes"


@dataclass(frozen=True)
class Work:
    """A stage's arrows. prompt: tokens of a prompt. made: pairs or demonstrations, on which later
    stages may train; example: tokens of a demonstration. notes: what is not counted, and why."""

    prompts: Range = NOTHING
    prompt: Range = UNKNOWN
    candidates: Asking = NOTHING_ASKED
    judgements: Asking = NOTHING_ASKED
    training: Training | None = None
    made: Range = NOTHING
    example: Range = NOTHING
    notes: tuple[str, ...] = ()


@dataclass
class Counting:
    """Counts stages one after the other.

    rewards: reward prompts by name. tokens: None where there is no tokenizer; max_len: of the
    model. made: what the stages so far make, by their names.
    """

    rewards: Mapping[str, RewardConfig]
    tokens: Tokens | None
    max_len: int | None
    made: dict[str, Range] = field(default_factory=dict)

    def work(self, stage: FinetuneConfig, name: str) -> Work:
        """The work of the next stage."""
        found = self._work(stage)
        self.made[name] = found.made
        return found

    @singledispatchmethod
    def _work(self, stage: FinetuneConfig) -> Work:
        return Work(notes=(f"what a {type(stage).__name__} does is not known here",))

    @_work.register
    def _training(self, stage: TrainingConfig) -> Work:
        row = RowShape().capped(self._limit(stage))
        notes = (f"what a {type(stage).__name__} does is not known here",)
        return Work(training=training_on(stage, UNKNOWN, row), notes=notes)

    @_work.register
    def _sft(self, stage: SFTConfig) -> Work:
        return self._given(stage, measures.supervised, 1)

    @_work.register
    def _dpo(self, stage: DPOConfig) -> Work:
        return self._given(stage, measures.pair, 2)

    def _given(self, stage: Any, measure: Measure, sides: int) -> Work:
        """Training on a dataset."""
        data = self._data(stage.train_dataset, measure)
        row = given_row(data.lengths, sides).capped(self._limit(stage))
        return Work(training=training_on(stage, data.rows, row), made=data.rows)

    @_work.register
    def _self_play(self, stage: SelfPlayConfig) -> Work:
        data, limit = self._data(stage.train_dataset, measures.supervised), self._limit(stage)
        new, prompt = _new(stage.generation), _prompt(data.lengths, limit)
        prompts = data.rows.times(stage.iterations)
        longest = _longest(stage, data.lengths, new)
        own = Range(0, data.rows.most)
        row = played_row(data.lengths, new).capped(limit)
        training = training_on(stage, own, row).repeated(stage.iterations)
        if stage.mix_previous:  # all but the first iteration have twice the pairs
            mixed = training_on(stage, own.times(2), row).repeated(stage.iterations - 1)
            first = training_on(stage, own, row)
            steps, tokens = first.steps + mixed.steps, first.tokens + mixed.tokens
            training = replace(training, steps=steps, tokens=tokens)
        return Work(
            prompts,
            prompt,
            Asking(prompts, new, prompts.times(prompt), longest),
            training=training,
            made=own.times(stage.iterations),
        )

    @_work.register
    def _sampled(self, stage: SampledPreferenceConfig) -> Work:
        data, limit = self._prompts(stage), self._limit(stage)
        each_round = _prompts_used(stage, data.rows)
        prompts, prompt = each_round.times(stage.rounds), _prompt(data.lengths, limit)
        each, new = stage.num_candidate_responses, _new(stage.generation)
        each *= answering(stage)
        longest = _longest(stage, data.lengths, new)
        block = stage.prompts_per_block * each
        read = prompts.times(prompt)
        if texts := beside_prompts(stage):  # each candidate's prompt is read for itself
            added = self._sizes(texts)
            read = prompts.times(each).times(prompt + added)
            longest = None if longest is None or added.most is None else longest + added.most
        candidates = Asking(prompts.times(each), new, read, longest, block)
        judgements, notes = self._judgements(stage, candidates, prompt)
        if isinstance(stage.prompt_dataset, SelfInstruct):
            notes = (*notes, WRITING)
        notes = (*notes, *not_counted(stage))
        wanted = stage.num_generated_preference_pairs
        most = each_round.times(made_of_prompt(stage)).most
        made = Range.of(wanted) if wanted else Range(0, most)
        row = sampled_row(data.lengths, new, sides(stage)).capped(limit)
        mixed = total(self.made.get(name, UNKNOWN) for name in stage.mix_pairs)
        training = training_on(stage, made + mixed, row)
        for _ in range(1, trainings(stage)):
            first = training_on(stage, made, row)
            steps, tokens = first.steps + training.steps, first.tokens + training.tokens
            training = replace(training, steps=steps, tokens=tokens)
        if mixed_in(stage) is not None:
            training = self._beside(stage, made, row)
        training, made = training.repeated(stage.rounds), made.times(stage.rounds)
        return Work(prompts, prompt, candidates, judgements, training, made, notes=notes)

    def _sizes(self, texts: Sequence[str]) -> Range:
        """Tokens of texts that are shown beside a prompt, those of the template left out."""
        if self.tokens is None:
            return UNKNOWN
        sizes = [len(self.tokens.encode_part(text)) for text in texts]
        return Range(min(sizes), max(sizes))

    def _beside(self, stage: SampledPreferenceConfig, made: Range, row: RowShape) -> Training:
        """Training on sampled responses and on a dataset's rows."""
        data = self._data(mixed_in(stage), measures.supervised)
        other = given_row(data.lengths, 1).capped(self._limit(stage))
        whole = training_on(stage, made + data.rows, row.beside(other))
        if stage.num_train_steps is not None:
            return whole
        parts = training_on(stage, made, row), training_on(stage, data.rows, other)
        return replace(whole, tokens=total(part.tokens for part in parts))

    @_work.register
    def _eft(self, stage: BuildEFTConfig) -> Work:
        data = self._data(stage.ranked_dataset, measures.ranked)
        own, replies = data.lengths, Range(2 * data.rows.least)  # two at least
        shown, longest = UNKNOWN, None
        if own is not None:  # of all rows as of those that were looked at
            replies = data.rows.times(own.answers)
            shown = Range.of(round(own.prompt + own.answer))
            longest = own.longest_prompt + own.longest_answer
        reward, judgements = self.rewards.get(stage.self_reward_config_keyname), Asking()
        times = stage.attempts
        if stage.method == "judgements":
            reward = None if reward is None else reward.as_written()
            judgements = self._asked(
                reward, stage.judging, Asking(replies), times, (shown, longest)
            )
        elif stage.method == "comparisons":  # of each two replies that differ in rank
            answers = 2 if own is None else own.answers
            replies = Range(data.rows.least, data.rows.times(answers * (answers - 1) / 2).most)
            if own is not None:
                shown = Range.of(round(own.prompt + 2 * own.answer))
                longest = own.longest_prompt + 2 * own.longest_answer
            reward = stage.written_comparison()
            judgements = self._asked(
                reward, stage.judging, Asking(replies), times, (shown, longest)
            )
        rubric, _ = self._rubric(reward)
        return Work(
            data.rows,
            _prompt(own, self.max_len),
            judgements=judgements,
            made=Range(0, replies.most),
            example=UNKNOWN if rubric is None else shown + Range.of(rubric),
        )

    def _judgements(
        self, stage: SampledPreferenceConfig, answers: Asking, prompt: Range
    ) -> tuple[Asking, tuple[str, ...]]:
        """The judgements of a stage, and words on what is not known of them."""
        if not is_judged(stage):
            return Asking(), ()
        if stage.judge is not None:
            return Asking(UNKNOWN, NOTHING, NOTHING, here=False), (OBJECT,)
        return self._judged(stage, answers, prompt)

    @singledispatchmethod
    def _judged(
        self, stage: ExternalRewardDPOConfig, answers: Asking, prompt: Range
    ) -> tuple[Asking, tuple[str, ...]]:
        return Asking(answers.count, NOTHING, NOTHING, here=False), ()

    @_judged.register
    def _judged_by_a_model(
        self, stage: SelfRewardDPOConfig, answers: Asking, prompt: Range
    ) -> tuple[Asking, tuple[str, ...]]:
        each, most = stage.num_candidate_responses, answers.new.most or 0
        comparison, longest = stage.comparison, answers.longest
        sides = 1 if comparison is None else 2
        shown = prompt + answers.new.times(sides)
        size = shown, None if longest is None else longest + sides * most
        if comparison is None:
            asks = [self.rewards.get(name) for name in stage.reward_names()]
            times = stage.num_sampled_reward_responses
        else:  # each candidate before all others
            asks, times = [comparison], each - 1
        found = together([self._asked(a, stage.judging, answers, times, size) for a in asks])
        here = stage.rewarding_model is None
        return replace(found, here=here), () if here else (OTHER,)

    def _asked(
        self,
        ask: Any,
        judging: SamplingConfig,
        answers: Asking,
        times: int,
        shown: tuple[Range, int | None],
    ) -> Asking:
        """Judgements by one judge prompt. shown: tokens of what it shows, and of the longest."""
        length, longest = shown
        compares = hasattr(ask, "labels")
        at_once = getattr(ask, "forced_ending", False) == "at_once"
        times = 1 if at_once and not compares else times
        count = answers.count.times(times)
        asked = count if compares else answers.count  # one prompt of several judgements, once
        rubric, shared = self._rubric(ask)
        end = None if longest is None or rubric is None else longest + rubric
        if end is not None and self.max_len is not None:
            end = min(end, self.max_len)
        own = UNKNOWN if rubric is None else Range.of(rubric - shared)
        return Asking(
            count,
            NOTHING if at_once else _new(judging),
            asked.times(length + own) + Range.of(shared),
            end,
            None if answers.at_once is None else answers.at_once * times,
            shared,
        )

    def _rubric(self, ask: Any) -> tuple[int | None, int]:
        """Tokens of a judge prompt without what it shows; and those before the first thing shown,
        which are computed once for all."""
        if self.tokens is None or ask is None:
            return None, 0
        text = ask.prompt_template
        before = text.partition("{{")[0].strip()
        shared = len(self.tokens.encode_part(before)) if before else 0
        return len(self.tokens.prompt(text).ids), shared

    def _limit(self, stage: TrainingConfig) -> int | None:
        known = [n for n in (stage.max_seq_len, self.max_len) if n is not None]
        return min(known) if known else None

    def _data(self, dataset: Any, measure: Measure) -> Counted:
        return counted(dataset, "rows", self.made, measure=measure, tokens=self.tokens)

    def _prompts(self, stage: SampledPreferenceConfig) -> Counted:
        if isinstance(stage.prompt_dataset, SelfInstruct):
            return Counted(Range.of(stage.prompt_dataset.num_prompts))
        return self._data(stage.prompt_dataset, measures.prompt)


def _prompts_used(stage: SampledPreferenceConfig, rows: Range) -> Range:
    """Prompts that are worked until there are as many pairs as are wanted."""
    wanted, block = stage.num_generated_preference_pairs, stage.prompts_per_block
    if stage.prompts_per_round is not None:
        return Range(1 if wanted else stage.prompts_per_round, stage.prompts_per_round)
    if wanted is None:
        return rows.times(stage.max_prompt_passes or 1)
    least = block * math.ceil(wanted / made_of_prompt(stage) / block)
    if not rows.most:
        return Range(least)
    passes = stage.max_prompt_passes or 4 * math.ceil(wanted / rows.most)
    return Range(least, passes * rows.most).capped(passes * rows.most)


def _new(sampling: SamplingConfig) -> Range:
    """Tokens of a sampled text."""
    least = max(1, sampling.min_new_tokens)
    return Range(least, max(least, sampling.max_new_tokens))


def _longest(stage: TrainingConfig, own: Lengths | None, new: Range) -> int | None:
    """Tokens of the longest prompt: of those that were looked at, else what max_seq_len leaves."""
    if own is not None:
        return own.longest_prompt
    if stage.max_seq_len is None:
        return None
    return max(1, stage.max_seq_len - (new.most or 0))


def _prompt(own: Lengths | None, limit: int | None) -> Range:
    """Tokens of a prompt."""
    return Range(0, limit) if own is None else Range.of(round(own.prompt))
