"""What is sent to /v1/completions for a request, and what is made of the answer.

Knows what kinds of servers understand and give; nothing of connections. Three kinds: `vllm`, which
takes and gives token ids and has fields for all settings; `transformers` (`transformers serve`),
which takes text and a whole generation config; `plain`, OpenAI's own fields alone.
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
"""With return_tokens_as_token_ids vLLM names tokens so, with their number behind it."""


SEED_BITS = 31


RE_ENCODED = "re-encoded"


PROBES = ("Hello", "a", "1", " ")
"""Prompts of trials; the first that the tokenizer knows is taken."""


@dataclass(frozen=True)
class Abilities:
    """What was found out about a server. takes_ids: prompts as token ids. gives_ids: the answer's
    tokens by id, by_name: in the names of its log-probs' tokens only. gives_chances: log-probs with
    tokens by id; exact_chances: those of tokens that are asked for."""

    kind: Literal["vllm", "transformers", "plain"]
    takes_ids: bool
    gives_ids: bool = False
    by_name: bool = False
    gives_chances: bool = False
    exact_chances: bool = False

    def in_words(self) -> str:
        taken = "token ids" if self.takes_ids else "text"
        given = "token ids" if self.gives_ids else "text, which is encoded once"
        chances = "exact" if self.exact_chances else "the likeliest tokens'"
        found = chances if self.gives_chances else "no"
        return f"a server of kind {self.kind}: {taken} in, {given} out, {found} log-probs"


KINDS = (
    Abilities("vllm", takes_ids=True),
    Abilities("transformers", takes_ids=False),
    Abilities("plain", takes_ids=True),
    Abilities("plain", takes_ids=False),
)
"""In this order they are tried; the first that is understood is taken."""


PROBED = (0, 1)


@dataclass(frozen=True)
class Speaker:
    """One model behind one server, and how it is spoken to. extra: fields for every body."""

    model: str
    tokens: Tokens
    abilities: Abilities
    extra: Mapping[str, Any]

    def check(self, decoding: Decoding) -> None:
        """ConfigError where the server has no field for a setting."""
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
        """What is posted for a request; None where its ids cannot be written as a text."""
        prompt = self.prompt(request.ids)
        if prompt is None:
            return None
        seed = request.key & (2**SEED_BITS - 1)
        own = {"model": self.model, "prompt": prompt, "max_tokens": request.max_new_tokens}
        own["seed"] = seed
        own |= _settings(self.abilities.kind, decoding, request)
        if self.abilities.by_name:
            own |= {"logprobs": 0, "return_tokens_as_token_ids": True}
        return {**own, **self.extra}

    def prompt(self, ids: Ids) -> list[int] | str | None:
        """Ids as the server takes them; None where no text has these ids."""
        return list(ids) if self.abilities.takes_ids else prompt_text(ids, self.tokens)

    def chances_body(self, ids: Ids, wanted: Sequence[int], top: int) -> Body:
        """Asks what follows ids: the log-probs of `wanted` tokens, or of the `top` likeliest."""
        exact = {"logprob_token_ids": list(wanted)} if self.abilities.exact_chances else {}
        fields = {"logprobs": max(1, len(wanted)) if exact else top, **exact}
        return {**self._scored(ids), **fields, "return_tokens_as_token_ids": True, **self.extra}

    def scoring_body(self, ids: Ids) -> Body:
        """Asks for the log-probs of ids themselves."""
        return {**self._scored(ids), "prompt_logprobs": 0, **self.extra}

    def _scored(self, ids: Ids) -> dict[str, Any]:
        """One token more, with nothing that changes probabilities."""
        plain = {"temperature": 1.0, "top_p": 1.0, "seed": 0}
        if self.abilities.kind == "vllm":
            plain |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        return {"model": self.model, "prompt": list(ids), "max_tokens": 1, **plain}

    def completion(self, answer: Body | Refusal, decoding: Decoding) -> Completion:
        """What an answer holds; without ids and with a reason where that is nothing."""
        if isinstance(answer, Refusal):
            return Completion((), None, reason=answer.reason)
        choice = first_choice(answer)
        if choice is None:
            return Completion((), None, reason="no_choice")
        finish = choice.get("finish_reason")
        if finish not in ("stop", "length"):
            return Completion((), None, reason=f"finish_{finish}")
        text = str(choice.get("text") or "")
        given, how = given_ids(choice), None
        if given is None:
            ids, how = self.tokens.encode_data(text) if text else (), RE_ENCODED
        else:
            ids = self.tokens.checked(given, "of the server's answer")
        if finish == "stop" and not _by_text(choice, text, ids, decoding):
            ids = ids if ids and ids[-1] in decoding.end_ids else self.tokens.ended(ids)
        if not ids:
            return Completion((), None, reason="empty")
        can_end = bool(decoding.end_ids) or bool(decoding.stop)
        finished = True if finish == "stop" else (False if can_end else None)
        return Completion(tuple(ids), finished, tokens=how)


def check_sampling(decoding: Decoding) -> None:
    """ConfigError where no server can do what is asked."""
    if decoding.filter_fn is not None:
        raise ConfigError(
            "filter_fn is a Python function of logits, which no server can run. Leave it out of "
            "the stage's SamplingConfig, or use the local engine."
        )


def first_choice(answer: Body) -> Mapping[str, Any] | None:
    choices = answer.get("choices")
    found = choices[0] if isinstance(choices, list) and choices else None
    return found if isinstance(found, Mapping) else None


def given_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The ids of an answer's tokens where the server says them, one way or the other."""
    ids = choice.get("token_ids")
    if isinstance(ids, list):
        return ids
    names = (choice.get("logprobs") or {}).get("tokens")
    if not isinstance(names, list) or not all(_is_named(name) for name in names):
        return None
    return [int(name.removeprefix(TOKEN_NAME)) for name in names]


def given_chances(answer: Body) -> dict[int, float] | None:
    """Log-probs of the first new token, by token id; None where the server gives none so."""
    choice = first_choice(answer)
    tops = ((choice or {}).get("logprobs") or {}).get("top_logprobs")
    first = tops[0] if isinstance(tops, list) and tops else None
    if not isinstance(first, Mapping) or not first or not all(map(_is_named, first)):
        return None
    return {int(name.removeprefix(TOKEN_NAME)): float(value) for name, value in first.items()}


def given_score(answer: Body, token: int) -> float | None:
    """The log-prob of the prompt's last token, where the server gives it."""
    scored = (first_choice(answer) or {}).get("prompt_logprobs")
    last = scored[-1] if isinstance(scored, list) and scored else None
    found = last.get(str(token)) if isinstance(last, Mapping) else None
    value = found.get("logprob") if isinstance(found, Mapping) else None
    return None if value is None else float(value)


def prompt_text(ids: Ids, tokens: Tokens) -> str | None:
    """A text that a server which encodes it as the tokenizer does reads as these ids."""
    if tokens.tokenizer is None:
        return None
    if not hasattr(tokens.source, "apply_chat_template"):
        with suppress(Exception):  # whatever a tokenizer raises for ids without a text
            text = tokens.tokenizer.decode(ids)
            return text if tokens.encode(text) == ids else None
        return None
    lead = len(tokens.tokenizer.lead)
    for part in (ids, ids[lead:]):  # the begin token is put there by who encodes, or is written
        text = tokens.source.decode(
            list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if tuple(tokens.source.encode(text)) == ids:
            return text
    return None


def find_abilities(client: HttpClient, model: str, tokens: Tokens, extra: Body) -> Abilities:
    """Try what a server understands, with a few requests of one token each.

    Raises ServerError where it understands none of them.
    """
    ids = _probe(tokens)
    request, decoding = Request(ids, 0, 1), Decoding(end_ids=tokens.end_ids)
    refused: list[str] = []

    def gives_ids(abilities: Abilities) -> bool | None:
        """Whether an answer has ids; None where the request is refused or cannot be written."""
        body = Speaker(model, tokens, abilities, extra).body(request, decoding)
        answer = client.ask_one(PATH, body) if body is not None else None
        if isinstance(answer, Refusal):
            refused.append(f"as {abilities.kind}: {answer.message[:300]}")
        if answer is None or isinstance(answer, Refusal):
            return None
        return given_ids(first_choice(answer) or {}) is not None

    for abilities in KINDS:
        given = gives_ids(abilities)
        if given is None:
            continue
        found = replace(abilities, gives_ids=given)
        named = replace(abilities, gives_ids=True, by_name=True)
        if not given and abilities.takes_ids and gives_ids(named):
            found = named
        return _with_chances(client, Speaker(model, tokens, found, extra), ids)
    raise ServerError(
        f"the server {client.url} refuses a request for one token in every form:\n"
        + "\n".join(f"  {line}" for line in refused)
    )


def _probe(tokens: Tokens) -> Ids:
    for text in PROBES if tokens.tokenizer is not None else ():
        with suppress(Exception):  # whatever a tokenizer raises for unknown characters
            return tokens.prompt(text).ids
    return (0,)


def _with_chances(client: HttpClient, speaker: Speaker, ids: Ids) -> Abilities:
    """The abilities, and whether log-probs come by token id, and those of named tokens."""
    found = speaker.abilities
    if not found.takes_ids:
        return found
    for exact in (True, False):
        abilities = replace(found, gives_chances=True, exact_chances=exact)
        asking = replace(speaker, abilities=abilities)
        answer = client.ask_one(PATH, asking.chances_body(ids, PROBED, len(PROBED)))
        chances = None if isinstance(answer, Refusal) else given_chances(answer)
        if chances is not None and (not exact or {*PROBED} <= {*chances}):
            return abilities
    return found


def _settings(kind: str, d: Decoding, request: Request) -> dict[str, Any]:
    """A Decoding in the fields of a kind of server. All that a kind has are set, for else its own
    defaults, or those of the model's generation config, would hold."""
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
        chosen = {"temperature": d.temperature, "top_p": top_p, "top_k": d.top_k or 0}
        generation |= {**chosen, "min_p": d.min_p}
    given = {name: value for name, value in generation.items() if value is not None}
    return {"generation_config": json.dumps(given)}


def _by_text(choice: Mapping[str, Any], text: str, ids: Ids, d: Decoding) -> bool:
    """Whether a stop text ended an answer, so that no end token belongs behind it.

    Where a server takes stop texts out of its answers and does not say what ended them, it is not
    known; then none is put there.
    """
    if not d.stop:
        return False
    if isinstance(choice.get("stop_reason"), str) or any(stop in text for stop in d.stop):
        return True
    if d.is_stop is not None and d.is_stop(ids):
        return True
    return "stop_reason" not in choice and not (ids and ids[-1] in d.end_ids)


def _is_named(name: Any) -> bool:
    return isinstance(name, str) and name.removeprefix(TOKEN_NAME).isdecimal() and ":" in name
