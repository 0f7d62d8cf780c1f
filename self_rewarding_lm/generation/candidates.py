"""Prompts become candidates, and the public `generate`."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from self_rewarding_lm.config import SamplingConfig
from self_rewarding_lm.data.chat import is_messages
from self_rewarding_lm.data.tokenizers import Tokenizer, tokenizer_of
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, DataError, give_tokenizer, typed
from self_rewarding_lm.generation.engine import Decoding, Engine, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.server.engine import ServerEngine
from self_rewarding_lm.models.batching import unpad
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.interface import TokenModel, device_of
from self_rewarding_lm.models.loading import end_ids_of
from self_rewarding_lm.records import Candidate, Prompt, stable_hash
from self_rewarding_lm.runs.weights import save_folder
from self_rewarding_lm.runtime import in_precision

PROMPTS_AT_ONCE = 4096
"""Prompts whose requests are in memory together."""


BYTES_PER_CHARACTER = 4
"""How many tokens one character of a stop text may take at most."""


def sample_candidates(
    model: TokenModel,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    num_samples: int,
    *,
    engine: Engine,
    tokens: Tokens,
    seed: int,
    limit: int | None,
    known: Collection[str] = (),
    logprobs: bool = False,
) -> Iterator[Candidate]:
    """`num_samples` candidates of each prompt, as an engine finishes them.

    limit: tokens of prompt and response together; None if there is no limit. known: ids of
    candidates that are there already, which are left out. logprobs: whether candidates get those of
    their tokens, if the engine gives them. The noise of a candidate is a function of
    the seed and its id. The engine gets PROMPTS_AT_ONCE prompts at a time.
    """
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        # 1. a request for each candidate that is missing
        requests: list[Request] = []
        owners: list[tuple[Prompt, str]] = []  # the prompt and the candidate's id of each request
        for prompt in prompts[start : start + PROMPTS_AT_ONCE]:
            room = sampling.max_new_tokens if limit is None else limit - len(prompt.ids)
            max_new_tokens = min(sampling.max_new_tokens, room)
            for sample in range(num_samples):
                candidate_id = f"{prompt.id}/{sample}"
                if candidate_id in known:
                    continue
                owners.append((prompt, candidate_id))
                key = stable_hash(seed, candidate_id)
                requests.append(Request(prompt.ids, key, max_new_tokens, candidate_id))

        # 2. a candidate of each completion
        decoding = replace(decoding_of(sampling, tokens), logprobs=logprobs)
        for index, completion in engine.generate(model, requests, decoding):
            prompt, candidate_id = owners[index]
            yield Candidate(
                id=candidate_id,
                prompt_id=prompt.id,
                ids=completion.ids,
                text=tokens.decode(completion.ids) if completion.reason is None else None,
                finished=completion.finished,
                max_new_tokens=completion.max_new_tokens or requests[index].max_new_tokens,
                tokens=completion.tokens,
                reason=completion.reason,
                logprobs=_rounded(completion.logprobs),
            )


def _rounded(logprobs: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Log-probs to four digits, so that a candidate is the same whatever batch it was in."""
    return None if logprobs is None else tuple(round(number, 4) for number in logprobs)


def decoding_of(sampling: SamplingConfig, tokens: Tokens) -> Decoding:
    """A SamplingConfig as the plain values that an engine takes."""
    return Decoding(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        min_new_tokens=sampling.min_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        filter_fn=sampling.filter_fn,
        end_ids=tokens.end_ids,
        is_stop=_stop_check(sampling.stop, sampling.stop_fn, tokens),
        stop=tuple(sampling.stop),
        stop_fn=sampling.stop_fn,
    )


@typed
def generate(
    model: nn.Module,
    prompts: Sequence[Any] | Tensor,
    *,
    mask: Tensor | None = None,
    sampling: SamplingConfig | None = None,
    num_samples: int = 1,
    tokenizer: Tokenizer | None = None,
    tokenizer_encode: Callable[[str], Any] | None = None,
    tokenizer_decode: Callable[[Tensor], str] | None = None,
    chat_template: str | None = None,
    eos_id: int | None = None,
    seed: int = 0,
    engine: Engine | None = None,
    precision: Literal["bf16", "fp16", "fp32", "no"] | None = None,
) -> list[list[Candidate]]:
    """Sample from a model: for each prompt a list of `num_samples` candidates.

    prompts: 1-D id tensors; or, with a tokenizer, texts or message lists; or a padded batch (b, t)
    of ids with its boolean `mask` (b, t), True on tokens, padded on either side. tokenizer, or
    tokenizer_encode and tokenizer_decode: as the trainer takes them. Texts and messages
    are rendered as the trainer does it: chat_template is a name, jinja text or "raw", by default
    the Hugging Face tokenizer's own. eos_id: the end token, by default all that the tokenizer, its
    template and a Hugging Face model's generation config name. The same seed gives the same
    candidates for any batch size. Modes and gradients of the model are afterwards as before.
    precision: in which products are computed, "bf16" and "fp16" in mixed precision; "fp32" and "no"
    (Accelerate's name) in the model's own type. By default as the `torch.autocast` around it says,
    else as the run does during which it is called (in a callback), else in the model's own type.

    Raises ConfigError for a precision with a server, which has its own; DataError for a prompt that
    is empty or leaves no room in the model, TokenizerError for ids the model does not know,
    AdapterError for a model that gives no logits.
    """
    if precision is not None and isinstance(engine, ServerEngine):
        raise ConfigError(
            f"precision={precision!r} says how this process computes, and a ServerEngine generates "
            "in the type that its server was started with. Leave precision out."
        )
    token_model = adapt(model)
    tokens = Tokens(
        tokenizer_of(tokenizer, tokenizer_encode, tokenizer_decode),
        eos_id=eos_id,
        vocab=token_model.vocab,
        chat_template=chat_template,
        end_ids=end_ids_of(model) if eos_id is None else (),
    )
    rows = _prompt_rows(prompts, mask)
    records = [_prompt(i, row, tokens, token_model.max_len) for i, row in enumerate(rows)]
    engine = engine or LocalEngine()

    def save(folder: Path) -> None:
        save_folder(token_model, folder, tokens.save)

    with engine.serving(save, tokens), in_precision(precision, device_of(model)):
        candidates = sample_candidates(
            token_model,
            records,
            sampling or SamplingConfig(),
            num_samples,
            engine=engine,
            tokens=tokens,
            seed=seed,
            limit=token_model.max_len,
        )
        by_id = {candidate.id: candidate for candidate in candidates}
    return [[by_id[f"{p.id}/{s}"] for s in range(num_samples)] for p in records]


def _prompt_rows(prompts: Sequence | Tensor, mask: Tensor | None) -> Sequence:
    """The prompts one by one; a padded batch (b, t) as its rows without padding."""
    if isinstance(prompts, str):
        raise DataError(f"prompts must be a list; got one text. Write [{prompts!r:.60}].")
    if not isinstance(prompts, Tensor):
        if mask is not None:
            raise ConfigError("mask goes with a padded batch of ids (b, t), not with a list.")
        return prompts
    if prompts.ndim != 2 or (mask is not None and mask.shape != prompts.shape):
        raise DataError(
            "a batch of prompts is ids (b, t) and mask (b, t); got "
            f"{tuple(prompts.shape)} and {None if mask is None else tuple(mask.shape)}."
        )
    return list(prompts) if mask is None else unpad(prompts, mask)


def _prompt(row: int, prompt: Any, tokens: Tokens, limit: int | None) -> Prompt:
    """The record of a prompt; DataError if it is empty or leaves no room for a response."""
    text = messages = None
    if isinstance(prompt, str) or is_messages(prompt):
        rendered = tokens.prompt(prompt, f"prompt {row}")
        ids, text, messages = rendered.ids, rendered.text, rendered.messages
    else:
        ids = tokens.checked(prompt, f"of prompt {row}")
    if not ids or (limit is not None and len(ids) >= limit):
        raise DataError(
            f"prompt {row} has {len(ids)} tokens; it must have at least 1 and fewer than the "
            f"{limit} that the model takes."
        )
    return Prompt(f"generate/{row}", row, ids, text, messages=messages)


def _stop_check(
    stop: Sequence[str], stop_fn: Callable[[str], bool] | None, tokens: Tokens
) -> Callable[[Sequence[int]], bool] | None:
    """A function that says whether new ids end in a stop text, or as `stop_fn` says of their text;
    None if there is neither."""
    if not stop and stop_fn is None:
        return None
    if tokens.tokenizer is None:
        raise ConfigError(
            "stop texts and stop_fn need a tokenizer, to see texts in tokens; got stop "
            f"{list(stop)}. {give_tokenizer()}"
        )

    window = BYTES_PER_CHARACTER * max(map(len, stop), default=0)

    def is_stop(new: Sequence[int]) -> bool:
        tail = tokens.decode(new[-window:]) or ""
        if any(text in tail for text in stop):
            return True
        return stop_fn is not None and bool(stop_fn(tokens.decode(new) or ""))

    return is_stop
