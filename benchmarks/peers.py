"""What this library is compared with: transformers, x-transformers, its ancestor.

    python benchmarks/peers.py < request.json

is the child process in which transformers' `generate_batch` runs, as it may hang.
"""

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Chat, Sampler
from x_transformers import AutoregressiveWrapper, TransformerWrapper
from x_transformers.autoregressive_wrapper import top_k, top_p

PAGE = 256


def hugging_face(
    chat: Chat,
    prompts: Sequence[Sequence[int]],
    samples: int,
    sampler: Sampler,
    *,
    new_tokens: int,
    rows: int,
    seed: int,
) -> list[int]:
    """Useful new tokens of each row of `model.generate`, in batches of rows of similar length.

    A batch has whole groups of samples (num_return_sequences) where their number divides `rows`;
    else each prompt is repeated before.
    """
    torch.manual_seed(seed)
    each = samples if rows % samples == 0 else 1
    work = [i for i in range(len(prompts)) for _ in range(samples // each)]
    lengths: list[list[int]] = [[] for _ in prompts]
    for batch in _sorted_batches(work, rows // each, lambda i: len(prompts[i])):
        config = hugging_face_config(chat, sampler, new_tokens, each)
        found = _generated(chat, [prompts[i] for i in batch], config)
        for place, new in enumerate(found):
            lengths[batch[place // each]].append(useful_length(new, chat.tokens.end_ids))
    return [n for own in lengths for n in own]


def hugging_face_config(chat: Chat, sampler: Sampler, new_tokens: int, samples: int) -> Any:
    """All of the sampler's settings, so that no default of transformers is left in force."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=sampler.temperature,
        top_p=sampler.top_p,
        top_k=sampler.top_k or 0,
        num_return_sequences=samples,
        max_new_tokens=new_tokens,
        eos_token_id=list(chat.tokens.end_ids),
        pad_token_id=chat.tokens.end_ids[0],
        use_cache=True,
    )


def useful_length(new: Sequence[int], end_ids: Sequence[int]) -> int:
    """Tokens up to and including the first end token."""
    return next((n for n, token in enumerate(new, 1) if token in end_ids), len(new))


def x_transformers(
    net: TransformerWrapper,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    sampler: Sampler,
    *,
    rows: int,
    seed: int,
) -> None:
    """`AutoregressiveWrapper.generate` with its cache; a batch runs to its longest row."""
    torch.manual_seed(seed)
    wrapper = AutoregressiveWrapper(net)
    for batch in _sorted_batches(range(len(prompts)), rows, lambda i: len(prompts[i])):
        longest = max(lengths[i] for i in batch)
        out: Any = wrapper.generate(
            [torch.tensor(prompts[i]) for i in batch],
            longest,
            temperature=sampler.temperature,
            filter_logits_fn=both_filters(sampler),
            cache_kv=True,
        )
        assert out.shape == (len(batch), longest)


def ancestor(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    sampler: Sampler,
    *,
    rows: int,
    seed: int,
) -> None:
    """`sample` of self-rewarding-lm-pytorch, which counts prompt and response together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from self_rewarding_lm_pytorch.sampling_utils import sample

    torch.manual_seed(seed)
    for batch in _sorted_batches(range(len(prompts)), rows, lambda i: len(prompts[i])):
        total = max(len(prompts[i]) for i in batch) + max(lengths[i] for i in batch)
        sample(
            net,
            [torch.tensor(prompts[i]) for i in batch],
            seq_len=total,
            temperature=sampler.temperature,
            filter_fn=both_filters(sampler),
        )


def both_filters(sampler: Sampler) -> Callable[[Tensor], Tensor]:
    """Top-k, then top-p. Their own functions; both peers divide by the temperature afterwards."""

    def keep(logits: Tensor) -> Tensor:
        if sampler.top_k is not None:
            logits = top_k(logits, k=min(sampler.top_k, logits.shape[-1]))
        return top_p(logits, thres=sampler.top_p)

    return keep


def generate_batch(
    chat: Chat,
    prompts: Sequence[Sequence[int]],
    samples: int,
    sampler: Sampler,
    *,
    new_tokens: int,
    rows: int,
    limit: float,
) -> dict:
    """What became of `generate_batch` in a process of its own, which has `limit` seconds.

    lengths and seconds where all went well; else `failure` says what happened.
    """
    request = {
        "source": str(chat.source),
        "dtype": chat.dtype,
        "threads": torch.get_num_threads(),
        "prompts": [list(p) for p in prompts],
        "samples": samples,
        "sampler": asdict(sampler),
        "new_tokens": new_tokens,
        "rows": rows,
        "limit": limit,
    }
    found = _in_child(request, limit)
    lengths = found.get("lengths", ())
    empty = sum(n == 0 for n in lengths)
    if "failure" not in found and (len(lengths) < len(prompts) * samples or empty):
        came = f"{len(lengths)} of {len(prompts) * samples} results came, {empty} of them empty"
        found["failure"] = came
    return found


def _in_child(request: dict, limit: float) -> dict:
    child = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, errors = child.communicate(json.dumps(request), timeout=limit)
    except subprocess.TimeoutExpired:
        child.kill()
        phase = (child.communicate()[0].split() or ["not yet loaded"])[-1]
        return {"failure": f"not finished after {limit:.0f} s ({phase}) and ended"}
    finally:
        child.kill()
    last = out.strip().splitlines()[-1:] or [""]
    if child.returncode or not last[0].startswith("{"):
        tail = " ".join(errors.split())[-300:]
        return {"failure": f"the process ended with {child.returncode}: {tail}"}
    return json.loads(last[0])


def run_generate_batch(request: dict) -> dict:
    """The child's work: a small warm-up, then all rows, timed. It says how far it is."""
    from transformers import ContinuousBatchingConfig

    ending = threading.Timer(request["limit"], os._exit, (1,))  # whatever becomes of the parent
    ending.daemon = True
    ending.start()
    torch.set_num_threads(request["threads"])
    chat = Chat(Path(request["source"]), request["dtype"])
    print("loaded", flush=True)
    sampler, new_tokens = Sampler(**request["sampler"]), request["new_tokens"]
    work = [ids for ids in request["prompts"] for _ in range(request["samples"])]
    pages = -(-(max(map(len, work)) + new_tokens) // PAGE)
    rows = min(request["rows"], len(work))
    batching = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=rows * pages + 16,
        max_batch_tokens=512,
        max_requests_per_batch=rows,
    )

    def run(inputs: list[list[int]], new: int) -> dict:
        return chat.model.generate_batch(
            inputs=inputs,
            generation_config=hugging_face_config(chat, sampler, new, 1),
            continuous_batching_config=batching,
        )

    run(work[:1], 2)
    print("warmed", flush=True)
    started = time.perf_counter()
    found = run(work, new_tokens)
    seconds = time.perf_counter() - started
    ends = chat.tokens.end_ids
    lengths = [useful_length(result.generated_tokens, ends) for result in found.values()]
    return {"lengths": lengths, "seconds": seconds}


def _generated(chat: Chat, rows: list[Sequence[int]], config: Any) -> list[list[int]]:
    """New ids of left-padded rows."""
    longest = max(map(len, rows))
    pad = config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    found = chat.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return found[:, longest:].tolist()


def _sorted_batches(
    work: Sequence[int], size: int, length: Callable[[int], int]
) -> Iterator[list[int]]:
    order = sorted(work, key=length)
    for start in range(0, len(order), size):
        yield order[start : start + size]


if __name__ == "__main__":
    print(json.dumps(run_generate_batch(json.load(sys.stdin))))
