"""Trials of a model: by how much a fast way misses the logits of the model's own forward.

One trial is of the cache of keys and values. Another is of hidden states and head taken apart, with
which log-probs are computed only where they are wanted, a piece at a time, and without padding if
the model's attention allows it. The last is of padding itself.

Each gives an error: how often the tolerance goes into it, 0.0 for equal logits and infinity if the
way fails. Trials run in the module's own type, whatever `torch.autocast` is around them.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


PROBE_TOKENS = 24
PROBES = 3


LOUD = 100.0
"""The largest logit of a trial of the head: with it a softcap or a scale shows, whatever the
weights are."""


REFUSED = 20.0
"""An error from which on a way is refused; from 1.0 on it is named in a warning. Ours: the rounding
of trained weights in a narrow type is beyond the tolerance now and then, and not by this much."""


def probes(model: TokenModel) -> list[list[int]]:
    """Rows of tokens for trials, always the same ones; tokens come again, as those of texts do.

    None is among the first or the last of the vocabulary, where a tokenizer has those with a
    meaning of their own, if it is large enough.
    """
    length = min(PROBE_TOKENS, model.max_len or PROBE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    low, high = model.vocab // 8, model.vocab - model.vocab // 4
    new = torch.randint(low, high, (PROBES, length), generator=generator)
    again = torch.randint(length, (length,), generator=generator)
    places = torch.arange(length)
    return new[:, torch.where(places % 3 == 2, again, places)].tolist()


@contextmanager
def trying(module: nn.Module) -> Iterator[None]:
    """Run forwards without gradients and dropout, in the module's own type."""
    with torch.autocast(device_of(module).type, enabled=False), inferring(module):
        yield


def probe_vocab(module: nn.Module) -> int:
    """The number of tokens that a module gives logits for.

    Raises AdapterError if its forward fails or gives no logits.
    """
    ids = torch.zeros(2, 2, dtype=torch.long, device=device_of(module))
    with trying(module):
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
    row, other, _ = probes(model)
    ids = torch.tensor([row] * 3, device=device_of(model.module))
    for changed, start in ((1, len(row) - 1), (2, len(row) // 2)):
        ids[changed, start:] = torch.tensor(other[start:])
    ids[1, -1] = (ids[0, -1] + 1) % model.vocab
    with trying(model.module):
        logits = model.logits(ids).double()  # (3, t, v)
    for changed, end in ((1, len(row) - 1), (2, len(row) // 2)):
        first, second = logits[0, :end], logits[changed, :end]
        tolerance = _tolerance(model.module, first, exact=3e-4, rounded=3e-2)
        if bool(((first - second).abs() > tolerance).any()):
            raise AdapterError(
                "the model is not causal: the logits of a token change with the tokens after it. "
                "Give a decoder (causal attention); a bidirectional model cannot be sampled from."
            )


def beyond_rounding(way: str, error: float) -> str | None:
    """Why a way that is known to be right is refused on these weights; None if it is not.

    A smaller error that is no rounding either is named in a warning.
    """
    if error > REFUSED:
        return f"{way} gives other logits with these weights: {error:.0f} times what rounding does"
    if error > 1:
        logger.warning(
            "%s gives logits that differ by %.1f times what rounding does with these weights; it "
            "is used all the same, because its parts are known to be right.",
            way,
            error,
        )
    return None


def session_error(model: TokenModel, longest: float = math.inf) -> float:
    """The error of a session of rows of different lengths, against whole rows.

    longest: tokens of a row at most.
    """
    return least_error(model, _session_against_whole, longest)


def padding_error(model: TokenModel, longest: float = math.inf) -> float:
    """The error of rows of different lengths in one forward, against each row alone."""
    return least_error(model, _padded_against_whole, longest)


def training_error(model: TokenModel, training: Training, longest: float = math.inf) -> float:
    """The error of hidden states and head apart, against whole rows."""

    def trial(model: TokenModel, tokens: list[int]) -> float:
        return _training_against_whole(model, training, tokens)

    return least_error(model, trial, longest)


def least_error(
    model: TokenModel,
    trial: Callable[[TokenModel, list[int]], float],
    longest: float = math.inf,
) -> float:
    """The least error of a trial with several rows of tokens; the largest one in float64.

    One good row is enough: a trained model may turn the rounding of tokens that never stand
    together into quite other logits, above all in a narrow type. In float64 there is no such
    excuse. The error of a trial that raises is infinite.
    """
    least = math.inf
    rows = [row[: int(min(longest, len(row)))] for row in probes(model)]
    if len(rows[0]) < 3:
        return math.inf
    try:
        with trying(model.module):
            if all(parameter.dtype == torch.float64 for parameter in model.module.parameters()):
                return max(trial(model, row) for row in rows)
            for row in rows:
                least = min(least, trial(model, row))
                if least <= 1:
                    break
    except Exception as error:  # whatever it is: the model is then used as it is
        logger.debug("a trial failed: %r", error)
        return math.inf
    return least


def _session_against_whole(model: TokenModel, tokens: list[int]) -> float:
    """Decode two prompts with a common beginning, and compare all logits with those of whole rows.

    Rows are exchanged, dropped and, if the session joins, added later, so that rows of different
    lengths go on together.
    """
    long, short, following = tokens[:-1], [tokens[0], *tokens[2:-1]], tokens[-1]
    device = device_of(model.module)
    session = model.session(Plan((tokens[0],), len(long), max_new=2, max_rows=2))
    errors = []

    def compare(rows: list[list[int]], logits: Tensor) -> None:  # (r, v)
        errors.extend(error(model, row, of_row) for row, of_row in zip(rows, logits, strict=True))

    def extend(rows: list[list[int]]) -> None:
        for row in rows:
            row.append(following)
        compare(rows, session.extend(torch.full((len(rows),), following, device=device)))

    compare([long, short], session.prefill([long, short]))
    session.add([0, 1])
    session.select([1, 0])
    rows = [[*short], [*long]]
    extend(rows)
    session.select([0])
    del rows[1]
    if session.joins:
        session.add([1])
        rows.append([*short])
    extend(rows)
    return max(errors)


def _ragged(tokens: list[int]) -> list[list[int]]:
    """Rows of different lengths; two begin alike, and the last begins the third."""
    shorter = max(3, 2 * len(tokens) // 3)
    return [tokens[:-1], [tokens[0], *tokens[2:shorter]], tokens[1:3], tokens[1:2]]


def _padded_against_whole(model: TokenModel, tokens: list[int]) -> float:
    rows = _ragged(tokens)
    ids, _ = pad_rows(rows)
    logits = model.logits(ids.to(device_of(model.module)))  # (b, t, v)
    return _largest(model, rows, logits)


def _training_against_whole(model: TokenModel, training: Training, tokens: list[int]) -> float:
    rows = _ragged(tokens)
    ids, lengths = pad_rows(rows)
    device = device_of(model.module)
    if training.packs:
        width = None if training.width is None else min(training.width, len(tokens) - 1)
        packing = Packing(ids, lengths, device, width=width, least_shared=1)
        hidden = training.hidden(packing.ids, packing).flatten(0, 1)[packing.where]  # (b, t, d)
    else:
        hidden = training.hidden(ids.to(device), None)
    return _largest(model, rows, training.head().logits(hidden))


def _largest(model: TokenModel, rows: Sequence[list[int]], logits: Tensor) -> float:
    """The largest error of the logits (b, t, v) of each row."""
    each = zip(rows, logits, strict=True)
    return max(error(model, row, of_row[: len(row)]) for row, of_row in each)


def error(model: TokenModel, row: Sequence[int], logits: Tensor) -> float:
    """How far the last logits (v,) or (t, v) of a row are from those of the row alone and whole.

    In tolerances, see `_tolerance`. logits: of the last token, or of all tokens.
    """
    whole = torch.tensor([[*row]], device=logits.device)
    truth = model.logits(whole)[0].double()  # (t, v)
    truth = truth[-1] if logits.ndim == 1 else truth
    difference = float((truth - logits.double()).abs().max())
    tolerance = _tolerance(model.module, truth, exact=1e-4, rounded=5e-2)
    if difference == 0:
        return 0.0
    return difference / tolerance if tolerance > 0 and math.isfinite(difference) else math.inf


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


def tried(
    model: TokenModel, training: Training, bound: float = 1.0, longest: float = math.inf
) -> Training | None:
    """`training` if its error is within a bound, without packing if only that is; else None.

    longest: tokens of a row at most.
    """
    ways = [training, replace(training, packs=False)] if training.packs else [training]
    return next((way for way in ways if training_error(model, way, longest) <= bound), None)


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
    with trying(model.module):
        handle = project.register_forward_pre_hook(enlarge)
        try:
            truth = model.logits(ids)
        finally:
            handle.remove()
        logits = head.logits(enlarged[0])
    return bool(torch.allclose(logits.float(), truth.float(), rtol=1e-2, atol=1e-2 * LOUD))
