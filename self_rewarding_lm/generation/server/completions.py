"""What is sent to /v1/completions for a request, and how the answer is read.

Knows what each kind of server takes and gives; nothing of connections. There are three kinds:
`vllm`, which takes and gives token ids and has fields for all settings; `transformers`
(`transformers serve`), which takes text and a whole generation config; and `plain`, which has
OpenAI's own fields only.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, ServerError
from self_rewarding_lm.generation.engine import Completion, Decoding, Request
from self_rewarding_lm.generation.server.client import Body, HttpClient, Refusal
from self_rewarding_lm.records import Ids

PATH = "/completions"


TOKEN_NAME = "token_id:"
"""With return_tokens_as_token_ids vLLM names tokens like this, followed by their id."""


SEED_BITS = 31


RE_ENCODED = "re-encoded"


PROBES = ("Hello", "a", "1", " ")
"""Prompts of the first requests; the first one that the tokenizer can encode is used."""


@dataclass(frozen=True)
class Abilities:
    """What a server takes and gives.

    takes_ids: prompts as token ids. gives_ids: the ids of the answer's tokens. by_name: it gives
    them only as names of its log-probs' tokens. gives_chances: log-probs with the ids of their
    tokens. exact_chances: log-probs of the tokens that are asked for.
    """

    kind: Literal["vllm", "transformers", "plain"]
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


@dataclass(frozen=True)
class ServedModel:
    """A model on a server: the bodies of requests to it, and how its answers are read.

    model: its name there. extra: fields that are put into every body.
    """

    model: str
    tokens: Tokens
    abilities: Abilities
    extra: Mapping[str, Any]

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

    def body(self, request: Request, decoding: Decoding) -> Body | None:
        """What is posted for a request; None if its ids cannot be written as a text."""
        prompt = self.prompt(request.ids)
        if prompt is None:
            return None
        fields = {"model": self.model, "prompt": prompt, "max_tokens": request.max_new_tokens}
        fields["seed"] = request.key & (2**SEED_BITS - 1)
        fields |= _decoding_fields(self.abilities.kind, decoding, request)
        if self.abilities.by_name:
            fields |= {"logprobs": 0, "return_tokens_as_token_ids": True}
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
            neutral |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        return {"model": self.model, "prompt": list(ids), "max_tokens": 1, **neutral}

    def completion(self, answer: Body | Refusal, decoding: Decoding) -> Completion:
        """The completion in an answer; one without ids, with the reason, if there is none."""
        if isinstance(answer, Refusal):
            return Completion((), None, reason=answer.reason)
        choice = first_choice(answer)
        if choice is None:
            return Completion((), None, reason="no_choice")
        finish = choice.get("finish_reason")
        if finish not in ("stop", "length"):
            return Completion((), None, reason=f"finish_{finish}")
        text = str(choice.get("text") or "")
        sampled, how = answered_ids(choice), None
        if sampled is None:
            ids, how = self.tokens.encode_data(text) if text else (), RE_ENCODED
        else:
            ids = self.tokens.checked(sampled, "of the server's answer")
        if finish == "stop" and not _ended_by_text(choice, text, ids, decoding):
            ids = ids if ids and ids[-1] in decoding.end_ids else self.tokens.ended(ids)
        if not ids:
            return Completion((), None, reason="empty")
        can_end = bool(decoding.end_ids) or bool(decoding.stop)
        finished = True if finish == "stop" else (False if can_end else None)
        return Completion(tuple(ids), finished, tokens=how)


def check_sampling(decoding: Decoding) -> None:
    """Raise ConfigError if no server can do what is asked."""
    if decoding.filter_fn is not None:
        raise ConfigError(
            "filter_fn is a Python function of logits, which no server can run. Leave it out of "
            "the stage's SamplingConfig, or use the local engine."
        )


def first_choice(answer: Body) -> Mapping[str, Any] | None:
    """The first choice in an answer; None if it has none."""
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, Mapping) else None


def answered_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The ids of an answer's tokens, given as ids or as names; None if the server gives neither."""
    ids = choice.get("token_ids")
    if isinstance(ids, list):
        return ids
    names = (choice.get("logprobs") or {}).get("tokens")
    if not isinstance(names, list) or not all(_is_token_name(name) for name in names):
        return None
    return [int(name.removeprefix(TOKEN_NAME)) for name in names]


def answered_logprobs(answer: Body) -> dict[int, float] | None:
    """The log-probs at the first new token, by token id; None if the server gives none by id."""
    choice = first_choice(answer)
    tops = ((choice or {}).get("logprobs") or {}).get("top_logprobs")
    first = tops[0] if isinstance(tops, list) and tops else None
    if not isinstance(first, Mapping) or not first or not all(map(_is_token_name, first)):
        return None
    return {int(name.removeprefix(TOKEN_NAME)): float(value) for name, value in first.items()}


def prompt_logprob(answer: Body, token: int) -> float | None:
    """The log-prob of the prompt's last token, which is `token`; None if the server gives none."""
    of_prompt = (first_choice(answer) or {}).get("prompt_logprobs")
    of_last = of_prompt[-1] if isinstance(of_prompt, list) and of_prompt else None
    of_token = of_last.get(str(token)) if isinstance(of_last, Mapping) else None
    value = of_token.get("logprob") if isinstance(of_token, Mapping) else None
    return None if value is None else float(value)


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

    Raises ServerError if it understands none of them.
    """
    ids = _probe_ids(tokens)
    request, decoding = Request(ids, 0, 1), Decoding(end_ids=tokens.end_ids)
    refused: list[str] = []

    def gives_ids(abilities: Abilities) -> bool | None:
        """Whether an answer has ids; None if the request is refused or cannot be written."""
        body = ServedModel(model, tokens, abilities, extra).body(request, decoding)
        answer = client.ask_one(PATH, body) if body is not None else None
        if isinstance(answer, Refusal):
            refused.append(f"as {abilities.kind}: {answer.message[:300]}")
        if answer is None or isinstance(answer, Refusal):
            return None
        return answered_ids(first_choice(answer) or {}) is not None

    for abilities in KINDS:
        has_ids = gives_ids(abilities)
        if has_ids is None:
            continue
        by_name = replace(abilities, gives_ids=True, by_name=True)
        if not has_ids and abilities.takes_ids and gives_ids(by_name):
            understood = by_name
        else:
            understood = replace(abilities, gives_ids=has_ids)
        return _with_logprobs(client, ServedModel(model, tokens, understood, extra), ids)
    raise ServerError(
        f"the server {client.url} refuses a request for one token in every form:\n"
        + "\n".join(f"  {line}" for line in refused)
    )


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
        answer = client.ask_one(PATH, asking.chances_body(ids, PROBED_IDS, len(PROBED_IDS)))
        chances = None if isinstance(answer, Refusal) else answered_logprobs(answer)
        if chances is not None and (not exact or {*PROBED_IDS} <= {*chances}):
            return abilities
    return without


def _decoding_fields(kind: str, d: Decoding, request: Request) -> dict[str, Any]:
    """A Decoding in the fields of a kind of server.

    All fields that the kind has are set, as otherwise its own defaults, or those of the model's
    generation config, would apply.
    """
    stop = {"stop": list(d.stop)} if d.stop else {}
    top_p = 1.0 if d.top_p is None else d.top_p
    plain = {"temperature": d.temperature, "top_p": top_p, **stop}
    if kind == "plain":
        return plain
    if kind == "vllm":
        return {
            **plain,
            "top_k": -1 if d.top_k is None else d.top_k,
            "min_p": d.min_p or 0.0,
            "repetition_penalty": d.repetition_penalty,
            "min_tokens": d.min_new_tokens,
            "stop_token_ids": list(d.end_ids),
            "include_stop_str_in_output": True,
            "return_token_ids": True,
        }
    generation = {
        "do_sample": d.temperature > 0,
        "max_new_tokens": request.max_new_tokens,
        "min_new_tokens": d.min_new_tokens or None,
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


def _ended_by_text(choice: Mapping[str, Any], text: str, ids: Ids, d: Decoding) -> bool:
    """Whether a stop text ended an answer, so that no end token belongs after it.

    Also if that is unknown, because the server removes stop texts from its answers and does not say
    what ended them.
    """
    if not d.stop:
        return False
    if isinstance(choice.get("stop_reason"), str) or any(stop in text for stop in d.stop):
        return True
    if d.is_stop is not None and d.is_stop(ids):
        return True
    return "stop_reason" not in choice and not (ids and ids[-1] in d.end_ids)


def _is_token_name(name: Any) -> bool:
    return isinstance(name, str) and name.removeprefix(TOKEN_NAME).isdecimal() and ":" in name
