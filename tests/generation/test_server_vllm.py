"""The fake server's vLLM against vLLM's own code: its fields, its limits, what ends an answer.

And our commands to a server that is kept, against vLLM's own paths in front of an engine that notes
what it is asked.

It needs the vllm wheel, without its CUDA packages: what is imported runs on a CPU.
"""

import threading
import time
from contextlib import contextmanager
from itertools import cycle, product
from pathlib import Path
from types import SimpleNamespace

import pytest

from self_rewarding_lm.generation.server.process import LaunchedServer
from self_rewarding_lm.generation.server.reloading import VllmReload
from tests.support.fake_server import END, letters_of, refusal, text_of, worked

pytestmark = pytest.mark.slow


def of_vllm(ids, body):
    """What vLLM makes of a body, or what it says; as `worked` and `refusal` of the fake server."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.core.sched.utils import check_stop
    from vllm.v1.engine.detokenizer import check_stop_strings
    from vllm.v1.request import RequestStatus

    try:
        asked = CompletionRequest(model="toy", prompt=list(ids), **body)
        assert not asked.model_extra  # it knows all our fields
        params = asked.to_sampling_params(body["max_tokens"], {})
    except (ValueError, VLLMValidationError) as error:
        return str(error)
    params.update_from_generation_config({"eos_token_id": [END]}, END)
    request = SimpleNamespace(
        pooling_params=None,
        sampling_params=params,
        output_token_ids=[],
        max_tokens=params.max_tokens,
        status=None,
        stop_reason=None,
    )
    new = request.output_token_ids
    for token in cycle([*letters_of(ids, body["seed"]), END]):
        if len(new) < params.min_tokens and token in params.all_stop_token_ids:
            continue  # its logit is -infinity
        new.append(token)
        request.num_output_tokens = len(new)
        request.num_tokens = len(ids) + len(new)
        ended = check_stop(request, 10**6)
        if len(new) > params.min_tokens and params.stop:
            fresh = len(text_of(new)) - len(text_of(new[: max(params.min_tokens, len(new) - 1)]))
            found = check_stop_strings(text_of(new), fresh, params.stop, True)
            if found is not None:
                return new, "stop", found[0]
        if ended:
            is_stop = request.status == RequestStatus.FINISHED_STOPPED
            return new, "stop" if is_stop else "length", request.stop_reason
    return None


def test_the_fake_server_ends_answers_where_vllm_does():
    pytest.importorskip("vllm")
    compared = 0
    settings = product(
        range(5),  # the seed: how many letters there are
        ([], [END], [3], [5, END]),  # end tokens that are given
        (None, ["c"], ["cd", "e"], ["bcd"], list("abcde")),
        (0, 1, 3, 6, 9),
        (False, True),
        (1.0, 2.0, 2.5),
    )
    for seed, ends, stop, least, ignores, temperature in settings:
        body = {"max_tokens": 8, "seed": seed, "stop_token_ids": ends, "min_tokens": least}
        body |= {"temperature": temperature, "ignore_eos": ignores, "top_k": -1, "min_p": 0.0}
        body |= {"include_stop_str_in_output": True, "return_token_ids": True}
        body |= {"stop": stop} if stop else {}
        theirs, ours = of_vllm((0,), body), refusal(body, "vllm")
        if ours is not None or isinstance(theirs, str):
            assert ours is not None and isinstance(theirs, str), (body, theirs, ours)
        else:
            new, finish, by = worked((0,), body, "vllm")
            assert (theirs[0], theirs[1], theirs[2]) == (new, finish, by), body
        compared += 1
    assert compared == 5 * 4 * 5 * 5 * 2 * 3


class NotingEngine:
    """What stands behind vLLM's paths: it does nothing and notes what it is asked."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        async def note(*args, **named):
            self.asked.append((name, args, named))
            return [None] if name == "collective_rpc" else name != "is_sleeping"

        return note


@contextmanager
def vllm_paths(engine):
    """vLLM's own paths of sleeping, reloading and adapters, served on a port."""
    uvicorn, fastapi = pytest.importorskip("uvicorn"), pytest.importorskip("fastapi")
    from importlib import import_module

    app = fastapi.FastAPI()
    app.state.engine_client = engine
    for part in ("sleep", "cache", "rpc"):
        import_module(f"vllm.entrypoints.serve.dev.{part}.api_router").attach_router(app)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    launched = LaunchedServer(
        "x {checkpoint} {port}", Path("unused"), start_timeout=30, stop_timeout=1
    )
    launched.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield lambda path, body: launched.order(path, body, None)
    finally:
        server.should_exit = True
        thread.join()


def test_the_commands_to_a_kept_server_are_those_that_vllm_knows():
    pytest.importorskip("vllm")
    pytest.importorskip("vllm.entrypoints.serve.dev.sleep.api_router")
    engine, reload = NotingEngine(), VllmReload()
    with vllm_paths(engine) as order:
        reload.sleep(order, is_adapter=False)
        reload.wake(order, Path("/weights"), None)
        reload.sleep(order, is_adapter=True)
    assert engine.asked == [
        ("sleep", (2, "abort"), {}),
        ("wake_up", (["weights"],), {}),
        (
            "collective_rpc",
            (),
            {"method": "reload_weights", "timeout": None, "args": (), "kwargs": {}},
        ),
        ("wake_up", (["kv_cache"],), {}),
        ("reset_prefix_cache", (False, False), {}),
        ("sleep", (1, "abort"), {}),
    ]


def test_an_adapter_is_loaded_in_place_by_a_request_that_vllm_reads():
    pytest.importorskip("vllm")
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

    sent = {}

    def order(path, body):
        sent[path] = body

    VllmReload().wake(order, Path("/weights"), "policy")
    read = LoadLoRAAdapterRequest(**sent["/v1/load_lora_adapter"])
    assert (read.lora_name, read.lora_path, read.load_inplace) == ("policy", "/weights", True)
    assert set(sent["/v1/load_lora_adapter"]) <= set(LoadLoRAAdapterRequest.model_fields)
    assert list(sent) == ["/wake_up", "/v1/load_lora_adapter", "/reset_prefix_cache"]
