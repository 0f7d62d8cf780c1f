"""A small inference server that behaves as it is told, and badly where it is told.

Its "model" is known by hand: after ids that end in x it writes the letters x+1, x+2, ... of the
alphabet, 1 + seed % 5 of them, then its end token. As a program it serves a folder:
`python tests/support/fake_server.py FOLDER PORT [slow] [stubborn] [broken]`. With
--enable-sleep-mode (as vLLM) or --enable-memory-saver (as SGLang) it keeps the weights in FOLDER, a
table of logits by the last token, until it is given others, and refuses commands out of order.
`stale`: it takes those that it began with again. `remembers`: it keeps its prefix cache. `spoils`: it takes
them wrongly.
"""

import array
import hashlib
import itertools
import json
import math
import os
import signal
import string
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

ALPHABET = string.ascii_lowercase + string.digits + " :.<>?S\n"
"""Of tests.support.models, whose import takes seconds."""
END = len(ALPHABET)
VOCAB = END + 1
MOST_TOKENS = 200
OPENAI_FIELDS = {
    *("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"),
}


def letters_of(ids, seed):
    return [(ids[-1] + 1 + i) % 26 for i in range(1 + seed % 5)]


def reply_ids(ids, seed, max_tokens):
    """What the model writes, and why it ends there."""
    whole = [*letters_of(ids, seed), END]
    return (whole, "stop") if len(whole) <= max_tokens else (whole[:max_tokens], "length")


def text_of(ids):
    return "".join(ALPHABET[i] for i in ids if i != END)


def worked(ids, body, kind):
    """What vLLM and SGLang make of a request whose model repeats its letters and its end token.

    New ids, why they end, and what ended them: a text, an id, or None for the model's own end token
    on vLLM.
    """
    ends, new = body.get("stop_token_ids") or (), []
    ignores = body.get("ignore_eos", False)
    least = body.get("min_tokens", 0) if kind == "vllm" else 0  # for stop texts
    for token in itertools.cycle([*letters_of(ids, body["seed"]), END]):
        is_end = (token == END and not ignores) or (
            token in ends and not (ignores and kind != "vllm")
        )
        if (token == END or token in ends) and len(new) < body.get("min_tokens", 0):
            continue  # it is not drawn
        new.append(token)
        for stop in body.get("stop") or ():
            if len(new) > least and text_of(new).find(stop, max(0, least - len(stop) + 1)) >= 0:
                return new, "stop", stop
        if is_end:
            return new, "stop", token if token != END or kind != "vllm" or ignores else None
        if len(new) == body["max_tokens"]:
            return new, "length", None
    return None


def refusal(body, kind):
    """What vLLM 0.33 and SGLang 0.5.23 say of settings that they do not take."""
    most = body.get("max_tokens", 16)
    if kind == "vllm" and not 0 <= body["temperature"] <= 2:
        return f"temperature must be in [0, 2], got {body['temperature']}."
    if len(body.get("stop") or ()) > (4 if kind == "vllm" else 32):
        return "body -> stop: List should have at most 4 items after validation"
    if most < 1:
        return f"max_tokens must be at least 1, got {most}."
    if body.get("min_tokens", 0) > most:
        return f"min_tokens must be less than or equal to max_tokens={most}"
    return None


def distribution(ids):
    """The probability of each next token: unlike, and a function of the last two ids."""
    a, b = ids[-1], ids[-2] if len(ids) > 1 else 0
    weights = [1.0 + ((t * 7 + a * 3 + b) % 11) ** 3 for t in range(VOCAB)]
    return [w / sum(weights) for w in weights]


class RefusedError(Exception):
    """A command that comes when it must not."""


class Kept:
    """Weights of a server that goes on running, its cache, and what of it is on the device.

    kind: whose commands it knows. folder: what it was started on. how: what it does wrong. Each
    command is appended to orders.jsonl.
    """

    def __init__(self, kind, folder, how):
        self.kind, self.folder, self.how = kind, Path(folder), how
        self.log = self.folder.parent.parent / "orders.jsonl"
        self.on_device = {"weights", "kv_cache"}
        self.is_adapter = (self.folder / "adapter_model.safetensors").exists()
        self.adapters = {"policy"} if self.is_adapter else set()
        self.cache = {}
        self.first = self.table = table_of(self.folder)

    def distribution(self, ids):
        """Of the next token; what the cache has of these ids is not computed again."""
        key = tuple(ids)
        if key not in self.cache:
            row = [0.0] * VOCAB if self.table is None else self.table[ids[-1]]
            most = max(row)
            weights = [math.exp(x - most) for x in row]
            self.cache[key] = [w / sum(weights) for w in weights]
        return self.cache[key]

    def take(self, folder):
        self.table = self.first if "stale" in self.how else table_of(Path(folder))
        if "spoils" in self.how:
            self.table = [[3.0 * x for x in reversed(row)] for row in self.table]

    def forget(self):
        if "remembers" not in self.how:
            self.cache = {}

    def must(self, holds, words):
        if not holds:
            raise RefusedError(words)

    def order(self, path, query, body):
        """What a command is answered with; None if there is no such path."""
        known = self.of_vllm if self.kind == "vllm" else self.of_sglang
        with self.log.open("a") as file:
            file.write(json.dumps([path, query, body]) + "\n")
        return known(path, query, body)

    def of_vllm(self, path, query, body):
        is_dev = os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
        if path == "/v1/load_lora_adapter" and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            self.must("weights" in self.on_device, "the engine sleeps")
            is_known = body["lora_name"] in self.adapters
            self.must(body["load_inplace"] or not is_known, "has already been loaded")
            self.take(body["lora_path"])
            return f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if not is_dev:
            return None
        if path == "/sleep":
            self.must(len(self.on_device) == 2, "it sleeps already")
            if query["level"] == "2":
                self.table = None
            self.on_device = set()
            self.forget()
            return {"status": "sleeping"}
        if path == "/wake_up":
            tags = {query["tags"]} if "tags" in query else {"weights", "kv_cache"}
            self.must(not tags & self.on_device, "it is awake")
            self.on_device |= tags
            return {"status": "awake" if len(self.on_device) == 2 else "sleeping"}
        if path == "/collective_rpc":
            self.must("weights" in self.on_device, "CUDA error: an illegal memory access")
            self.must(body["method"] == "reload_weights", "no such method")
            self.take(self.folder)
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            self.forget()
            return {"success": len(self.on_device) == 2}
        return None

    def of_sglang(self, path, query, body):
        if path == "/release_memory_occupation":
            self.must({*body["tags"]} <= self.on_device, "it is released already")
            self.on_device -= {*body["tags"]}
            if "weights" in body["tags"]:
                self.table = None
            self.forget()
            return "null"
        if path == "/resume_memory_occupation":
            self.must(not {*body["tags"]} & self.on_device, "KeyError")
            self.on_device |= {*body["tags"]}
            return "null"
        if path == "/update_weights_from_disk":
            self.must("weights" in self.on_device and not self.is_adapter, "no memory for weights")
            self.take(body["model_path"])
            return {"success": True, "message": "", "num_paused_requests": 0}
        if path == "/unload_lora_adapter":
            self.must(body["lora_name"] in self.adapters, "no such adapter")
            self.adapters.remove(body["lora_name"])
            return {"success": True}
        if path == "/load_lora_adapter":
            self.must(body["lora_name"] not in self.adapters, "already loaded")
            self.adapters.add(body["lora_name"])
            self.take(body["lora_path"])
            return {"success": True}
        if path == "/flush_cache":
            self.forget()
            return "Cache flushed."
        return None


def table_of(folder):
    """The numbers of the tensor `table` in a folder of weights, by rows."""
    names = ("adapter_model.safetensors", "model.safetensors")
    [file] = [folder / name for name in names if (folder / name).exists()]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    [entry] = [entry for name, entry in header.items() if name.endswith("table")]
    begin, end = entry["data_offsets"]
    numbers = array.array("f", data[8 + length :][begin:end])
    return [list(numbers[n : n + VOCAB]) for n in range(0, len(numbers), VOCAB)]


class FakeServer(ThreadingHTTPServer):
    """kind: "vllm" and "sglang" take and give ids and know all fields; "transformers" takes text and
    its own fields; "ids" and "text" take OpenAI's fields alone; "llama.cpp" takes text,
    breaks at ids, and ignores what it does not know. gives: "ids", "names" or nothing but
    text. scores: "exact", "top" or None. fault: (try number of this body, body) -> what goes wrong:
    a status, headers too, a word, bytes that are sent, or what stands in the one choice. max_len:
    what /v1/models says.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, port=0, *, kind="vllm", gives="ids", scores="exact", fault=None, model="toy"
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.kind, self.gives, self.scores = kind, gives, scores
        self.fault = fault or (lambda attempt, body: None)
        self.model, self.most_top = model, 20
        self.max_len = None
        self.listed = None  # bytes in place of the list of models
        self.refusal_words = "told to say"
        self.prompt_scores = True
        self.kept = None
        self.seen, self.answered, self.tries = [], Counter(), Counter()
        self.in_flight = self.most_in_flight = 0
        self.says, self.ends = lambda body: "Score: 3", lambda body: "stop"
        self.lock = threading.Lock()
        self.released = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.shutdown()
        self.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def real(self):
        """The bodies that were no trial of one token."""
        return [b for b in self.seen if b.get("max_tokens", 2) > 1]

    def handle_error(self, request, client_address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        card = {"id": self.server.model, "max_model_len": self.server.max_len}
        if self.server.listed is not None:
            return self.send_bytes(200, self.server.listed)
        return self.send(200, {"data": [card]} if self.path.endswith("/models") else {})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if server.kept is not None and self.ordered(server.kept, body):
            return
        key = json.dumps(body, sort_keys=True)
        with server.lock:
            server.seen.append(body)
            server.tries[key] += 1
            attempt = server.tries[key]
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            self.answer(server.fault(attempt, body), body, key)
        finally:
            with server.lock:
                server.in_flight -= 1

    def ordered(self, kept, body):
        """Answer a command; whether it was one. Whoever asks one that sleeps waits in vain."""
        parts = urlsplit(self.path)
        if parts.path == "/generate":
            chances = kept.distribution(body["input_ids"])
            said = [[math.log(chances[t]), t, None] for t in body["token_ids_logprob"]]
            self.send(200, {"meta_info": {"output_token_ids_logprobs": [said]}})
            return True
        if parts.path.endswith("completions"):
            if len(kept.on_device) < 2:
                self.send(400, {"error": {"message": "the engine sleeps"}})
            return len(kept.on_device) < 2
        with self.server.lock:
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            try:
                answer = kept.order(parts.path, query, body)
            except RefusedError as error:
                self.send(500, {"error": {"message": str(error)}})
                return True
        if answer is None:
            self.send(404, {"detail": "Not Found"})
        elif isinstance(answer, str):
            self.send_bytes(200, answer.encode(), {"Content-Type": "text/plain"})
        else:
            self.send(200, answer)
        return True

    def answer(self, fault, body, key):
        server = self.server
        fault, headers = fault if isinstance(fault, tuple) else (fault, {})
        status = fault
        if isinstance(status, int):
            return self.send(
                status, {"error": {"message": f"{server.refusal_words} {status}"}}, headers
            )
        if fault == "hang":
            self.server.released.wait(60)
            self.close_connection = True
            return None
        if fault == "close":
            self.close_connection = True
            return None
        if fault == "drip":  # one byte now and then, without end
            self.start(200, 10**6)
            while not self.server.released.wait(0.1):
                self.wfile.write(b" ")
            return None
        if isinstance(fault, bytes):
            return self.send_bytes(status=200, data=fault, headers=headers)
        found = (
            self.chat(body) if self.path.endswith("/chat/completions") else self.completion(body)
        )
        if isinstance(fault, dict):
            found[1]["choices"][0] |= fault
        if isinstance(fault, str) and fault.startswith("late"):
            time.sleep(float(fault.split()[1]))
        with self.server.lock:
            self.server.answered[key] += 1
        if fault == "lost":  # it was worked, and the answer does not arrive
            self.send(200, found[1], cut=20)
        else:
            self.send(*found)
        return None

    def send(self, status, body, headers=(), cut=None):
        self.send_bytes(status, json.dumps(body).encode(), headers, cut)

    def send_bytes(self, status, data, headers=(), cut=None):
        self.start(status, len(data), headers)
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True

    def start(self, status, length, headers=()):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def completion(self, body):
        server = self.server
        allowed = {
            "transformers": {"model", "prompt", "max_tokens", "seed", "generation_config"},
            "ids": OPENAI_FIELDS,
            "text": OPENAI_FIELDS,
        }.get(server.kind)
        if allowed is not None and set(body) - allowed:
            return 422, {"detail": f"Unexpected fields in the request: {set(body) - allowed}"}
        prompt = body["prompt"]
        if server.kind == "llama.cpp" and isinstance(prompt, list):
            return 500, {"error": {"message": "[{'type': 'string_type', 'loc': ('body', ..."}}
        if isinstance(prompt, list) == (server.kind in ("transformers", "text", "llama.cpp")):
            return 400, {"error": {"message": "prompt has the wrong type"}}
        ids = [ALPHABET.index(c) for c in prompt] if isinstance(prompt, str) else prompt
        if len(ids) + body["max_tokens"] > MOST_TOKENS:
            words = f"This model's maximum context length is {MOST_TOKENS} tokens."
            return 400, {"error": {"message": words}}
        choice = {"index": 0, "logprobs": None}
        if server.kind in ("vllm", "sglang"):
            if server.max_len is not None:
                body = {**body, "max_tokens": min(body["max_tokens"], server.max_len - len(ids))}
            if words := refusal(body, server.kind):
                return 400, {"error": {"message": words}}
            new, finish, ended_by = worked(ids, body, server.kind)
            choice["stop_reason" if server.kind == "vllm" else "matched_stop"] = ended_by
        else:
            new, finish = reply_ids(ids, body["seed"], body["max_tokens"])
        choice |= {"text": text_of(new), "finish_reason": finish}
        if body.get("return_token_ids") and server.gives == "ids":
            choice["token_ids"] = new
        if "logprobs" in body and server.kind in ("vllm", "sglang"):
            choice["logprobs"] = self.logprobs(ids, new, body)
        if "prompt_logprobs" in body and server.prompt_scores:
            choice["prompt_logprobs"] = [
                None,
                *(
                    {str(ids[n]): {"logprob": math.log(distribution(ids[:n])[ids[n]])}}
                    for n in range(1, len(ids))
                ),
            ]
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def logprobs(self, ids, new, body):
        server = self.server
        named = body.get("return_tokens_as_token_ids") and server.gives != "text"
        named = named and server.kind == "vllm"
        kept = server.kept
        chances = distribution(ids) if kept is None else kept.distribution(ids)
        shown = sorted(range(VOCAB), key=lambda t: -chances[t])[: min(body["logprobs"], 20)]
        shown = shown[: server.most_top]
        if server.scores == "exact" and "logprob_token_ids" in body:
            shown = list(body["logprob_token_ids"])
        shown = [*shown, *([] if new[0] in shown else [new[0]])]
        names = {t: f"token_id:{t}" if named else (ALPHABET + "$")[t] for t in {*shown, *new}}
        top = {names[t]: math.log(chances[t]) for t in shown}
        found = {"tokens": [names[t] for t in new]}
        return found if server.scores is None else {**found, "top_logprobs": [top]}

    def chat(self, body):
        if self.server.kind == "text" and set(body) - OPENAI_FIELDS - {"messages"}:
            return 400, {"error": {"message": "Unrecognized request arguments supplied"}}
        if self.server.kind in ("vllm", "sglang") and (words := refusal(body, self.server.kind)):
            return 400, {"error": {"message": words}}
        said, ended_by = self.server.says(body), None
        for stop in body.get("stop") or ():
            if stop in said:
                kept = body.get("include_stop_str_in_output") and self.server.kind == "vllm"
                said = said[: said.index(stop) + len(stop) * bool(kept)]
                ended_by = stop
        choice = {"index": 0, "finish_reason": self.server.ends(body)}
        choice["message"] = {"role": "assistant", "content": said}
        if self.server.kind in ("vllm", "sglang"):
            choice["stop_reason" if self.server.kind == "vllm" else "matched_stop"] = ended_by
        return 200, {"choices": [choice]}


def main():
    folder, port, *how = sys.argv[1:]
    print("starting", folder, flush=True)
    if "broken" in how:
        print("no such architecture: toy", flush=True)
        sys.exit(3)
    if "stubborn" in how:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "slow" in how:
        time.sleep(1.0)
    weights = Path(folder) / "model.safetensors"
    said = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None
    record = {"folder": folder, "pid": os.getpid(), "weights": said}
    with (Path(folder).parent.parent / "served.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    server = FakeServer(int(port), model="policy" if "adapter" in how else folder)
    for flag, kind in (("--enable-sleep-mode", "vllm"), ("--enable-memory-saver", "sglang")):
        if flag in how:
            server.kind, server.kept = kind, Kept(kind, folder, how)
    server.serve_forever()


if __name__ == "__main__":
    main()
