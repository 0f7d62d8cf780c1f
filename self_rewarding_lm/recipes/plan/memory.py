"""Bytes that a model takes while it is trained and while it generates. Arithmetic on numbers alone.

What a decoder layer keeps for its backward pass is counted tensor by tensor, as PyTorch keeps them
for transformers' layers. Of a token, with d numbers of hidden state, a = heads x head size, g =
key-value heads x head size and i of the feed-forward part:

    norm before attention   its input, d, and (an RMS norm in its own words) the result before the
                            weights, d, for the gradient of those
    q, k, v                 their input, d; their results after rotation, a + 2 g, kept by attention
    attention               its result, a, and the log of a sum for each head; its result once more,
                            reordered, as the input of the output projection, a
    residuals               nothing: the gradient of a sum needs no number
    norm before the feed-forward part, and that part's input: 3 d as above
    gated feed-forward      input and result of the activation function, the other branch and their
                            product: 4 i. Plain: what the activation function keeps

which is 6 d + 3 a + 2 g + 4 i for Llama. Attention here is the kind that keeps no scores; where
scores are kept (dropout on a CPU) a token has three numbers more for each head and each token it
sees. A narrow type makes all of these narrower but what norms keep, which compute in float32; in
mixed precision each linear layer keeps a cast copy of its input. What an optimiser keeps is asked
of the optimiser itself, by a step on weights without memory.
"""

from dataclasses import dataclass

import torch
from torch import nn

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.errors import SelfRewardingError
from self_rewarding_lm.models.logprobs import LEAST_LOGITS
from self_rewarding_lm.training.optimizers import make_optimizers

EXACT = 4
"""Bytes of float32, in which norms, log-sums and log-probs are computed at least."""


EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")


BLOCK = 256
"""Numbers in 8 bit that share a scale in float32 (arXiv:2110.02861)."""


LEAST_EIGHT_BIT = 4096
"""Smaller tensors keep their states in float32 (bitsandbytes' min_8bit_size)."""


@dataclass(frozen=True)
class Block:
    """A decoder layer, as far as what it keeps depends on it.

    attention_inputs, inner_inputs: linear layers that read the hidden state, before attention and
    in the feed-forward part. activation_kept: tensors that the activation function keeps, its
    result among them. rms_norms: norms of the hidden state that keep two tensors; norms: those that
    keep one; head_norms: norms of each head of queries or keys. dropouts: of the hidden state.
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
    attention_dropout: bool = True


@dataclass(frozen=True)
class Types:
    """Bytes of a number. stream: of hidden states between layers, the type of the weights; product:
    of what linear layers take, narrower in mixed precision. autocast: whether each linear layer
    casts for itself."""

    stream: int
    product: int
    autocast: bool = False

    @property
    def mixed(self) -> bool:
        return self.product < self.stream

    @property
    def exact(self) -> int:
        return max(EXACT, self.product)


@dataclass(frozen=True)
class Adapter:
    """LoRA on all linear layers but the head. itemsize: bytes of its numbers."""

    rank: int
    itemsize: int
    dropout: bool = False


@dataclass(frozen=True)
class Micro:
    """What goes through the model at once. dropout: its rate. keys: tokens that a token's attention
    sees where its scores are kept, else 0. mask: bytes of a number of a dropout's mask."""

    tokens: int
    dropout: float = 0.0
    keys: int = 0
    mask: int = EXACT


def layer_bytes(
    block: Block, types: Types, micro: Micro, *, adapter: Adapter | None = None
) -> float:
    """What one layer keeps of one token for the backward pass."""
    hidden, product = block.hidden, types.product
    attended, grouped = block.heads * block.head_dim, block.kv_heads * block.head_dim
    trains = adapter is None  # the weights of norms too
    casts = adapter is not None and (types.autocast or product < adapter.itemsize)

    def read(readers: int, width: int) -> int:
        """Inputs of so many linear layers that read the same numbers."""
        if adapter is None:
            return width * product * (readers if types.mixed else 1)
        each = product if types.autocast else adapter.itemsize
        kept = adapter.rank * each * readers
        if adapter.dropout:  # a mask and what it leaves, for each
            return kept + readers * width * (each + micro.mask)
        return kept + width * each * (readers if casts else 1)

    norms = block.rms_norms * (EXACT + types.stream * trains) + block.norms * types.stream
    kept = norms * hidden
    kept += read(block.attention_inputs, hidden) + read(1, attended)
    if block.head_norms:
        kept += (attended + grouped) * (EXACT + product * trains)
    if micro.keys:  # queries, keys and values with as many heads each
        kept += 3 * attended * types.exact + layer_scores(block, types, micro)
        kept += 2 * attended * product * (block.attention_inputs == 1)  # one tensor holds all three
    else:
        kept += (2 * attended + 2 * grouped) * product + block.heads * types.exact
    inner = block.inner * product
    kept += read(block.inner_inputs, hidden)
    kept += block.activation_kept * inner + block.gated * inner
    if block.gated or casts:
        kept += read(1, block.inner)
    if micro.dropout:
        kept += block.dropouts * hidden * micro.mask
    return kept


def layer_scores(block: Block, types: Types, micro: Micro) -> int:
    """The scores that one layer's attention keeps of one token: before and after dropout, and its
    mask."""
    return 3 * block.heads * micro.keys * types.exact


def activation_bytes(
    block: Block,
    layers: int,
    types: Types,
    micro: Micro,
    *,
    adapter: Adapter | None = None,
    checkpointing: bool = False,
) -> int:
    """What is kept of the forward until its backward pass: of all layers, or their inputs alone."""
    one = layer_bytes(block, types, micro, adapter=adapter)
    if checkpointing:
        one = block.hidden * types.stream
    return round(micro.tokens * (layers * one + _last_bytes(block, types)))


def recomputed_bytes(
    block: Block, types: Types, micro: Micro, *, adapter: Adapter | None = None
) -> int:
    """With checkpointing: one layer's tensors, made again, and the gradients that pass them. What
    is behind the last layer is given up by then."""
    one = layer_bytes(block, types, micro, adapter=adapter)
    passing = 2 * block.inner * types.product + 2 * block.hidden * types.stream
    return round(micro.tokens * (one + passing - _last_bytes(block, types)))


def _last_bytes(block: Block, types: Types) -> int:
    """What the last norm and the head keep of a token, and its cosines and sines of positions."""
    norm = block.hidden * (EXACT + types.stream + types.product)
    return norm + 2 * block.head_dim * types.stream


def logits_bytes(
    tokens: int, vocab: int, hidden: int, types: Types, *, head_trained: bool = True
) -> int:
    """What log-probs of labels take in their backward pass: logits of a few tokens at a time.

    Pieces are those of `logprobs.label_logprobs`. With a trained head its gradient beside the one
    of the micro-batches before.
    """
    rows = max(1, max(LEAST_LOGITS, vocab * hidden) // max(vocab, 1))
    narrow = types.product < EXACT
    number = EXACT + 2 * types.product if narrow else types.exact
    piece = min(tokens, rows) * vocab * number
    gradient = vocab * hidden * (types.exact + (2 * types.product if narrow else 0))
    return piece + gradient * head_trained + tokens * hidden * types.product


def prefill_bytes(block: Block, types: Types, tokens: int) -> int:
    """What a forward without gradients needs for so many tokens: a layer at its widest."""
    numbers = 2 * block.hidden + 3 * block.inner
    return tokens * numbers * types.product


def key_value_bytes(block: Block, layers: int, tokens: int, itemsize: int) -> int:
    """Keys and values of so many tokens in all layers."""
    return 2 * layers * block.kv_heads * block.head_dim * tokens * itemsize


def state_bytes(module: nn.Module, optim: OptimConfig, vocab: int) -> int | None:
    """Bytes of an optimiser's state for the trained weights of a module on the meta device.

    None where that is not known: of a function whose optimiser takes no step there. Raises
    ConfigError where the optimiser cannot train the module.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if optim.optimizer in EIGHT_BIT:
        return _eight_bit(module)
    if optim.optimizer == "adafactor":  # a number of each row and of each column
        return sum(p.itemsize * (sum(p.shape[-2:]) if p.ndim > 1 else p.numel()) for p in trained)
    try:
        made = make_optimizers(module, optim.completed(1e-6, 1e-7, 1), vocab)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in made:
            optimizer.step()
    except SelfRewardingError:
        raise
    except Exception:  # of a user's function, or of kernels that there are not for this device
        return None
    finally:
        for parameter in trained:
            parameter.grad = None
    return sum(
        value.numel() * value.itemsize
        for optimizer in made
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim  # steps are counted in scalars
    )


def _eight_bit(module: nn.Module) -> int:
    """Two states of a byte a number with their scales; of embeddings and small tensors float32."""
    embeddings = {id(p.weight) for p in module.modules() if isinstance(p, nn.Embedding)}
    found = 0.0
    for parameter in module.parameters():
        if parameter.requires_grad:
            wide = id(parameter) in embeddings or parameter.numel() < LEAST_EIGHT_BIT
            found += 2 * parameter.numel() * (4 if wide else 1 + 4 / BLOCK)
    return round(found)
