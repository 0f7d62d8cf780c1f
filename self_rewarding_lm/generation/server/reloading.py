"""How a server that goes on running sleeps and takes other weights: vLLM's way and SGLang's.

Knows the paths of each, in which order they must be called, and how each is asked for log-probs by
token id; nothing of processes and of what the weights are.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from self_rewarding_lm.errors import ConfigError, ServerError
from self_rewarding_lm.generation.server.client import Body, HttpClient, Refusal
from self_rewarding_lm.generation.server.completions import (
    PATH,
    MalformedAnswerError,
    ServedModel,
    answered_logprobs,
    named_logprobs,
)
from self_rewarding_lm.records import Ids

Order = Callable[[str, Body], Any]
"""Posts a command to a server; what it answers. Raises ServerError if the server refuses it."""


Logprobs = Mapping[int, float]
"""By token id."""


RESETS, RESET_SECONDS = 20, 0.5
"""How often vLLM is asked to forget its prefixes, which it does not while one is in use."""


LIKELIEST = 20
"""Tokens whose log-probs are asked for where none can be asked for by id."""


@runtime_checkable
class Reload(Protocol):
    """What a kind of server does to sleep and to take other weights.

    flag: what its command must have. environment: variables that its process needs.
    """

    flag: str
    environment: Mapping[str, str]

    def sleep(self, order: Order, *, is_adapter: bool) -> None:
        """Let go of the device's memory; of a model below an adapter nothing may be lost."""
        ...

    def wake(self, order: Order, folder: Path, adapter: str | None) -> None:
        """Take the memory again, and the weights in a folder.

        adapter: its name on the server, if the folder holds one; else a whole model is there.
        """
        ...

    def logprobs(
        self, client: HttpClient, served: ServedModel, rows: Sequence[Ids], tokens: Sequence[int]
    ) -> list[Logprobs]:
        """What follows each row, at temperature 1: the log-probs of tokens, or the likeliest ones.

        Raises ServerError if a request is refused, ConfigError if no ids are named.
        """
        ...


class VllmReload:
    """`vllm serve ... --enable-sleep-mode` in dev mode (vLLM 0.33: entrypoints/serve/dev)."""

    flag = "--enable-sleep-mode"
    environment: Mapping[str, str] = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }

    def sleep(self, order: Order, *, is_adapter: bool) -> None:
        order(f"/sleep?level={1 if is_adapter else 2}", {})  # 2 drops the weights, 1 moves them

    def wake(self, order: Order, folder: Path, adapter: str | None) -> None:
        if adapter is None:
            order("/wake_up?tags=weights", {})
            order("/collective_rpc", {"method": "reload_weights"})
            order("/wake_up?tags=kv_cache", {})
        else:
            order("/wake_up", {})
            content = {"lora_name": adapter, "lora_path": str(folder), "load_inplace": True}
            order("/v1/load_lora_adapter", content)
        for _ in range(RESETS):
            answer = order("/reset_prefix_cache", {})
            if not isinstance(answer, Mapping) or answer.get("success", True):
                return
            time.sleep(RESET_SECONDS)
        raise ServerError("vLLM keeps its prefix cache (/reset_prefix_cache: success is false).")

    def logprobs(
        self, client: HttpClient, served: ServedModel, rows: Sequence[Ids], tokens: Sequence[int]
    ) -> list[Logprobs]:
        if not served.abilities.gives_chances:
            raise ConfigError(
                "reload='vllm' compares the server's log-probs with the model's own, and the "
                f"server {client.url} names none by token id. Leave reload out: then each stage "
                "starts a server."
            )
        bodies = [served.chances_body(row, tokens, LIKELIEST) for row in rows]
        return _asked(client, PATH, bodies, lambda answer: answered_logprobs(answer) or {})


class SglangReload:
    """`sglang.launch_server ... --enable-memory-saver` (SGLang 0.5.23: entrypoints/http_server)."""

    flag = "--enable-memory-saver"
    environment: Mapping[str, str] = {}

    def sleep(self, order: Order, *, is_adapter: bool) -> None:
        # what it lets go of is lost: of a model below an adapter that may be the cache alone
        tags = ["kv_cache"] if is_adapter else ["kv_cache", "weights"]
        order("/release_memory_occupation", {"tags": tags})

    def wake(self, order: Order, folder: Path, adapter: str | None) -> None:
        if adapter is None:
            order("/resume_memory_occupation", {"tags": ["weights"]})
            order("/update_weights_from_disk", {"model_path": str(folder)})
            order("/resume_memory_occupation", {"tags": ["kv_cache"]})
        else:
            order("/resume_memory_occupation", {"tags": ["kv_cache"]})
            order("/unload_lora_adapter", {"lora_name": _after_colon(adapter)})
            content = {"lora_name": _after_colon(adapter), "lora_path": str(folder)}
            order("/load_lora_adapter", content)
        order("/flush_cache", {})

    def logprobs(
        self, client: HttpClient, served: ServedModel, rows: Sequence[Ids], tokens: Sequence[int]
    ) -> list[Logprobs]:
        adapter = {"lora_path": _after_colon(served.model)} if ":" in served.model else {}
        bodies = [
            {
                "input_ids": list(row),
                "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
                "return_logprob": True,
                "token_ids_logprob": list(tokens),
                **adapter,
            }
            for row in rows
        ]
        return _asked(client, f"{client.url}/generate", bodies, named_logprobs)


RELOADS: Mapping[str, Reload] = {"vllm": VllmReload(), "sglang": SglangReload()}


ReloadName = Literal["vllm", "sglang"]


def _after_colon(model: str) -> str:
    """An adapter's own name: to SGLang's requests it is BASE:NAME."""
    return model.rpartition(":")[2]


def _asked(
    client: HttpClient, path: str, bodies: Sequence[Body], read: Callable[[Body], Logprobs]
) -> list[Logprobs]:
    """What comes of bodies that are sent one by one: in other batches other numbers would come."""
    found: list[Logprobs] = [{} for _ in bodies]
    for place, answer in client.ask(path, bodies, at_once=1):
        if isinstance(answer, Refusal):
            raise ServerError(
                f"the server {client.url} gives no log-probs, by which it would be known whose "
                f"weights it has ({answer.reason}): {answer.message[:500]}"
            )
        try:
            found[place] = read(answer)
        except MalformedAnswerError as problem:
            raise ServerError(
                f"the server {client.url} gives no log-probs: {problem}."
            ) from problem
    return found
