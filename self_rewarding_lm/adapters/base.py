"""What the engine and the training loop ask of a model, and the trial of a new one."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from self_rewarding_lm.adapters.inference import inferring
from self_rewarding_lm.adapters.sessions import Plan, Session
from self_rewarding_lm.errors import AdapterError

if TYPE_CHECKING:
    from self_rewarding_lm.adapters.training import Training

logger = logging.getLogger(__name__)

PROBE_TOKENS = 6
PROBES = 3


@runtime_checkable
class TokenModel(Protocol):
    """A causal token-level transformer. The pad side is the adapter's own business.

    bytes_per_token: what a session's memory takes for one token of one row; 0 where it keeps none.
    training: its hidden states and head apart; None where it gives logits alone.
    """

    module: nn.Module
    max_len: int | None
    vocab: int
    bytes_per_token: int
    training: "Training | None"

    def logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Logits of right-padded rows, with gradients."""
        ...

    def checkpointing(self) -> AbstractContextManager[None]:
        """Layers are computed again in the backward pass instead of being kept (gradient
        checkpointing); AdapterError where the model cannot do that."""
        ...

    def refresh(self) -> None:
        """Called before generating and training: weights may have changed since the last one."""
        ...

    def session(self, plan: Plan) -> Session:
        """Rows to be decoded together, with the present weights."""
        ...

    def state(self) -> dict[str, Tensor]:
        """A copy, on the CPU, of the tensors that `load` replaces."""
        ...

    def save(self, folder: Path) -> None:
        """Write the weights, and what else loading them needs, into a folder."""
        ...

    def load(self, file: Path) -> None:
        """Load weights from the file that `save` wrote, in place."""
        ...


def logits_of(output: Any, batch: int, length: int) -> Tensor:
    """The logits in a model's output: a tensor, or an object with `.logits`."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (batch, length):
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise AdapterError(
            f"model(ids) with ids of shape ({batch}, {length}) must give logits of shape "
            f"({batch}, {length}, vocabulary), or an object with such .logits; got {came}. Wrap "
            "the model in a module whose forward returns them."
        )
    return logits


def not_checkpointed(module: nn.Module) -> AdapterError:
    """The error of a model that cannot compute its layers again."""
    return AdapterError(
        "optim.gradient_checkpointing=True needs a model of transformers, which can compute its "
        f"layers again; got {type(module).__name__}. Leave it out, or use a smaller "
        "optim.micro_batch_tokens."
    )


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters (or buffers) live; the CPU for one that has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def copied(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU."""
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


def limit_of(module: nn.Module) -> int | None:
    """The longest sequence a module says it takes: `.max_seq_len`, or its config's."""
    config = getattr(module, "config", None)
    found = (
        getattr(module, "max_seq_len", None),
        getattr(config, "max_position_embeddings", None),
        getattr(config, "n_positions", None),
    )
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def probe_vocab(module: nn.Module) -> int:
    """The number of tokens a module gives logits for; fails where it gives none."""
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
    """Raise AdapterError where the logits of a token depend on the tokens after it."""
    length = min(PROBE_TOKENS, model.max_len or PROBE_TOKENS)
    device = device_of(model.module)
    ids = torch.zeros(2, length, dtype=torch.long, device=device)
    ids[1, -1] = model.vocab - 1
    with inferring(model.module):
        one, other = model.logits(ids)[:, :-1].double()
    tolerance = _tolerance(model.module, one, exact=3e-4, rounded=3e-2)
    if bool(((one - other).abs() > tolerance).any()):
        raise AdapterError(
            "the model is not causal: the logits of a token change with the tokens after it. "
            "Give a decoder (causal attention); a bidirectional model cannot be sampled from."
        )


def cache_agrees(model: TokenModel) -> bool:
    """Whether a session of ragged rows gives the logits of the whole rows."""
    return agrees_on_probes(model, _session_equals_whole)


def agrees_on_probes(model: TokenModel, trial: Callable[[TokenModel, list[int]], bool]) -> bool:
    """Whether a trial of a model and a row of tokens finds that logits are as they should be.

    A trained model may turn the rounding of tokens that never stand together into quite other
    logits, above all in a narrow type, so it is enough that one of several rows agrees.
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
    """Two prompts with a common beginning; rows of them are exchanged, dropped and, where the
    session allows it, added later, so that rows of different lengths go on together."""
    long, short, following = tokens[:-1], [tokens[0], *tokens[2:-1]], tokens[-1]
    device = device_of(model.module)
    session = model.session(Plan((tokens[0],), len(long), max_new=2, max_rows=2))

    def agrees(rows: list[list[int]], logits: Tensor) -> bool:
        return all(close(model, row, got) for row, got in zip(rows, logits, strict=True))

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


def close(model: TokenModel, row: list[int], got: Tensor) -> bool:
    """Whether logits are those of what follows a row, computed alone and whole."""
    whole = torch.tensor([row], device=got.device)
    truth, got = model.logits(whole)[0, -1].double(), got.double()
    tolerance = _tolerance(model.module, truth, exact=1e-4, rounded=1e-1)
    return bool(((truth - got).abs() <= tolerance).all())


def _tolerance(module: nn.Module, logits: Tensor, *, exact: float, rounded: float) -> float:
    """A share of the spread of logits, as weights that were just drawn give small ones.

    exact: the share for a module in float32 or float64; rounded: for any other, whose logits may
    come in float32 all the same. Rounding itself is always within it.
    """
    if logits.numel() == 0:
        return 0.0
    narrow = _is_narrow(module)
    epsilon = torch.finfo(torch.bfloat16 if narrow else torch.float32).eps
    spread = (logits - logits.mean(dim=-1, keepdim=True)).abs().amax()
    return float((rounded if narrow else exact) * spread + 8 * epsilon * logits.abs().amax())


def _is_narrow(module: nn.Module) -> bool:
    """Whether a module has weights of fewer than four bytes."""
    dtypes = {p.dtype for p in module.parameters()} or {b.dtype for b in module.buffers()}
    return any(d.itemsize < 4 and d != torch.bool for d in dtypes)
