"""Examples of a run: a prompt, the responses to it with scores and judgements, the pairs of them.

`examples` joins a stage's records, reading one prompt's at a time; the page gets them as lines of
JSON, the terminal as text, trackers as rows. Knows nothing of pages but that its JSON stands in
one: no `<`, `>` or `&` is left in it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from self_rewarding_lm.records import (
    Advantage,
    Candidate,
    Demonstration,
    Judgement,
    PreferencePair,
    Prompt,
    is_trained,
)
from self_rewarding_lm.report.words import reason_words
from self_rewarding_lm.runs.lines import Joined, Lazy, Picked
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.runs.stage_files import StageFiles
from self_rewarding_lm.runs.stored import Groups, Stored, id_order
from self_rewarding_lm.scores import candidate_scores, label_of

HIDDEN = {
    code: f"\\u{code:04x}"
    for code in (*map(ord, "<>&"), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}
"""Written by their number: what could end a script, ends a line or turns the order of letters."""


SAMPLE = ("prompt", "response", "role", "score", "judge")
"""Columns of `sample_rows`."""


@dataclass(frozen=True)
class Response:
    """A response to an example's prompt.

    name: its candidate's id after the prompt's; of a response that was not sampled in the stage
    its own id, "given" or "demonstration". role: "chosen", "rejected" or "learnt". score: what its
    judgements come to, of a response in a pair or with an advantage that record's; None if it is
    not known. candidate: None if it was not sampled in the stage. advantage: by which it was made
    likelier, of a stage that makes no pairs.
    """

    name: str
    text: str | None
    ids: Sequence[int]
    role: str | None = None
    score: float | None = None
    judgements: Sequence[Judgement] = ()
    candidate: Candidate | None = None
    advantage: float | None = None

    @property
    def has_parts(self) -> bool:
        """Whether the judgements are those of an ensemble's members, or of an earlier model too.

        Only the pairs say what these come to.
        """
        return any(label_of(judgement) is not None for judgement in self.judgements)


@dataclass(frozen=True)
class Example:
    """A prompt with all that came of it.

    margin: of the first pair's scores. judgement_roles: "chosen" or "rejected" by the ids of
    judgements that are the sides of a pair themselves (Meta-Rewarding).
    """

    id: str
    prompt: str | None
    prompt_ids: Sequence[int]
    responses: Sequence[Response]
    margin: float | None = None
    judgement_roles: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_used(self) -> bool:
        """Whether a pair or a response with an advantage came of it."""
        roles = {response.role for response in self.responses} | set(self.judgement_roles.values())
        return "chosen" in roles or any(r.advantage is not None for r in self.responses)


class Examples(Joined[Example]):
    """All examples of a stage.

    worked: its prompts that were answered, or its pairs if none was. demonstrations: those that are
    no response to such a prompt.
    """

    def __init__(self, worked: Sequence[Example], demonstrations: Sequence[Example]) -> None:
        super().__init__(worked, demonstrations)
        self.worked, self.demonstrations = worked, demonstrations


def examples(run: Run, stage: str) -> Examples:
    """The examples of a stage; each is read from disk when it is asked for."""
    files = run.stage(stage)
    candidates, demonstrations = files.stored(Candidate), files.stored(Demonstration)
    if candidates:
        worked: Sequence[Example] = _AnsweredPrompts(files, candidates)
        if demonstrations:
            candidate_ids = set(candidates.ids())
            demonstrations = files.stored(Demonstration, lambda name: name not in candidate_ids)
    else:
        worked = Picked(files.stored(PreferencePair, is_trained), change=_example_of_pair)
    return Examples(worked, Picked(demonstrations, change=_example_of_demonstration))


class _AnsweredPrompts(Lazy[Example]):
    """A stage's prompts, each with the records that name it."""

    def __init__(self, files: StageFiles, candidates: Stored[Candidate]) -> None:
        self._files = files
        self._candidates = Groups(candidates, lambda candidate: candidate.prompt_id)
        self._prompts = files.stored(Prompt, self._candidates.__contains__)

    @cached_property
    def _judgements(self) -> Groups[Judgement]:
        return Groups(self._files.stored(Judgement), lambda judgement: judgement.candidate_ids[0])

    @cached_property
    def _pairs(self) -> Groups[PreferencePair]:
        """By the first record that they name: a candidate, or a judgement."""
        pairs = self._files.stored(PreferencePair, is_trained)
        return Groups(pairs, lambda pair: pair.chosen_id or pair.rejected_id or pair.id)

    @cached_property
    def _advantages(self) -> Groups[Advantage]:
        return Groups(self._files.stored(Advantage), lambda record: record.candidate_id)

    @cached_property
    def _demonstrations(self) -> Groups[Demonstration]:
        return Groups(self._files.stored(Demonstration))

    def __len__(self) -> int:
        return len(self._prompts)

    def _at(self, place: int) -> Example:
        prompt = self._prompts[place]
        # 1. the prompt's records, as they name each other
        candidates = sorted(self._candidates[prompt.id], key=lambda c: id_order(c.id))
        judgements = [j for candidate in candidates for j in self._judgements[candidate.id]]
        names = [prompt.id, *(c.id for c in candidates), *(j.id for j in judgements)]
        pairs = sorted((p for n in names for p in self._pairs[n]), key=lambda p: id_order(p.id))
        # 2. roles: those of the first pair that names a record
        judgement_ids = {judgement.id for judgement in judgements}
        roles: dict[str, str] = {}
        for pair in pairs:
            for name, role in ((pair.chosen_id, "chosen"), (pair.rejected_id, "rejected")):
                if name is not None:
                    roles.setdefault(name, role)
        advantages = {c.id: a for c in candidates for a in self._advantages[c.id]}
        for candidate in candidates:
            if candidate.id in self._demonstrations or candidate.id in advantages:
                roles.setdefault(candidate.id, "learnt")
        # 3. scores: a pair knows what an ensemble's members come to, their judgements do not
        scores = candidate_scores(candidates, [j for j in judgements if label_of(j) is None])
        for pair in pairs:
            sides = ((pair.chosen_id, pair.chosen_score), (pair.rejected_id, pair.rejected_score))
            scores |= {name: score for name, score in sides if name and score is not None}
        scores |= {name: record.score for name, record in advantages.items()}
        # 4. the responses: first those of the stage, then those that pairs were given
        responses = [
            Response(
                name=candidate.id.removeprefix(f"{prompt.id}/"),
                text=candidate.text if candidate.reason is None else _no_response(candidate),
                ids=candidate.ids,
                role=roles.get(candidate.id),
                score=scores[candidate.id],
                judgements=[j for j in judgements if candidate.id in j.candidate_ids],
                candidate=candidate,
                advantage=advantages[candidate.id].advantage
                if candidate.id in advantages
                else None,
            )
            for candidate in candidates
        ]
        actor_pairs = [p for p in pairs if p.chosen_id not in judgement_ids]
        for pair in actor_pairs:
            responses += _given_responses(pair, without=names)
        return Example(
            prompt.id,
            prompt.text,
            prompt.ids,
            responses,
            _margin(actor_pairs[0]) if actor_pairs else None,
            {name: role for name, role in roles.items() if name in judgement_ids},
        )


def _no_response(candidate: Candidate) -> str:
    return f"no response: {candidate.reason}"


def _example_of_pair(pair: PreferencePair) -> Example:
    """Of a stage that sampled nothing."""
    responses = _given_responses(pair, without=())
    return Example(pair.id, pair.prompt, pair.prompt_ids, responses, _margin(pair))


def _example_of_demonstration(row: Demonstration) -> Example:
    response = Response("demonstration", row.completion, row.completion_ids, "learnt")
    return Example(row.id, row.prompt, row.prompt_ids, [response])


def _given_responses(pair: PreferencePair, without: Sequence[str]) -> list[Response]:
    """The responses of a pair, but for those with the ids `without`."""
    chosen = (pair.chosen_id, pair.chosen, pair.chosen_ids, "chosen", pair.chosen_score)
    rejected = (pair.rejected_id, pair.rejected, pair.rejected_ids, "rejected", pair.rejected_score)
    return [
        Response(name or "given", text, ids, role, score)
        for name, text, ids, role, score in (chosen, rejected)
        if name is None or name not in without
    ]


def _margin(pair: PreferencePair) -> float | None:
    if pair.chosen_score is None or pair.rejected_score is None:
        return None
    return pair.chosen_score - pair.rejected_score


def score_said_of(judgement: Judgement, candidate_id: str) -> float | None:
    """The score that a judgement gives a candidate, which may be the second of two compared."""
    if judgement.score is None or judgement.candidate_ids[0] == candidate_id:
        return judgement.score
    return 1 - judgement.score


@dataclass(frozen=True)
class Part:
    """Examples of one stage of one run, of which the page gets those at `places`.

    number: of the run among those of the page.
    """

    number: int
    stage: str
    examples: Sequence[Example]
    places: Sequence[int] = ()


def parts_of(runs: Sequence[Run], at_most: int) -> list[Part]:
    """Which examples the page gets: all, or so many of each stage, evenly spread over it.

    Stages with fewer than their share leave the rest of it to the others.
    """
    parts = [
        Part(number, stage, examples(run, stage))
        for number, run in enumerate(runs)
        for stage in run.stages
    ]
    parts = [part for part in parts if part.examples]
    shares, free = {}, at_most
    for done, k in enumerate(sorted(range(len(parts)), key=lambda k: len(parts[k].examples))):
        shares[k] = min(len(parts[k].examples), free // (len(parts) - done))
        free -= shares[k]
    return [
        replace(part, places=_spread(len(part.examples), shares[k])) for k, part in enumerate(parts)
    ]


def example_lines(part: Part) -> Iterator[str]:
    """The part's examples, each as a line of JSON that may stand within a script element."""
    for example in Picked(part.examples, part.places):
        yield in_script({"r": part.number, "s": part.stage, **_as_json(example)})


def sample_rows(run: Run, stage: str, count: int) -> list[list[str]]:
    """Some of a stage's examples, evenly spread, as rows of texts: one for each response."""
    of_stage = examples(run, stage)
    return [
        [
            _text_or_ids(example.prompt, example.prompt_ids),
            _text_or_ids(response.text, response.ids),
            response.role or "",
            "" if (score := _rounded(response.score)) is None else str(score),
            "\n".join(judgement.text or "" for judgement in response.judgements),
        ]
        for example in Picked(of_stage, _spread(len(of_stage), min(count, len(of_stage))))
        for response in example.responses
    ]


def in_script(value: Any) -> str:
    """A value as JSON in which nothing can end a script element or a line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(HIDDEN)


def _spread(total: int, count: int) -> Sequence[int]:
    return [i * total // count for i in range(count)]


def _as_json(example: Example) -> dict[str, Any]:
    """id, p: prompt, c: responses, m: margin."""
    return {
        "id": example.id,
        "p": _text_or_ids(example.prompt, example.prompt_ids),
        "c": [_response_as_json(example, response) for response in example.responses],
        "m": _rounded(example.margin),
    }


def _response_as_json(example: Example, response: Response) -> dict[str, Any]:
    """n: name, t: text, x: score, a: advantage, l: role, j: judgements; k: tokens, e: how it ended;
    w: what its judgements are if they are no score."""
    candidate = response.candidate
    values: dict[str, Any] = {
        "n": response.name,
        "t": _text_or_ids(response.text, response.ids),
        "x": _rounded(response.score),
    }
    if response.score is None and response.has_parts:
        values["w"] = "parts of a score"
    if response.advantage is not None:
        values["a"] = signed(response.advantage)
    if candidate is not None and candidate.finished is False:
        values["e"] = "cut off"
    values["l"] = response.role
    values["j"] = (
        []
        if candidate is None
        else [
            _judgement_as_json(example, judgement, candidate) for judgement in response.judgements
        ]
    )
    return values if candidate is None else {**values, "k": len(candidate.ids)}


def _judgement_as_json(
    example: Example, judgement: Judgement, candidate: Candidate
) -> dict[str, Any]:
    """What a judgement says of a candidate: judge b, score x, reason r, role l, words t."""
    how = judgement.source
    if len(judgement.candidate_ids) == 2:
        is_first = judgement.candidate_ids[0] == candidate.id
        other = judgement.candidate_ids[is_first].removeprefix(f"{candidate.prompt_id}/")
        how += f" with {other}, shown {'first' if is_first else 'second'}"
    values: dict[str, Any] = {
        "b": f"{judgement.judge}, {how}",
        "x": _rounded(score_said_of(judgement, candidate.id)),
    }
    if judgement.reason is not None:
        values["r"] = reason_words(judgement.reason)
    if judgement.id in example.judgement_roles:
        values["l"] = example.judgement_roles[judgement.id]
    return {**values, "t": judgement.text}


def signed(advantage: float) -> str:
    """An advantage with its sign, to three digits."""
    return f"{advantage:+.3g}"


def _text_or_ids(text: str | None, ids: Sequence[int]) -> str:
    return f"token ids {' '.join(map(str, ids))}" if text is None else text


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
