"""A small inference server that behaves as it is told, and badly where it is told.

Its "model" is known by hand: behind ids that end in x it writes the letters x+1, x+2, ... of the
alphabet, 1 + seed % 5 of them, then its end token. As a program it serves a folder:
`python tests/support/fake_server.py FOLDER PORT [slow] [stubborn] [broken]`.
"""

import hashlib
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

ALPHABET = string.ascii_lowercase + string.digits + " :.<>?S\n"
"""Of tests.support.models, whose import takes seconds."""
END = len(ALPHABET)
VOCAB = END + 1
MOST_TOKENS = 200
OPENAI_FIELDS = {
    *("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"),
}


def reply_ids(ids, seed, max_tokens):
    """What the model writes, and why it ends there."""
    letters = [(ids[-1] + 1 + i) % 26 for i in range(1 + seed % 5)]
    whole = [*letters, END]
    return (whole, "stop") if len(whole) <= max_tokens else (whole[:max_tokens], "length")


def distribution(ids):
    """The probability of each next token: unlike, and a function of the last two ids."""
    a, b = ids[-1], ids[-2] if len(ids) > 1 else 0
    weights = [1.0 + ((t * 7 + a * 3 + b) % 11) ** 3 for t in range(VOCAB)]
    return [w / sum(weights) for w in weights]


class FakeServer(ThreadingHTTPServer):
    """kind: "vllm" takes and gives ids and knows all fields; "transformers" takes text and its own
    fields; "ids" and "text" take OpenAI's fields alone. gives: "ids", "names" or nothing but text.
    scores: "exact", "top" or None. fault: (try number of this body, body) -> what goes wrong.
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
        self.prompt_scores = True
        self.seen, self.answered, self.tries = [], Counter(), Counter()
        self.in_flight = self.most_in_flight = 0
        self.says = lambda body: "Score: 3"
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
        return [b for b in self.seen if b["max_tokens"] > 1]

    def handle_error(self, request, client_address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        found = {"data": [{"id": self.server.model}]} if self.path.endswith("/models") else {}
        self.send(200, found)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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

    def answer(self, fault, body, key):
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        if isinstance(status, int):
            return self.send(status, {"error": {"message": f"told to say {status}"}}, headers)
        if fault == "hang":
            self.server.released.wait(60)
            self.close_connection = True
            return None
        if fault == "close":
            self.close_connection = True
            return None
        found = (
            self.chat(body) if self.path.endswith("/chat/completions") else self.completion(body)
        )
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
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True

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
        if isinstance(prompt, list) == (server.kind in ("transformers", "text")):
            return 400, {"error": {"message": "prompt has the wrong type"}}
        ids = [ALPHABET.index(c) for c in prompt] if isinstance(prompt, str) else prompt
        if len(ids) + body["max_tokens"] > MOST_TOKENS:
            words = f"This model's maximum context length is {MOST_TOKENS} tokens."
            return 400, {"error": {"message": words}}
        new, finish = reply_ids(ids, body["seed"], body["max_tokens"])
        text = "".join(ALPHABET[i] for i in new if i != END)
        choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
        if server.kind == "vllm":
            choice["stop_reason"] = None
        if body.get("return_token_ids") and server.gives == "ids":
            choice["token_ids"] = new
        if "logprobs" in body and server.kind == "vllm":
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
        chances = distribution(ids)
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
        said = self.server.says(body)
        message = {"role": "assistant", "content": said}
        return 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


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
    FakeServer(int(port), model=folder).serve_forever()


if __name__ == "__main__":
    main()
