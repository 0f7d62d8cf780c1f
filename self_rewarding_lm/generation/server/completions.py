"""What is sent to /v1/completions for a request, and how the answer is read.

Knows what each kind of server takes and gives; nothing of connections. There are four kinds:
`vllm`, which takes and gives token ids and has fields for all settings; `sglang`, which has the
same fields but for a few; `transformers` (`transformers serve`), which takes text and a whole
generation config; and `plain`, which has OpenAI's own fields only.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from self_rewarding_lm.config import SamplingConfig
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, ServerError
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.server.client import Body, HttpClient, Refusal
from self_rewarding_lm.records import Ids
from self_rewarding_lm.text import amount

PATH = "/completions"


TOKEN_NAME = "token_id:"
"""With return_tokens_as_token_ids vLLM names tokens like this, followed by their id."""


SEED_BITS = 31


RE_ENCODED = "re-encoded"


NEUTRAL_FIELDS = {
    **{"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0},
    **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
}
"""Settings by the names of vLLM and SGLang, where they change nothing. All are sent, as a server
takes those of the model's generation config for what is not."""


MOST_CHARACTERS = 1000
"""Characters that one token may be at most."""


MOST_REENCODED = 3
"""Tokens that one token's text may be at most when it is encoded: a byte that is no character comes
back as U+FFFD, which has three bytes."""


LOG_PROB_ROUNDING = 1e-3
"""How far above 0 a log-prob may be."""


WORD = re.compile(r"[a-z_]{1,40}")


ENDED_BY = ("stop_reason", "matched_stop")
"""Fields in which vLLM and SGLang say what ended an answer: a text, an id, or null for the model's
own end token."""


PROBES = ("Hello", "a", "1", " ")
"""Prompts of the first requests; the first one that the tokenizer can encode is used."""


@dataclass(frozen=True)
class Abilities:
    """What a server takes and gives.

    takes_ids: prompts as token ids. gives_ids: the ids of the answer's tokens. by_name: it gives
    them only as names of its log-probs' tokens. gives_chances: log-probs with the ids of their
    tokens. exact_chances: log-probs of the tokens that are asked for.
    """

    kind: Literal["vllm", "sglang", "transformers", "plain"]
    takes_ids: bool
    gives_ids: bool = False
    by_name: bool = False
    gives_chances: bool = False
    exact_chances: bool = False

    def in_words(self) -> str:
        prompts = "token ids" if self.takes_ids else "text"
        answers = "token ids" if self.gives_ids else "text, which is encoded once"
        exactness = "exact" if self.exact_chances else "the likeliest tokens'"
        logprobs = exactness if self.gives_chances else "no"
        return f"a server of kind {self.kind}: {prompts} in, {answers} out, {logprobs} log-probs"


KINDS = (
    Abilities("vllm", takes_ids=True),
    Abilities("transformers", takes_ids=False),
    Abilities("plain", takes_ids=True),
    Abilities("plain", takes_ids=False),
)
"""The kinds in the order in which they are tried; the first that the server understands is used."""


PROBED_IDS = (0, 1)


NONSENSE = {"self_rewarding_lm_nonsense": 1}
"""A field that no server knows; `transformers serve` refuses what it does not know."""


class MalformedAnswerError(ValueError):
    """An answer that has not the form of the API, or says what cannot be."""


@dataclass(frozen=True)
class ServedModel:
    """A model on a server: the bodies of requests to it, and how its answers are read.

    model: its name there. extra: fields that are put into every body. max_len: tokens of prompt and
    answer together that it takes, if the server says so.
    """

    model: str
    tokens: Tokens
    abilities: Abilities
    extra: Mapping[str, Any]
    max_len: int | None = None

    def check(self, decoding: Decoding) -> None:
        """Raise ConfigError if the server has no field for a setting."""
        check_sampling(decoding)
        if self.abilities.kind != "plain":
            return
        asked = {
            "top_k": decoding.top_k is not None,
            "min_p": decoding.min_p is not None,
            "min_new_tokens": decoding.min_new_tokens > 0,
            "repetition_penalty": decoding.repetition_penalty != 1.0,
        }
        missing = [name for name, wanted in asked.items() if wanted]
        if missing:
            raise ConfigError(
                f"the server takes OpenAI's own fields alone, which have none for "
                f"{', '.join(missing)}. Leave {'it' if len(missing) == 1 else 'them'} out of the "
                "stage's SamplingConfig, use a server that has such fields (vLLM, transformers "
                "serve), or the local engine."
            )

    def most_new(self, request: Request) -> int:
        """New tokens that a request may have: as many as asked for, or as the server has room."""
        most = request.max_new_tokens
        return most if self.max_len is None else min(most, self.max_len - len(request.ids))

    def body(self, request: Request, decoding: Decoding) -> Body | Refusal:
        """What is posted for a request, or why it need not be asked.

        `no_text`: its ids cannot be written as the text that the server takes. `too_long`: they
        leave no room in the server's context.
        """
        most = self.most_new(request)
        if most < 1:
            words = f"a prompt of {len(request.ids)} tokens fills the server's {self.max_len}"
            return Refusal("too_long", f"{words} (max_model_len)")
        prompt = self.prompt(request.ids)
        if prompt is None:
            words = "some prompts have ids that no text gives, and the server takes texts only"
            return Refusal("no_text", words)
        fields = {"model": self.model, "prompt": prompt, "max_tokens": most}
        fields["seed"] = request.key & (2**SEED_BITS - 1)
        fields |= _decoding_fields(self.abilities.kind, decoding, most)
        if self.abilities.by_name:
            fields |= {"logprobs": 0, "return_tokens_as_token_ids": True}
        elif decoding.logprobs and self.abilities.kind == "vllm":
            fields["logprobs"] = 0
        return {**fields, **self.extra}

    def prompt(self, ids: Ids) -> list[int] | str | None:
        """Ids as the server takes them; None if it takes text and no text has these ids."""
        return list(ids) if self.abilities.takes_ids else prompt_text(ids, self.tokens)

    def chances_body(self, ids: Ids, wanted: Sequence[int], top: int) -> Body:
        """A body that asks what follows ids: log-probs of `wanted`, or of the `top` likeliest."""
        exact = {"logprob_token_ids": list(wanted)} if self.abilities.exact_chances else {}
        fields = {"logprobs": max(1, len(wanted)) if exact else top, **exact}
        return {
            **self._logprob_fields(ids),
            **fields,
            "return_tokens_as_token_ids": True,
            **self.extra,
        }

    def scoring_body(self, ids: Ids) -> Body:
        """A body that asks for the log-probs of the ids themselves."""
        return {**self._logprob_fields(ids), "prompt_logprobs": 0, **self.extra}

    def _logprob_fields(self, ids: Ids) -> dict[str, Any]:
        """Fields that ask for one token, with settings that leave probabilities as they are."""
        neutral = {"temperature": 1.0, "top_p": 1.0, "seed": 0}
        if self.abilities.kind == "vllm":
            neutral |= NEUTRAL_FIELDS
        return {"model": self.model, "prompt": list(ids), "max_tokens": 1, **neutral}

    def completion(
        self, answer: Body | Refusal, request: Request, decoding: Decoding
    ) -> Completion:
        """The completion in an answer; one without ids, with the reason, if there is none.

        Raises MalformedAnswerError for what is no answer to the request.
        """
        if isinstance(answer, Refusal):
            return Completion((), None, reason=answer.reason)
        choice = first_choice(answer)
        if choice is None:
            return Completion((), None, reason="no_choice")
        finish = choice.get("finish_reason")
        if finish not in ("stop", "length"):
            return Completion((), None, reason=f"finish_{word_of(finish)}")
        most, text = self.most_new(request), text_of(choice.get("text"))
        sampled, how = answered_ids(choice), None
        if sampled is None:
            if len(text) > MOST_CHARACTERS * most:
                asked = amount(most, "token")
                raise MalformedAnswerError(f"{len(text)} characters for {asked}")
            text = cut_behind_stop(text, decoding.stop)
            finish = "stop" if any(stop in text for stop in decoding.stop) else finish
            ids, how = self._encoded(text), RE_ENCODED
            if len(ids) > MOST_REENCODED * most:
                raise MalformedAnswerError(f"{len(ids)} tokens where {most} may come")
        else:
            ids = self._sampled(sampled, most)
        early = _end_of_early_stop(ids, decoding)
        if early is not None:
            ids, finish = ids[:early], "stop"
        elif finish == "stop":
            ids = self._ended(ids, choice, text, decoding, is_whole=how is None)
        if len(ids) > most:  # as it was encoded again
            ids, finish = ids[:most], "length"
        if not ids:
            return Completion((), None, reason="empty")
        can_end = bool(decoding.end_ids) or bool(decoding.stop)
        finished = True if finish == "stop" else (False if can_end else None)
        in_force = most if most < request.max_new_tokens else None
        asks = decoding.logprobs and how is None
        logprobs = answered_logprobs_of_ids(choice, len(ids)) if asks else None
        return Completion(ids, finished, tokens=how, max_new_tokens=in_force, logprobs=logprobs)

    def _encoded(self, text: str) -> Ids:
        """The ids of a text, as which it is trained."""
        try:
            return self.tokens.encode_data(text) if text else ()
        except Exception as error:  # whatever a tokenizer raises for characters that it has not
            raise MalformedAnswerError(
                f"the tokenizer refuses its text ({error!r:.100})"
            ) from error

    def _sampled(self, ids: Sequence[Any], most: int) -> Ids:
        """The ids that a server gives, checked."""
        if len(ids) > most:
            raise MalformedAnswerError(f"{len(ids)} ids where {most} may come")
        vocab = self.tokens.vocab
        for token in ids:
            if type(token) is not int or token < 0 or (vocab is not None and token >= vocab):
                raise MalformedAnswerError(f"{token!r:.40} is no id of the model's {vocab} tokens")
        return tuple(ids)

    def _ended(
        self, ids: Ids, choice: Mapping[str, Any], text: str, d: Decoding, *, is_whole: bool
    ) -> Ids:
        """The ids of an answer that ended by itself, with the end token that the text leaves out.

        is_whole: whether the ids are the server's own, so that an end token stands among them if it
        ended the answer. After a stop text stands none, nor after an end token that is not ours,
        nor where it is unknown what ended the answer.
        """
        says = [choice[name] for name in ENDED_BY if name in choice]
        if ids and ids[-1] in d.end_ids:
            return ids
        if says and type(says[0]) is int:
            return (*ids, says[0]) if says[0] in d.end_ids else ids
        if (says and is_whole) or _ended_by_text(says, text, ids, d):
            return ids
        return self.tokens.ended(ids)


def check_sampling(decoding: Decoding) -> None:
    """Raise ConfigError if no server can do what is asked."""
    functions = {"filter_fn": decoding.filter_fn, "stop_fn": decoding.stop_fn}
    for name, function in functions.items():
        if function is not None:
            raise ConfigError(
                f"{name} is a Python function, which no server can run. Leave it out of the "
                "stage's SamplingConfig, or use the local engine."
            )


def first_choice(answer: Body) -> Mapping[str, Any] | None:
    """The first choice in an answer; None if it has none."""
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, Mapping) else None


def text_of(value: Any) -> str:
    """A text of an answer, empty for None. Raises MalformedAnswerError if it is no sound text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedAnswerError(f"a text was expected, {type(value).__name__} came")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise MalformedAnswerError(f"a text with half a character: {error.reason}") from error
    return value


def word_of(finish: Any) -> str:
    """A finish reason of the API; MalformedAnswerError if it is no word."""
    if finish is None:
        return "none"
    if not isinstance(finish, str) or not WORD.fullmatch(finish):
        raise MalformedAnswerError(f"finish_reason {finish!r:.40} is no word")
    return finish


def cut_behind_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the end of the stop text that is complete first; all of it if there is none."""
    ends = [text.index(one) + len(one) for one in stop if one in text]
    return text[: min(ends)] if ends else text


def answered_ids(choice: Mapping[str, Any]) -> list[Any] | None:
    """The ids of an answer's tokens, given as ids or as names; None if the server gives neither.

    Raises MalformedAnswerError if they are no list.
    """
    ids = choice.get("token_ids")
    if ids is not None:
        return _list_of(ids)
    names = mapping_of(choice.get("logprobs")).get("tokens")
    if names is None or not all(_is_token_name(name) for name in _list_of(names)):
        return None
    return [_named_id(name) for name in names]


def answered_logprobs_of_ids(choice: Mapping[str, Any], count: int) -> tuple[float, ...] | None:
    """The log-probs of the first `count` ids of an answer; None if the server gives fewer.

    Raises MalformedAnswerError if they are no list of log-probs.
    """
    numbers = mapping_of(choice.get("logprobs")).get("token_logprobs")
    numbers = [] if numbers is None else _list_of(numbers)
    if len(numbers) < count:  # an end token may have been put after what was sampled
        return None
    return tuple(_logprob_of(number) for number in numbers[:count])


def answered_logprobs(answer: Body) -> dict[int, float] | None:
    """The log-probs at the first new token, by token id; None if the server gives none by id.

    Raises MalformedAnswerError if they cannot be log-probs.
    """
    tops = mapping_of((first_choice(answer) or {}).get("logprobs")).get("top_logprobs")
    first = mapping_of(next(iter(_list_of(tops)), None)) if tops is not None else {}
    if not first or not all(map(_is_token_name, first)):
        return None
    logprobs = {_named_id(name): _logprob_of(value) for name, value in first.items()}
    if math.fsum(map(math.exp, logprobs.values())) > 1 + LOG_PROB_ROUNDING:
        raise MalformedAnswerError("the probabilities of an answer's log-probs are more than 1")
    return logprobs


def named_logprobs(answer: Body) -> dict[int, float]:
    """The log-probs of the ids that were asked for at the first new token, as SGLang gives them.

    Raises MalformedAnswerError if they cannot be log-probs.
    """
    meta = mapping_of(answer.get("meta_info"))
    first = next(iter(_list_of(meta.get("output_token_ids_logprobs") or [])), None) or []
    found = {}
    for entry in _list_of(first):
        value, token, *_ = [*_list_of(entry), None, None]
        if type(token) is not int or token < 0:
            raise MalformedAnswerError(f"{token!r:.40} is no id")
        found[token] = _logprob_of(value)
    return found


def prompt_logprob(answer: Body, token: int) -> float | None:
    """The log-prob of the prompt's last token, which is `token`; None if the server gives none.

    Raises MalformedAnswerError if it cannot be a log-prob.
    """
    of_prompt = (first_choice(answer) or {}).get("prompt_logprobs")
    if of_prompt is None:
        return None
    of_last = mapping_of((_list_of(of_prompt) or [None])[-1])
    value = mapping_of(of_last.get(str(token))).get("logprob")
    return None if value is None else _logprob_of(value)


def _list_of(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise MalformedAnswerError(f"a list was expected, {type(value).__name__} came")
    return value


def mapping_of(value: Any) -> Mapping[str, Any]:
    """An object of an answer, empty for null."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise MalformedAnswerError(f"an object was expected, {type(value).__name__} came")
    return value


def _logprob_of(value: Any) -> float:
    """A log-prob: a number that is not above 0; -infinity for what cannot be."""
    if type(value) not in (int, float) or not value <= LOG_PROB_ROUNDING:
        raise MalformedAnswerError(f"{value!r:.40} is no log-prob")
    return min(float(value), 0.0)


def prompt_text(ids: Ids, tokens: Tokens) -> str | None:
    """A text that the tokenizer, and so the server, encodes as these ids; None if there is none."""
    if tokens.tokenizer is None:
        return None
    if not hasattr(tokens.source, "apply_chat_template"):
        with suppress(Exception):  # whatever a tokenizer raises for ids without a text
            text = tokens.tokenizer.decode(ids)
            return text if tokens.encode(text) == ids else None
        return None
    lead = len(tokens.tokenizer.begin_ids)
    for part in (ids, ids[lead:]):  # a begin token is written, or the encoding adds it
        text = tokens.source.decode(
            list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if tuple(tokens.source.encode(text)) == ids:
            return text
    return None


def find_abilities(client: HttpClient, model: str, tokens: Tokens, extra: Body) -> Abilities:
    """What a server takes and gives, found out with a few requests of one token each.

    Raises ServerError if it understands none of them, or is not there.
    """
    ids = _probe_ids(tokens)
    request, decoding = Request(ids, 0, 1), Decoding(end_ids=tokens.end_ids)
    refused: list[str] = []

    def answered(abilities: Abilities, more: Body) -> Mapping[str, Any] | None:
        """The choice that comes; None if the request is refused or cannot be written."""
        body = ServedModel(model, tokens, abilities, {**extra, **more}).body(request, decoding)
        answer = body if isinstance(body, Refusal) else client.try_out(PATH, body)
        if isinstance(answer, Refusal):
            refused.append(f"as {abilities.kind}: {answer.message[:300]}")
            return None
        return first_choice(answer) or {}

    for abilities in KINDS:
        choice = answered(abilities, {})
        if choice is None:
            continue
        if abilities.kind == "transformers" and answered(abilities, NONSENSE) is not None:
            continue  # what it does not know it ignores, so it may ignore the generation config
        understood = abilities
        if abilities.kind == "vllm" and "matched_stop" in choice:
            understood = replace(abilities, kind="sglang")
        by_name = replace(understood, gives_ids=True, by_name=True)
        if _gives_ids(choice):
            understood = replace(understood, gives_ids=True)
        elif abilities.takes_ids and _gives_ids(answered(by_name, {}) or {}):
            understood = by_name
        return _with_logprobs(client, ServedModel(model, tokens, understood, extra), ids)
    raise ServerError(
        f"the server {client.url} refuses a request for one token in every form:\n"
        + "\n".join(f"  {line}" for line in refused)
    )


def try_settings(client: HttpClient, served: ServedModel, decoding: Decoding) -> None:
    """Ask for one token with all settings of a Decoding.

    Raises ConfigError with the server's words if it refuses them, which would else be the answer to
    every request.
    """
    body = served.body(Request(_probe_ids(served.tokens), 0, 1), decoding)
    answer = body if isinstance(body, Refusal) else client.try_out(PATH, body)
    if isinstance(answer, Refusal) and answer.is_final:
        raise refused_settings(client, decoding, answer)


def refused_settings(
    client: HttpClient, asked: Decoding | SamplingConfig, answer: Refusal
) -> ConfigError:
    """The error for sampling settings with which a server answers nothing."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
    values = {name: getattr(asked, name) for name in names}
    shown = ", ".join(f"{name}={value!r}" for name, value in values.items() if value)
    return ConfigError(
        f"the server {client.url} refuses every request with the sampling settings {shown} "
        f"({answer.reason}): {answer.message[:500]}. Change them in the SamplingConfig, or change "
        "the server's own limits in its command or the request through extra=."
    )


def _gives_ids(choice: Mapping[str, Any]) -> bool:
    try:
        return answered_ids(choice) is not None
    except MalformedAnswerError:
        return False


def _probe_ids(tokens: Tokens) -> Ids:
    """The ids of the first requests' prompt."""
    for text in PROBES if tokens.tokenizer is not None else ():
        with suppress(Exception):  # whatever a tokenizer raises for unknown characters
            return tokens.prompt(text).ids
    return (0,)


def _with_logprobs(client: HttpClient, served: ServedModel, ids: Ids) -> Abilities:
    """The abilities of a served model, with those of its log-probs found out too."""
    without = served.abilities
    if not without.takes_ids:
        return without
    for exact in (True, False):
        abilities = replace(without, gives_chances=True, exact_chances=exact)
        asking = replace(served, abilities=abilities)
        answer = client.try_out(PATH, asking.chances_body(ids, PROBED_IDS, len(PROBED_IDS)))
        chances = None if isinstance(answer, Refusal) else _sound_logprobs(answer)
        if chances is not None and (not exact or {*PROBED_IDS} <= {*chances}):
            return abilities
    return without


def _sound_logprobs(answer: Body) -> dict[int, float] | None:
    try:
        return answered_logprobs(answer)
    except MalformedAnswerError:
        return None


def _decoding_fields(kind: str, d: Decoding, most: int) -> dict[str, Any]:
    """A Decoding in the fields of a kind of server, for `most` new tokens.

    All fields that the kind has are set, as otherwise its own defaults, or those of the model's
    generation config, would apply. vLLM ends an answer at the model's own end tokens too, unless
    told to ignore them; SGLang would then ignore those that are given as well.
    """
    stop = {"stop": list(d.stop)} if d.stop else {}
    top_p = 1.0 if d.top_p is None else d.top_p
    plain = {"temperature": d.temperature, "top_p": top_p, **stop}
    if kind == "plain":
        return plain
    least = min(d.min_new_tokens, most)
    if kind in ("vllm", "sglang"):
        own = {"include_stop_str_in_output": True, "ignore_eos": bool(d.end_ids)}
        return {
            **plain,
            **NEUTRAL_FIELDS,
            "top_k": -1 if d.top_k is None else d.top_k,
            "min_p": d.min_p or 0.0,
            "repetition_penalty": d.repetition_penalty,
            "min_tokens": least,
            "stop_token_ids": list(d.end_ids),
            "return_token_ids": True,
            **(own if kind == "vllm" else {"no_stop_trim": True}),
        }
    generation = {
        "do_sample": d.temperature > 0,
        "max_new_tokens": most,
        "min_new_tokens": least or None,
        "repetition_penalty": d.repetition_penalty,
        "eos_token_id": list(d.end_ids) or None,
        "pad_token_id": d.end_ids[0] if d.end_ids else None,
        "stop_strings": list(d.stop) or None,
    }
    if d.temperature > 0:
        generation |= {"temperature": d.temperature, "top_p": top_p}
        generation |= {"top_k": d.top_k or 0, "min_p": d.min_p}
    settings = {name: value for name, value in generation.items() if value is not None}
    return {"generation_config": json.dumps(settings)}


def _ended_by_text(says: Sequence[Any], text: str, ids: Ids, d: Decoding) -> bool:
    """Whether a stop text ended an answer, so that no end token belongs after it.

    Also if that is unknown, because the server removes stop texts from its answers and does not say
    what ended them. says: what it says about that.
    """
    if says and isinstance(says[0], str):
        return True
    if not d.stop:
        return False
    if any(stop in text for stop in d.stop) or (d.is_stop is not None and d.is_stop(ids)):
        return True
    return not says


def _end_of_early_stop(ids: Ids, d: Decoding) -> int | None:
    """How many ids there are up to a stop text within the first `min_new_tokens`; None without one.

    A stop text ends a response wherever it stands; a server may look for it only after those.
    """
    if d.is_stop is None:
        return None
    first = range(1, min(d.min_new_tokens, len(ids)) + 1)
    return next((n for n in first if d.is_stop(ids[:n])), None)


def _is_token_name(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(TOKEN_NAME)


def _named_id(name: str) -> int:
    number = name.removeprefix(TOKEN_NAME)
    if not (number.isascii() and number.isdigit() and len(number) < 10):
        raise MalformedAnswerError(f"{name!r:.40} names no token")
    return int(number)
