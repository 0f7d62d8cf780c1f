"""Examples of a run as lines of JSON, read from disk one prompt at a time.

An example is a prompt, its candidates with their scores and judgements, and the pair made of them.
Knows nothing of pages but that its JSON stands in one: no `<`, `>` or `&` is left in it.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from self_rewarding_lm.records import (
    Candidate,
    Demonstration,
    Judgement,
    PreferencePair,
    Prompt,
    is_trained,
)
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.runs.stored import Groups, Stored
from self_rewarding_lm.scores import candidate_scores

HIDDEN = {
    code: f"\\u{code:04x}"
    for code in (*map(ord, "<>&"), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}
"""Written by their number: what could end a script, ends a line or turns the order of letters."""


SAMPLE = ("prompt", "response", "role", "score", "judge")
"""Columns of `sample_rows`."""


@dataclass(frozen=True)
class Part:
    """Examples of one stage of one run.

    records: prompts that were answered, else pairs, else demonstrations. places: those that the
    page gets.
    """

    run: Run
    place: int
    stage: str
    records: Stored[Any]
    places: Sequence[int] = ()


def parts_of(runs: Sequence[Run], at_most: int) -> list[Part]:
    """Which examples the page gets: all, or so many of each stage, evenly spread over it.

    Stages with fewer than their share leave the rest of it to the others.
    """
    found = [
        Part(run, place, stage, _records(run, stage))
        for place, run in enumerate(runs)
        for stage in run.stages
    ]
    found = [part for part in found if len(part.records)]
    shares, left = {}, at_most
    for done, k in enumerate(sorted(range(len(found)), key=lambda k: len(found[k].records))):
        shares[k] = min(len(found[k].records), left // (len(found) - done))
        left -= shares[k]
    return [
        replace(part, places=_spread(len(part.records), shares[k])) for k, part in enumerate(found)
    ]


def example_lines(part: Part) -> Iterator[str]:
    """The part's examples, each as a line of JSON that may stand within a script element."""
    for example in _examples(part):
        yield in_script({"r": part.place, "s": part.stage, **example})


def sample_rows(run: Run, stage: str, count: int) -> list[list[str]]:
    """Some of a stage's examples, evenly spread, as rows of texts: one for each response."""
    records = _records(run, stage)
    part = Part(run, 0, stage, records, _spread(len(records), min(count, len(records))))
    return [
        [
            example["p"],
            answer["t"],
            answer["l"] or "",
            "" if answer["x"] is None else str(answer["x"]),
            "\n".join(said["t"] or "" for said in answer["j"]),
        ]
        for example in _examples(part)
        for answer in example["c"]
    ]


def in_script(value: Any) -> str:
    """A value as JSON in which nothing can end a script element or a line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(HIDDEN)


def _examples(part: Part) -> Iterator[dict[str, Any]]:
    return (_sampled if part.records.record_type is Prompt else _others)(part)


def _records(run: Run, stage: str) -> Stored[Any]:
    files = run.stage(stage)
    answered = {name.rsplit("/", 1)[0] for name in files.stored(Candidate).ids()}
    if answered:
        return files.stored(Prompt, answered.__contains__)
    return files.stored(PreferencePair, is_trained) or files.stored(Demonstration)


def _spread(total: int, count: int) -> Sequence[int]:
    return [i * total // count for i in range(count)]


def _sampled(part: Part) -> Iterator[dict[str, Any]]:
    """Examples of a stage that sampled: its prompts with all that came of them."""
    files = part.run.stage(part.stage)
    candidates = Groups(files.stored(Candidate), lambda c: c.prompt_id)
    judgements = Groups(files.stored(Judgement), _prompt_id)
    pairs = Groups(files.stored(PreferencePair, is_trained), _prompt_of_pair)
    made = Groups(files.stored(Demonstration))
    for place in part.places:
        prompt = part.records[place]
        own = sorted(candidates[prompt.id], key=lambda c: c.id)
        pair = next(iter(pairs[prompt.id]), None)
        learnt = [c.id for c in own if c.id in made]
        yield _example(prompt, own, judgements[prompt.id], pair, learnt)


def _others(part: Part) -> Iterator[dict[str, Any]]:
    """Examples of a stage that sampled nothing: its pairs, or what it made to be learnt."""
    for place in part.places:
        record = part.records[place]
        prompt = _shown(record.prompt, record.prompt_ids)
        if isinstance(record, PreferencePair):
            yield {"id": record.id, "p": prompt, **_answers([], {}, [], record, [])}
        else:
            text = _shown(record.completion, record.completion_ids)
            answer = {"n": "demonstration", "t": text, "x": None, "l": "learnt", "j": []}
            yield {"id": record.id, "p": prompt, "c": [answer], "m": None}


def _example(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
    pair: PreferencePair | None,
    learnt: Sequence[str],
) -> dict[str, Any]:
    scores = candidate_scores(candidates, judgements)
    shown = _shown(prompt.text, prompt.ids)
    answers = _answers(candidates, scores, judgements, pair, learnt)
    return {"id": prompt.id, "p": shown, **answers}


def _answers(
    candidates: Sequence[Candidate],
    scores: dict[str, float | None],
    judgements: Sequence[Judgement],
    pair: PreferencePair | None,
    learnt: Sequence[str],
) -> dict[str, Any]:
    """Candidates (n: name, t: text, x: score, l: chosen, rejected or learnt) and the margin m."""
    labels = dict.fromkeys(learnt, "learnt")
    given, margin = [], None
    for side in ("chosen", "rejected") if pair is not None else ():
        assert pair is not None
        own, score = getattr(pair, f"{side}_id"), getattr(pair, f"{side}_score")
        if own is not None and any(c.id == own for c in candidates):
            labels[own] = side
        else:
            text = _shown(getattr(pair, side), getattr(pair, f"{side}_ids"))
            given.append({"n": own or "given", "t": text, "x": _number(score), "l": side, "j": []})
    if pair is not None and None not in (pair.chosen_score, pair.rejected_score):
        margin = _number(pair.chosen_score - pair.rejected_score)  # type: ignore[operator]
    shown = []
    for c in candidates:
        said = [_said(j, c) for j in judgements if c.id in j.candidate_ids]
        text = _shown(c.text, c.ids) if c.reason is None else f"no response: {c.reason}"
        one = {"n": c.id.rsplit("/", 1)[-1], "t": text, "x": _number(scores[c.id])}
        cut = {"e": "cut off"} if c.finished is False else {}
        shown.append({**one, **cut, "l": labels.get(c.id), "j": said, "k": len(c.ids)})
    return {"c": [*shown, *given], "m": margin}


def _said(judgement: Judgement, candidate: Candidate) -> dict[str, Any]:
    """What one judgement says of a candidate: judge b, score x, reason r, words t."""
    score, how = judgement.score, judgement.source
    if len(judgement.candidate_ids) == 2:
        first = judgement.candidate_ids[0] == candidate.id
        other = judgement.candidate_ids[first]
        how += f" with {other.rsplit('/', 1)[-1]}, shown {'first' if first else 'second'}"
        score = score if score is None or first else 1 - score
    found = {"b": f"{judgement.judge}, {how}", "x": _number(score)}
    if judgement.reason is not None:
        found["r"] = judgement.reason
    return {**found, "t": judgement.text}


def _shown(text: str | None, ids: Sequence[int]) -> str:
    return f"token ids {' '.join(map(str, ids))}" if text is None else text


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _prompt_id(judgement: Judgement) -> str:
    return judgement.candidate_ids[0].rsplit("/", 1)[0]


def _prompt_of_pair(pair: PreferencePair) -> str:
    """The prompt that a pair's own response answers."""
    own = pair.chosen_id or pair.rejected_id
    return pair.id if own is None else own.rsplit("/", 1)[0]
