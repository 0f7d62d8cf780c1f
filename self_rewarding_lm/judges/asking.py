"""A model is asked questions and its answers become judgements: sample, read, score.

Knows texts, tokens and the ways in which a score can come; nothing of what is judged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, Protocol, runtime_checkable

from self_rewarding_lm.config import SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.tokens import Rendered, Tokens
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.generation.candidates import decoding_of
from self_rewarding_lm.generation.engine import Completion, Request
from self_rewarding_lm.generation.score_trie import Expected
from self_rewarding_lm.judges.expected import Place, VerdictReader, expected_scores, summed
from self_rewarding_lm.judges.parsing import VerdictForm, opened_thought
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.records import Judgement, stable_hash
from self_rewarding_lm.scores import ParsedScore
from self_rewarding_lm.text import amount

MIN_ANSWER_TOKENS = 16


FIRST_LOOK = 64  # judgements after which the parse rate is checked for the first time


PROMPT_END = 16  # tokens of a judge prompt among which a thought may be opened


STATED = (None, "out_of_range", "not_allowed")
"""Reasons of texts that state a score on the judge's own scale, so that it has a place."""


ForcedEnding = bool | Literal["at_once"]


@dataclass(frozen=True)
class Question:
    """One judgement that is asked for.

    id: of its record; the noise of the sampling is a function of it. text: the judge prompt, before
    the chat template.
    """

    id: str
    candidate_ids: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class _Asked:
    """A question and its judge prompt in tokens."""

    question: Question
    prompt: Rendered


@dataclass(frozen=True)
class _Reading:
    """What an answer says: a score, the places whose probabilities give one, or why it has none.

    finished: whether the answer ended by itself; None if that is not known or nothing was sampled.
    """

    question: Question
    source: str
    text: str | None = None
    score: float | None = None
    reason: str | None = None
    places: tuple[Place, ...] = ()
    mass: float | None = None
    finished: bool | None = None


@runtime_checkable
class Asks(Protocol):
    """Who answers questions with judgements: a model by its tokens, or one behind an address."""

    def ask(self, ctx: Context, questions: Sequence[Question]) -> Iterator[Judgement]: ...


class Asker:
    """A judging model, and how its answers become scores.

    form: how the model states what it decides. model: the judge, if it is not the context's model.
    source: what all judgements name as their source, in place of `sampled`, `expected` and
    `forced`.
    """

    def __init__(
        self,
        form: VerdictForm,
        sampling: SamplingConfig,
        *,
        name: str,
        score_mode: Literal["sampled", "expected"] = "sampled",
        forced_ending: ForcedEnding = False,
        model: TokenModel | None = None,
        source: str | None = None,
    ) -> None:
        self.form, self.sampling, self.name = form, sampling, name
        self.score_mode, self.forced_ending = score_mode, forced_ending
        self.model, self.source = model, source
        self._asked_before = False
        self._reader: VerdictReader | None = None

    def ask(self, ctx: Context, questions: Sequence[Question]) -> Iterator[Judgement]:
        """A judgement for each question, in any order; those without room come first."""
        model, reader = self.model or ctx.model, self.reader(ctx.tokens, ctx.format)
        # 1. render the judge prompts; a prompt that leaves no room for an answer is not asked
        asked: list[_Asked] = []
        for question, prompt in _rendered(questions, ctx.tokens):
            if self.has_room(len(prompt.ids), model.max_len, reader):
                asked.append(_Asked(question, prompt))
            else:
                source = "forced" if self.forced_ending == "at_once" else self.score_mode
                yield self._judgement(_Reading(question, source, reason="too_long"))
        # the first time few are asked at first: the answers may all be unreadable
        first = 0 if self._asked_before else FIRST_LOOK
        self._asked_before = True
        with ctx.serving():
            for some in filter(None, (asked[:first], asked[first:])):
                # 2. sample the answers
                for answers in self._sample(ctx, model, some, reader):
                    # 3. read what they state
                    readings = [self._read(ctx, *answer, reader) for answer in answers]
                    # 4. score those whose score is an expectation
                    yield from self._score(ctx, model, readings, reader)

    def _sample(
        self, ctx: Context, model: TokenModel, asked: list[_Asked], reader: VerdictReader
    ) -> Iterator[list[tuple[_Asked, Completion]]]:
        """Questions with their answers, in lists as they finish; with "at_once" nothing is sampled
        and all answers are empty."""
        if self.forced_ending == "at_once":
            yield [(one, Completion((), True)) for one in asked]
            return
        requests = []
        for one in asked:
            length, most = len(one.prompt.ids), self.sampling.max_new_tokens
            if model.max_len is not None:
                most = min(most, model.max_len - length - self._ending_length(reader))
            key = stable_hash(ctx.seed, one.question.id)
            requests.append(Request(one.prompt.ids, key, most, one.question.id))
        decoding = decoding_of(self.sampling, ctx.tokens)
        completions = ctx.runtime.autocasted(
            ctx.engine_of(model).generate(model, requests, decoding)
        )
        scores_later = self.score_mode == "expected" or self.forced_ending
        while some := list(islice(completions, FIRST_LOOK if scores_later else 1)):
            yield [(asked[index], completion) for index, completion in some]

    def _read(
        self, ctx: Context, asked: _Asked, answer: Completion, reader: VerdictReader
    ) -> _Reading:
        """The score that an answer states, or the place where its probabilities are to be read."""
        question = asked.question
        if answer.reason is not None:
            return _Reading(question, self.score_mode, reason=answer.reason)
        if self.forced_ending == "at_once":
            return _Reading(question, "forced", places=(reader.forced(asked.prompt, ()),))
        text = ctx.tokens.decode(answer.ids) or ""
        read, finished = self._parsed(ctx, asked, text, answer.finished, reader.form)
        reason = read.reason
        if self.score_mode == "expected" and reason in STATED:
            places = reader.stated(asked.prompt.ids, answer.ids)
            if places:
                return _Reading(question, "expected", text, places=places, finished=finished)
            reason = "no_place"
        elif read.score is not None:
            return _Reading(question, "sampled", text, read.score, finished=finished)
        if self.forced_ending:
            places = (reader.forced(asked.prompt, answer.ids),)
            return _Reading(question, "forced", text, places=places, finished=finished)
        return _Reading(question, self.score_mode, text, reason=reason, finished=finished)

    def _parsed(
        self,
        ctx: Context,
        asked: _Asked,
        text: str,
        finished: bool | None,
        form: VerdictForm,
    ) -> tuple[ParsedScore, bool | None]:
        """What an answer's text says, and whether it ended by itself; None in runs of format 1."""
        if finished or ctx.format == 1:
            return form.read(text), finished if ctx.format > 1 else None
        thought = opened_thought(ctx.tokens.decode(asked.prompt.ids[-PROMPT_END:]) or "")
        # a place is decided by what stands before its number, which may be cut off; a mark may not,
        # for marks are counted
        known = None if self.score_mode == "expected" and not form.several else finished
        return form.read_answer(text, known, before=thought), finished

    def _score(
        self, ctx: Context, model: TokenModel, readings: list[_Reading], reader: VerdictReader
    ) -> Iterator[Judgement]:
        """The judgements of readings; at places the score is the sum of the expected ones there.

        `too_long` if the numbers after a place have no room in the model.
        """
        places: list[Place] = []
        owners: list[_Reading] = []  # of the places
        for reading in readings:
            longest = max((place.length for place in reading.places), default=0)
            if not reading.places:
                yield self._judgement(reading)
            elif model.max_len is not None and longest > model.max_len:
                yield self._judgement(replace(reading, reason="too_long"))
            else:
                places += reading.places
                owners += [reading] * len(reading.places)
        if not places:
            return
        parts: dict[str, dict[int, Expected]] = {}  # of readings, by the id of their question
        computed = expected_scores(model, places, reader, ctx.engine_of(model))
        for index, part in ctx.runtime.autocasted(computed):
            reading = owners[index]
            of_reading = parts.setdefault(reading.question.id, {})
            of_reading[index] = part
            if len(of_reading) == len(reading.places):
                del parts[reading.question.id]
                found = summed(reading.places, [of_reading[i] for i in sorted(of_reading)])
                yield self._judgement(
                    replace(reading, score=found.score, reason=found.reason, mass=found.mass)
                )

    def _judgement(self, reading: _Reading) -> Judgement:
        return Judgement(
            id=reading.question.id,
            candidate_ids=reading.question.candidate_ids,
            judge=self.name,
            score=reading.score,
            reason=reading.reason,
            text=reading.text,
            source=self.source or reading.source,
            score_mass=reading.mass,
            finished=reading.finished,
        )

    def reader(self, tokens: Tokens, run_format: int | None = None) -> VerdictReader:
        """What finds this judge's verdicts in a tokenizer's ids, by the rules of a run's format."""
        form = self.form if run_format is None else self.form.of(run_format)
        known = self._reader
        if known is None or known.tokens is not tokens or known.form is not form:
            self._reader = known = VerdictReader(form, tokens)
        return known

    def has_room(self, length: int, limit: int | None, reader: VerdictReader) -> bool:
        """Whether a judge prompt of `length` tokens leaves room for an answer and its ending."""
        if limit is None:
            return True
        room = limit - length - self._ending_length(reader)
        if self.forced_ending == "at_once":
            return room >= 0
        return room >= min(MIN_ANSWER_TOKENS, self.sampling.max_new_tokens)

    def _ending_length(self, reader: VerdictReader) -> int:
        """The most tokens that follow an answer when probabilities of scores are computed."""
        if self.forced_ending:
            return reader.forced_length
        return reader.path_length - 1 if self.score_mode == "expected" else 0

    def check(self, text: str, tokens: Tokens, limit: int | None) -> None:
        """Raise ConfigError if scores cannot be told apart, JudgeError if no response has room.

        text: the judge prompt of empty texts.
        """
        reader, length = self.reader(tokens), len(tokens.prompt(text).ids)
        ending = self._ending_length(reader)
        answer = 0 if self.forced_ending == "at_once" else MIN_ANSWER_TOKENS
        if limit is not None and length + ending + answer >= limit:
            words = f"{amount(answer + ending, 'token')} of answer"
            raise JudgeError(
                f"the judge's prompt_template alone has {length} tokens, and the judge takes "
                f"{limit}: no room for a response and {words}. Shorten it."
            )


def _rendered(questions: Sequence[Question], tokens: Tokens) -> Iterator[tuple[Question, Rendered]]:
    """Each question with its judge prompt in tokens; equal texts are rendered once."""
    rendered: dict[tuple[str, object], Rendered] = {}
    for question in questions:
        key = question.text, getattr(question.text, "spans", ())
        if key not in rendered:
            rendered[key] = tokens.prompt(question.text)
        yield question, rendered[key]
