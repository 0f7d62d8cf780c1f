"""Questions to a model that judges, and what is made of its answers.

Knows texts, tokens and the ways a score may come; nothing of what is judged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol, runtime_checkable

from self_rewarding_lm.config import SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.tokens import Rendered, Tokens
from self_rewarding_lm.errors import JudgeError
from self_rewarding_lm.generation.candidates import decoding_of
from self_rewarding_lm.generation.engine import Request
from self_rewarding_lm.judges.expected import Place, VerdictReader, expected_scores
from self_rewarding_lm.judges.parsing import VerdictForm
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.records import Judgement, stable_hash

MIN_ANSWER_TOKENS = 16


FIRST_LOOK = 64  # judgements after which the parse rate is checked for the first time


STATED = (None, "out_of_range", "not_allowed")
"""Reasons with which a text has a place where a score of the judge's own scale stands."""


ForcedEnding = bool | Literal["at_once"]


@dataclass(frozen=True)
class Question:
    """One judgement that is wanted. id: of its record, it names the noise; text: the judge prompt,
    before the chat template."""

    id: str
    candidate_ids: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class _Asked:
    question: Question
    prompt: Rendered


@dataclass(frozen=True)
class _Pending:
    """An answer whose score is still to be computed."""

    question: Question
    text: str | None
    place: Place
    source: str


@runtime_checkable
class Asks(Protocol):
    """Who answers questions with judgements: a model by its tokens, or one behind an address."""

    def ask(self, ctx: Context, questions: Sequence[Question]) -> Iterator[Judgement]: ...


class Asker:
    """A judging model and the way its scores come.

    form: how it says what it decides. model: another one than the context's. source: what all its
    judgements say of their way, in place of `sampled`, `expected` and `forced`.
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
        self._looked = False
        self._reader: VerdictReader | None = None

    def ask(self, ctx: Context, questions: Sequence[Question]) -> Iterator[Judgement]:
        """A judgement for each question, in any order; those without room come first."""
        model = self.model or ctx.model
        reader = self.reader(ctx.tokens)
        rendered: dict[tuple[str, object], Rendered] = {}
        asked: list[_Asked] = []
        for question in questions:
            key = question.text, getattr(question.text, "spans", ())
            if key not in rendered:
                rendered[key] = ctx.tokens.prompt(question.text)
            prompt = rendered[key]
            if self.has_room(len(prompt.ids), model.max_len, reader):
                asked.append(_Asked(question, prompt))
            else:
                yield self._judgement(question, None, "too_long", None, self._way)
        first = 0 if self._looked else FIRST_LOOK  # few at first: they may all be unreadable
        self._looked = True
        with ctx.serving():
            for chunk in (asked[:first], asked[first:]):
                if not chunk:
                    continue
                if self.forced_ending == "at_once":
                    waiting = [self._at_once(one, reader) for one in chunk]
                    yield from self._computed(ctx, model, waiting, reader)
                else:
                    yield from self._sampled(ctx, model, chunk, reader)

    def reader(self, tokens: Tokens) -> VerdictReader:
        """Where this judge's verdicts stand in a tokenizer's ids."""
        if self._reader is None or self._reader.tokens is not tokens:
            self._reader = VerdictReader(self.form, tokens)
        return self._reader

    def has_room(self, length: int, limit: int | None, reader: VerdictReader) -> bool:
        """Whether a judge prompt of that length leaves room for an answer and its ending."""
        if limit is None:
            return True
        room = limit - length - self._ending(reader)
        if self.forced_ending == "at_once":
            return room >= 0
        return room >= min(MIN_ANSWER_TOKENS, self.sampling.max_new_tokens)

    def _ending(self, reader: VerdictReader) -> int:
        """Tokens that go behind an answer at most, to see the probabilities of scores."""
        if self.forced_ending:
            return reader.forced_length
        return reader.path_length - 1 if self.score_mode == "expected" else 0

    @property
    def _way(self) -> str:
        return "forced" if self.forced_ending == "at_once" else self.score_mode

    def _at_once(self, asked: _Asked, reader: VerdictReader) -> _Pending:
        return _Pending(asked.question, None, reader.forced(asked.prompt, ()), "forced")

    def _sampled(
        self, ctx: Context, model: TokenModel, asked: list[_Asked], reader: VerdictReader
    ) -> Iterator[Judgement]:
        limit, ending = model.max_len, self._ending(reader)
        requests = []
        for one in asked:
            length = len(one.prompt.ids)
            new = self.sampling.max_new_tokens
            new = new if limit is None else min(new, limit - length - ending)
            key = stable_hash(ctx.seed, one.question.id)
            requests.append(Request(one.prompt.ids, key, new, one.question.id))
        decoding = decoding_of(self.sampling, ctx.tokens)
        engine = ctx.engine_of(model)
        answers = ctx.runtime.autocasted(engine.generate(model, requests, decoding))
        while some := list(islice(answers, FIRST_LOOK)):
            waiting: list[_Pending] = []
            for index, done in some:
                if done.reason is not None:
                    one = asked[index].question
                    yield self._judgement(one, None, done.reason, None, self.score_mode)
                    continue
                read = self._read(asked[index], done.ids, ctx.tokens, reader)
                if isinstance(read, Judgement):
                    yield read
                else:
                    waiting.append(read)
            yield from self._computed(ctx, model, waiting, reader)

    def _read(
        self, asked: _Asked, ids: tuple[int, ...], tokens: Tokens, reader: VerdictReader
    ) -> Judgement | _Pending:
        """What is written, or the place where its score is to be computed."""
        text = tokens.decode(ids) or ""
        parsed = self.form.read(text)
        reason = parsed.reason
        if self.score_mode == "expected" and reason in STATED:
            place = reader.stated(asked.prompt.ids, ids)
            if place is not None:
                return _Pending(asked.question, text, place, "expected")
            reason = "no_place"
        elif parsed.score is not None:
            return self._judgement(asked.question, parsed.score, None, text, "sampled")
        if self.forced_ending:
            return _Pending(asked.question, text, reader.forced(asked.prompt, ids), "forced")
        return self._judgement(asked.question, None, reason, text, self.score_mode)

    def _computed(
        self, ctx: Context, model: TokenModel, waiting: list[_Pending], reader: VerdictReader
    ) -> Iterator[Judgement]:
        """Judgements by expected score; those whose numbers have no room go without."""
        fitting = []
        for one in waiting:
            needed = len(one.place.ids) + len(one.place.trie.levels()) - 1
            if model.max_len is None or needed <= model.max_len:
                fitting.append(one)
            else:
                yield self._judgement(one.question, None, "too_long", one.text, one.source)
        places = [one.place for one in fitting]
        found = expected_scores(model, places, reader, ctx.engine_of(model))
        for index, result in ctx.runtime.autocasted(found):
            one = fitting[index]
            yield self._judgement(
                one.question, result.score, result.reason, one.text, one.source, result.mass
            )

    def _judgement(
        self,
        question: Question,
        score: float | None,
        reason: str | None,
        text: str | None,
        source: str,
        mass: float | None = None,
    ) -> Judgement:
        return Judgement(
            id=question.id,
            candidate_ids=question.candidate_ids,
            judge=self.name,
            score=score,
            reason=reason,
            text=text,
            source=self.source or source,
            score_mass=mass,
        )

    def check(self, text: str, tokens: Tokens, limit: int | None) -> None:
        """Raise where scores cannot be told apart or an empty judge prompt fills the model.

        text: the judge prompt of empty texts.
        """
        reader, length = self.reader(tokens), len(tokens.prompt(text).ids)
        ending = self._ending(reader)
        answer = 0 if self.forced_ending == "at_once" else MIN_ANSWER_TOKENS
        if limit is not None and length + ending + answer >= limit:
            words = f"{answer + ending} tokens of answer"
            raise JudgeError(
                f"the judge's prompt_template alone has {length} tokens, and the judge takes "
                f"{limit}: no room for a response and {words}. Shorten it."
            )
