"""The records that travel along the arrows of the loop.

    Prompt -> Candidate -> Judgement -> PreferencePair

Every record has an id and names its parents, so that a trained pair can be traced back to its
prompt, its candidates and every judge text. Records keep token ids: what was sampled is what is
trained on; text is for people and judges. A value that is not known is None.

Knows nothing of models, tensors or files.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, TypeVar

Ids = tuple[int, ...]
"""Token ids of one text."""


VARIABLES = "chat_template_kwargs"
"""The key of a conversation's first message that holds what its chat template reads beside the
messages, such as `tools`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as it is used in one stage.

    id: stage/row/pass; for the position after a step (StepwiseDPOConfig), the id of that step
    followed by "/then" (THEN). row: its row in the dataset. text: None if the row has only ids.
    columns: the other columns of its row; text reward functions receive them. completion: ids of
    the human answer if the row has one (SPIN), else None. messages: the messages that the chat
    template rendered; the first may hold VARIABLES. None if the text is taken as it is.
    """

    kind: ClassVar[str] = "prompts"
    id: str
    row: int
    ids: tuple[int, ...]
    text: str | None = None
    columns: Mapping[str, Any] | None = None
    completion: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled response; id: <prompt id>/<sample>.

    ids: the new tokens, its end token included. finished: True if it ended by itself, False if
    max_new_tokens cut it off, None if no end token is known. max_new_tokens: the limit that was in
    force for it. tokens: "re-encoded" if a server gave a text and the ids are its encoding; None if
    they are those that were sampled. reason: why there is no response (a server refused its
    request); then it has no ids and no text, is not judged and is in no pair. shown_id: the Prompt
    that the model was shown, if it is not the one that this answers. logprobs: those of its tokens
    in the sampler, at temperature 1, before filters, to four digits; None if the stage does not
    need them or the sampler gives none.
    """

    kind: ClassVar[str] = "candidates"
    id: str
    prompt_id: str
    ids: tuple[int, ...]
    text: str | None
    finished: bool | None
    max_new_tokens: int
    tokens: str | None = None
    reason: str | None = None
    shown_id: str | None = None
    logprobs: tuple[float, ...] | None = None


MOVED = "moved"
"""The source of a judgement that only gives a candidate the score of another one."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One judgement of a judge on one candidate, or on two; id: <candidate id>/j<k>.

    score: None if none could be read, and reason says why. text: what the judge wrote, None for
    judges that only give numbers. source: how the score came about: `sampled` (read in the text),
    `expected` (the mean over the allowed numbers at the place of the text's number), `forced` (the
    same after a score prefix that was appended), `compared`, `given` (by a function or module),
    `moved` (that of another candidate, see ShuffledJudge).
    score_mass: the probability of all allowed numbers together, if it was computed. finished: False
    if the text was cut off; None if that is not known, or nothing was written.
    """

    kind: ClassVar[str] = "judgements"
    id: str
    candidate_ids: tuple[str, ...]
    judge: str
    score: float | None
    reason: str | None = None
    text: str | None = None
    source: str = "given"
    score_mass: float | None = None
    finished: bool | None = None

    @property
    def is_cut(self) -> bool:
        """Whether its text was cut off. No model should learn to end there."""
        return self.finished is False

    @property
    def is_moved(self) -> bool:
        """Whether its score is that of another candidate (ShuffledJudge)."""
        return self.source == MOVED


@dataclass(frozen=True, slots=True)
class MetaJudgement:
    """Two judgements of one candidate, compared once; id: <judgement id>/vs/j<k>.

    judgement_ids: the two, in the order in which they were shown. score: 1 if the first is better,
    0 if the second is, 0.5 for a tie, numbers between them for probabilities; None if none could be
    read, and reason says why. The other fields are those of a Judgement.
    """

    kind: ClassVar[str] = "meta_judgements"
    id: str
    judgement_ids: tuple[str, ...]
    judge: str
    score: float | None
    reason: str | None = None
    text: str | None = None
    source: str = "compared"
    score_mass: float | None = None


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A better and a worse response to one prompt; id: the prompt's id.

    chosen_id and rejected_id name the candidates; None for a response that was not sampled here (a
    human response). The scores are None if there was no judge. messages: those of the prompt, if a
    chat template rendered it. Numbers for losses, if the dataset or a stage gives them: weight, by
    which the pair's loss is multiplied (None: 1); win_probability and rejected_win_probability, how
    likely each response wins (None: 1, and 1 less the other); label_smoothing, how likely the two
    are the wrong way round (None: 0).
    """

    kind: ClassVar[str] = "pairs"
    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    chosen_id: str | None = None
    rejected_id: str | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    weight: float | None = None
    win_probability: float | None = None
    rejected_win_probability: float | None = None
    label_smoothing: float | None = None


@dataclass(frozen=True, slots=True)
class Advantage:
    """How much better a response is than the others to its prompt; id: stage/row/pass/sample.

    candidate_id: the response's candidate, whose id differs if another stage sampled it.
    score: the score of the response. advantage: how much likelier training makes it.
    """

    kind: ClassVar[str] = "advantages"
    id: str
    candidate_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    score: float
    advantage: float


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A response to be learnt, made by a stage; id: stage/row/reply.

    parents: ids of the records that it was made from. messages: those of the prompt, if a chat
    template rendered it.
    """

    kind: ClassVar[str] = "demonstrations"
    id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    prompt: str | None = None
    completion: str | None = None
    parents: tuple[str, ...] = ()
    messages: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class RankedReplies:
    """Replies to one prompt, ranked by people; id: stage/row.

    prompt: a text, or messages. ranks: 0 is best; replies of equal rank were not ordered. group:
    shared by rows that are not independent of each other (those of a message tree).
    """

    kind: ClassVar[str] = "ranked"
    id: str
    prompt: str | tuple[Mapping[str, Any], ...]
    replies: tuple[str, ...]
    ranks: tuple[float, ...]
    group: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """A prompt that a model wrote; id: <stage>/<sample>/<place in it>.

    parents: the examples that were shown. reason: why it was left out, None if it was kept.
    """

    kind: ClassVar[str] = "instructions"
    id: str
    text: str
    parents: tuple[str, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One supervised sequence as it was trained; id: stage/row.

    targets: for each token whether it is learnt (True) or only read (False, as the prompt is).
    """

    kind: ClassVar[str] = "rows"
    id: str
    ids: tuple[int, ...]
    targets: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class ReferenceLogprobs:
    """Per-token log-probs of a pair's responses under the reference; id: the pair's id."""

    kind: ClassVar[str] = "reference"
    id: str
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class ResponseLogprobs:
    """Per-token log-probs of a response under fixed weights; id: <response id>/<weights>."""

    kind: ClassVar[str] = "logprobs"
    id: str
    logprobs: tuple[float, ...]


RECORD_TYPES = (
    Prompt,
    Candidate,
    Judgement,
    PreferencePair,
    ReferenceLogprobs,
    TrainingRow,
    Demonstration,
    RankedReplies,
    Instruction,
    MetaJudgement,
    Advantage,
    ResponseLogprobs,
)
"""All kinds that a stage's folder holds."""


def to_json(record: Any) -> dict[str, Any]:
    """A record as plain JSON values."""
    return {name: getattr(record, name) for name in _names(type(record))}


FIRST = "first"
"""In ids of pairs, <stage>/first/...: trained on by a model that was trained ahead and not kept."""


THEN, AGAIN = "then", "again"
"""In ids of prompts: <candidate id>/then is gone on with after that candidate; a prompt that is
answered once more in the same place has /again1, /again2, ... after its id."""


def is_trained(record_id: str) -> bool:
    """Whether the stage's weights were trained on the pair or row of that id.

    Not on those of a valid_dataset, nor on those of the model that a temporal stage trains ahead.
    """
    return record_id.split("/")[1] not in ("valid", FIRST)


def prompt_id_of(record_id: str) -> str:
    """The id of the prompt, stage/row/pass, with which the id of a record made of it begins."""
    return "/".join(record_id.split("/")[:3])


def same_text(one: Candidate, other: Candidate) -> bool:
    """Whether two responses say the same: equal ids, or texts equal but for space around them."""
    if one.ids == other.ids:
        return True
    return one.text is not None and one.text.strip() == (other.text or "").strip()


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold; JSON has larger ones, NaN and infinity."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def columns_of(pair: PreferencePair) -> dict[str, Any]:
    """A pair in TRL's columns: message lists or texts where it has them, else token ids."""
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    if None in sides.values():
        ids = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        return dict(zip(("prompt", "chosen", "rejected"), ids, strict=True))
    if pair.messages is None:
        return {"prompt": pair.prompt, **sides}
    said = {k: [{"role": "assistant", "content": text}] for k, text in sides.items()}
    return {**prompt_columns(pair.messages), **said}


def prompt_columns(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A prompt of messages in TRL's columns: prompt, and what its template reads beside them."""
    prompt = [{k: v for k, v in message.items() if k != VARIABLES} for message in messages]
    variables: dict[str, Any] = {}
    for message in messages:
        variables |= message.get(VARIABLES, {})
    tools = {"tools": variables.pop("tools")} if "tools" in variables else {}
    return {"prompt": prompt, **tools, **({VARIABLES: variables} if variables else {})}


def from_json(record_type: type[Record], values: Mapping[str, Any]) -> Record:
    """The record that `to_json` was given; lists become tuples again."""
    unknown = values.keys() - _names(record_type).keys()
    if unknown:
        raise ValueError(f"{record_type.__name__} has no field {', '.join(sorted(unknown))}")
    return record_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@cache
def _names(record_type: type) -> dict[str, None]:
    """The names of a record's fields, in their order."""
    return dict.fromkeys(field.name for field in fields(record_type))


def stable_hash(*parts: str | int) -> int:
    """A 63-bit number that is the same on every machine and in every process."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
