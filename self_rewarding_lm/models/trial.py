"""Trials of a model: whether a fast way gives the logits of the model's own forward.

One trial is of the cache of keys and values. The other is of hidden states and head taken apart,
with which log-probs are computed only where they are wanted, a piece at a time, and without padding
if the model's attention allows it.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from self_rewarding_lm.errors import AdapterError
from self_rewarding_lm.models.batching import pad_rows
from self_rewarding_lm.models.inference import inferring
from self_rewarding_lm.models.interface import Plan, TokenModel, Training, device_of, logits_of
from self_rewarding_lm.models.logprobs import Head
from self_rewarding_lm.models.packing import Packing

logger = logging.getLogger(__name__)


PROBE_TOKENS = 6
PROBES = 3


LOUD = 100.0
"""The largest logit of a trial of the head: with it a softcap or a scale shows, whatever the
weights are."""


def probe_vocab(module: nn.Module) -> int:
    """The number of tokens that a module gives logits for.

    Raises AdapterError if its forward fails or gives no logits.
    """
    ids = torch.zeros(2, 2, dtype=torch.long, device=device_of(module))
    with inferring(module):
        try:
            output = module(ids)
        except Exception as error:
            raise AdapterError(
                "model(ids) failed on ids of shape (2, 2): "
                f"{type(error).__name__}: {error}. A model takes long ids (b, t) as its only "
                "argument and returns logits (b, t, vocabulary)."
            ) from error
    return logits_of(output, 2, 2).shape[-1]


def check_causal(model: TokenModel) -> None:
    """Raise AdapterError if the logits of a token depend on the tokens after it."""
    length = min(PROBE_TOKENS, model.max_len or PROBE_TOKENS)
    device = device_of(model.module)
    ids = torch.zeros(2, length, dtype=torch.long, device=device)
    ids[1, -1] = model.vocab - 1
    with inferring(model.module):
        first, second = model.logits(ids)[:, :-1].double()  # (t - 1, v) each
    tolerance = _tolerance(model.module, first, exact=3e-4, rounded=3e-2)
    if bool(((first - second).abs() > tolerance).any()):
        raise AdapterError(
            "the model is not causal: the logits of a token change with the tokens after it. "
            "Give a decoder (causal attention); a bidirectional model cannot be sampled from."
        )


def cache_agrees(model: TokenModel) -> bool:
    """Whether a session of rows of different lengths gives the logits of whole rows."""
    return agrees_on_probes(model, _session_equals_whole)


def agrees_on_probes(model: TokenModel, trial: Callable[[TokenModel, list[int]], bool]) -> bool:
    """Whether a trial of the model says yes to one of several rows of tokens.

    One is enough: a trained model may turn the rounding of tokens that never stand together into
    quite other logits, above all in a narrow type. A trial that raises says no.
    """
    length = min(PROBE_TOKENS, model.max_len or PROBE_TOKENS)
    if length < 3:
        return False
    strides = [1 + n * model.vocab // 8 for n in range(PROBES)]
    rows = [[i * stride % model.vocab for i in range(1, length + 1)] for stride in strides]
    try:
        with inferring(model.module):
            return any(trial(model, row) for row in rows)
    except Exception as error:  # whatever it is: the model is then used as it is
        logger.debug("a trial failed: %r", error)
        return False


def _session_equals_whole(model: TokenModel, tokens: list[int]) -> bool:
    """Decode two prompts with a common beginning, and compare all logits with those of whole rows.

    Rows are exchanged, dropped and, if the session joins, added later, so that rows of different
    lengths go on together.
    """
    long, short, following = tokens[:-1], [tokens[0], *tokens[2:-1]], tokens[-1]
    device = device_of(model.module)
    session = model.session(Plan((tokens[0],), len(long), max_new=2, max_rows=2))

    def agrees(rows: list[list[int]], logits: Tensor) -> bool:  # (r, v)
        return all(close(model, row, of_row) for row, of_row in zip(rows, logits, strict=True))

    def extend(rows: list[list[int]]) -> bool:
        for row in rows:
            row.append(following)
        return agrees(rows, session.extend(torch.full((len(rows),), following, device=device)))

    if not agrees([long, short], session.prefill([long, short])):
        return False
    session.add([0, 1])
    session.select([1, 0])
    rows = [[*short], [*long]]
    if not extend(rows):
        return False
    session.select([0])
    del rows[1]
    if session.joins:
        session.add([1])
        rows.append([*short])
    return extend(rows)


def close(model: TokenModel, row: list[int], logits: Tensor) -> bool:
    """Whether logits (v,) are those of the token after a row, computed alone and whole."""
    whole = torch.tensor([row], device=logits.device)
    truth = model.logits(whole)[0, -1].double()
    tolerance = _tolerance(model.module, truth, exact=1e-4, rounded=1e-1)
    return bool(((truth - logits.double()).abs() <= tolerance).all())


def _tolerance(module: nn.Module, logits: Tensor, *, exact: float, rounded: float) -> float:
    """By how much logits may differ: a share of their spread, and what rounding adds.

    The spread, because new weights give small logits. exact: the share for a module in float32 or
    float64; rounded: for any other, even if its logits come in float32.
    """
    if logits.numel() == 0:
        return 0.0
    narrow = _is_narrow(module)
    epsilon = torch.finfo(torch.bfloat16 if narrow else torch.float32).eps
    spread = (logits - logits.mean(dim=-1, keepdim=True)).abs().amax()
    return float((rounded if narrow else exact) * spread + 8 * epsilon * logits.abs().amax())


def _is_narrow(module: nn.Module) -> bool:
    """Whether a module has weights, or else buffers, of fewer than four bytes."""
    dtypes = {p.dtype for p in module.parameters()} or {b.dtype for b in module.buffers()}
    return any(d.itemsize < 4 and d != torch.bool for d in dtypes)


def tried(model: TokenModel, training: Training) -> Training | None:
    """`training` if it gives the model's logits, without packing if only that does; else None."""
    ways = [training, replace(training, packs=False)] if training.packs else [training]
    return next((way for way in ways if _training_agrees(model, way)), None)


def head_agrees(model: TokenModel, project: nn.Module, head: Head) -> bool:
    """Whether a head's logits of large hidden states are those that the model makes of them.

    Small hidden states would show neither a softcap nor, before training, a wrong scale.
    """
    enlarged: list[Tensor] = []

    def enlarge(_: nn.Module, args: tuple) -> tuple:
        largest = project.forward(args[0]).abs().amax().clamp(min=1e-6)
        enlarged.append(args[0] * (LOUD / largest))
        return (enlarged[0], *args[1:])

    ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(model.module))
    with inferring(model.module):
        handle = project.register_forward_pre_hook(enlarge)
        try:
            truth = model.logits(ids)
        finally:
            handle.remove()
        logits = head.logits(enlarged[0])
    return bool(torch.allclose(logits.float(), truth.float(), rtol=1e-2, atol=1e-2 * LOUD))


def _training_agrees(model: TokenModel, training: Training) -> bool:
    def trial(model: TokenModel, tokens: list[int]) -> bool:
        return _training_equals_whole(model, training, tokens)

    return agrees_on_probes(model, trial)


def _training_equals_whole(model: TokenModel, training: Training, tokens: list[int]) -> bool:
    """Compare several rows with whole rows; two begin alike, and the last begins the third."""
    rows = [tokens[:-1], [tokens[0], *tokens[2:]], tokens[1:3], tokens[1:2]]
    ids, lengths = pad_rows(rows)
    device = device_of(model.module)
    if training.packs:
        width = None if training.width is None else min(training.width, len(tokens) - 1)
        packing = Packing(ids, lengths, device, width=width, least_shared=1)
        hidden = training.hidden(packing.ids, packing).flatten(0, 1)[packing.where]  # (b, t, d)
    else:
        hidden = training.hidden(ids.to(device), None)
    head = training.head()
    return all(
        close(model, row, head.logits(states[len(row) - 1]))
        for row, states in zip(rows, hidden, strict=True)
    )
