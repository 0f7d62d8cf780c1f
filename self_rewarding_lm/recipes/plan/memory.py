"""Computes the bytes that a model needs while it is trained and while it generates.

Input: sizes (a decoder layer, types of numbers, tokens at once); only `state_bytes` takes a model.

A decoder layer keeps tensors for its backward pass. They are counted one by one, as PyTorch keeps
them for the layers of transformers. Numbers kept for each token, with d: hidden size, a: heads x
head size, g: key-value heads x head size, i: inner size of the feed-forward part:

    norm before attention   its input, d; an RMS norm written in Python also keeps the result
                            before the weights, d, for the gradient of its weights
    q, k, v                 their input, d; their results after rotation, a + 2 g, kept by attention
    attention               its result, a, and the log of a sum for each head; its result again,
                            reordered, as the input of the output projection, a
    residuals               nothing: the gradient of a sum needs no number
    norm before the feed-forward part, and the input of that part: 3 d as above
    gated feed-forward      input and result of the activation function, the other branch and the
                            product of both: 4 i
    plain feed-forward      what the activation function keeps

The sum for Llama is 6 d + 3 a + 2 g + 4 i. This assumes attention that does not keep its scores, as
ours does not. A narrow type shrinks all of these except what norms keep, since norms compute in
float32. In mixed precision each linear layer keeps a cast copy of its input. The optimiser's state
is measured: the optimiser takes one step on weights without memory.
"""

from dataclasses import dataclass

import torch
from torch import nn

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.errors import SelfRewardingError
from self_rewarding_lm.models.logprobs import tile_logits, tile_sizes
from self_rewarding_lm.training.optimizers import make_optimizers

EXACT = 4
"""Bytes of float32, the narrowest type in which norms, log-sums and log-probs are computed."""


EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")
"""Optimisers that keep their states in 8 bit."""


EIGHT_BIT_BLOCK = 256
"""How many 8-bit numbers share one scale in float32 (arXiv:2110.02861)."""


LEAST_EIGHT_BIT = 4096
"""Smaller tensors keep their states in float32 (bitsandbytes' min_8bit_size)."""


@dataclass(frozen=True)
class Block:
    """The sizes of a decoder layer.

    hidden, head_dim, inner: numbers of a token in the hidden state, in one head and in the
        feed-forward part.
    gated: whether the feed-forward part multiplies two branches.
    attention_inputs, inner_inputs: how many linear layers read the hidden state, before attention
        and in the feed-forward part.
    activation_kept: how many tensors the activation function keeps, including its result.
    rms_norms: norms of the hidden state that keep two tensors. norms: those that keep one.
    head_norms: norms of the heads of queries or keys.
    dropouts: dropout layers of the hidden state.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    gated: bool
    attention_inputs: int
    inner_inputs: int
    activation_kept: int
    rms_norms: int
    norms: int
    head_norms: int = 0
    dropouts: int = 0


@dataclass(frozen=True)
class Types:
    """Bytes of a number.

    stream: in hidden states between layers; the type of the weights. product: in the inputs of
    linear layers, narrower in mixed precision. autocast: whether each linear layer casts its own
    inputs.
    """

    stream: int
    product: int
    autocast: bool = False

    @property
    def mixed(self) -> bool:
        """Whether training is in mixed precision."""
        return self.product < self.stream

    @property
    def exact(self) -> int:
        """Bytes of a number that is computed in float32 at least."""
        return max(EXACT, self.product)


@dataclass(frozen=True)
class Adapter:
    """LoRA on all linear layers except the head. itemsize: bytes of each of its numbers."""

    rank: int
    itemsize: int
    dropout: bool = False


@dataclass(frozen=True)
class Micro:
    """A micro-batch: the tokens that go through the model at once.

    dropout: the rate. mask: bytes of each number in a dropout mask. attention: of each number that
    attention keeps, by default as in products.
    """

    tokens: int
    dropout: float = 0.0
    mask: int = EXACT
    attention: int | None = None


def layer_bytes(
    block: Block, types: Types, micro: Micro, *, adapter: Adapter | None = None
) -> float:
    """Bytes that one layer keeps of one token for the backward pass."""
    hidden, product = block.hidden, types.product
    attended, grouped = block.heads * block.head_dim, block.kv_heads * block.head_dim
    trains_norms = adapter is None
    casts = adapter is not None and (types.autocast or product < adapter.itemsize)

    def inputs(readers: int, width: int) -> int:
        """Bytes kept by `readers` linear layers that read the same `width` numbers."""
        if adapter is None:
            return width * product * (readers if types.mixed else 1)
        itemsize = product if types.autocast else adapter.itemsize
        kept = adapter.rank * itemsize * readers
        if adapter.dropout:  # each reader keeps a mask and the masked input
            return kept + readers * width * (itemsize + micro.mask)
        return kept + width * itemsize * (readers if casts else 1)

    # 1. norms, and the inputs of the projections around attention
    norms = block.rms_norms * (EXACT + types.stream * trains_norms) + block.norms * types.stream
    kept = norms * hidden
    kept += inputs(block.attention_inputs, hidden) + inputs(1, attended)
    # 2. attention
    if block.head_norms:
        kept += (attended + grouped) * (EXACT + product * trains_norms)
    kept += (2 * attended + 2 * grouped) * (micro.attention or product) + block.heads * types.exact
    # 3. the feed-forward part
    inner = block.inner * product
    kept += inputs(block.inner_inputs, hidden)
    kept += block.activation_kept * inner + block.gated * inner
    if block.gated or casts:
        kept += inputs(1, block.inner)
    # 4. masks of dropout
    if micro.dropout:
        kept += block.dropouts * hidden * micro.mask
    return kept


def activation_bytes(
    block: Block,
    layers: int,
    types: Types,
    micro: Micro,
    *,
    adapter: Adapter | None = None,
    checkpointing: bool = False,
) -> int:
    """Bytes kept from the forward to the backward pass: all tensors of each layer, or, with
    checkpointing, only the layer's input."""
    per_layer = layer_bytes(block, types, micro, adapter=adapter)
    if checkpointing:
        per_layer = block.hidden * types.stream
    return round(micro.tokens * (layers * per_layer + _last_bytes(block, types)))


def recomputed_bytes(
    block: Block, types: Types, micro: Micro, *, adapter: Adapter | None = None
) -> int:
    """Bytes that the backward pass adds with checkpointing: the tensors of one layer, recomputed,
    and the gradients that pass through it. What follows the last layer is freed by then."""
    per_layer = layer_bytes(block, types, micro, adapter=adapter)
    gradients = 2 * block.inner * types.product + 2 * block.hidden * types.stream
    return round(micro.tokens * (per_layer + gradients - _last_bytes(block, types)))


def _last_bytes(block: Block, types: Types) -> int:
    """Bytes of a token outside the layers: what the last norm and the head keep, and the cosines
    and sines of its position."""
    norm = block.hidden * (EXACT + types.stream + types.product)
    return norm + 2 * block.head_dim * types.stream


def logits_bytes(
    tokens: int, vocab: int, hidden: int, types: Types, *, kind: str, head_trained: bool = True
) -> int:
    """Bytes that the log-probs of labels need in their backward pass, on a kind of device.

    A tile of the logits exists at a time, as `logprobs.label_logprobs` makes them; of each token
    the gradient by its hidden state is kept. If the head is trained, its gradient is added, beside
    the gradient summed over earlier micro-batches.
    """
    rows, columns = tile_sizes(tokens, max(vocab, 1), tile_logits(kind))
    narrow = types.product < EXACT
    number = EXACT + 2 * types.product if narrow else types.exact
    tile = min(tokens, rows) * columns * number
    gradient = vocab * hidden * (types.exact + (types.product if narrow else 0))
    states = tokens * hidden * (types.exact + types.product)
    return tile + gradient * head_trained + states


def prefill_bytes(block: Block, types: Types, tokens: int) -> int:
    """Bytes that a forward pass of `tokens` without gradients needs: its widest layer."""
    numbers = 2 * block.hidden + 3 * block.inner
    return tokens * numbers * types.product


def key_value_bytes(block: Block, layers: int, tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of `tokens` in all layers."""
    return 2 * layers * block.kv_heads * block.head_dim * tokens * itemsize


def state_bytes(module: nn.Module, optim: OptimConfig, vocab: int) -> int | None:
    """Bytes of an optimiser's state for the trained weights of a module on the meta device.

    Returns None if the optimiser of a user's function takes no step there. Raises ConfigError if
    the optimiser cannot train the module.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if optim.optimizer in EIGHT_BIT:
        return _eight_bit_state(module)
    if optim.optimizer == "adafactor":  # one number for each row and for each column
        return sum(p.itemsize * (sum(p.shape[-2:]) if p.ndim > 1 else p.numel()) for p in trained)
    try:
        optimizers = make_optimizers(module, optim.completed(1e-6, 1e-7, 1), vocab)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
    except SelfRewardingError:
        raise
    except Exception:  # from a user's function, or from kernels that this device lacks
        return None
    finally:
        for parameter in trained:
            parameter.grad = None
    return sum(
        value.numel() * value.itemsize
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim  # steps are counted in scalars
    )


def _eight_bit_state(module: nn.Module) -> int:
    """Bytes of two states for each trained weight: a byte each with its scale, but float32 for
    embeddings and small tensors."""
    embeddings = {id(p.weight) for p in module.modules() if isinstance(p, nn.Embedding)}
    state = 0.0
    for parameter in module.parameters():
        if parameter.requires_grad:
            wide = id(parameter) in embeddings or parameter.numel() < LEAST_EIGHT_BIT
            state += 2 * parameter.numel() * (4 if wide else 1 + 4 / EIGHT_BIT_BLOCK)
    return round(state)
