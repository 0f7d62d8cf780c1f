"""Optimisers by name, the learning rate of a step, and updates that a narrow type rounds away.

Knows the parts of a module by their kind: which weights are embeddings, norms, hidden matrices.
Knows no model by name, and nothing of losses, of processes or of how a forward computes.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from self_rewarding_lm.checks import Checker
from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.errors import ConfigError, an_adapter, mixed_precision, setting
from self_rewarding_lm.runs.installed import install

SAMPLED_NUMBERS = 65_536
"""Numbers of a parameter that `updates_vanish` looks at, at most, evenly spread over it."""


_EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")


_UNSHARDED_ONLY = ("adafactor", *_EIGHT_BIT)  # they cannot step a DTensor


_STEPS_OF_THE_RATE = ("adamw", "muon", *_EIGHT_BIT)  # an update is about as large as the rate


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


_LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


Groups = list[dict[str, Any]]


def make_optimizers(
    module: nn.Module, optim: OptimConfig, vocab: int
) -> list[torch.optim.Optimizer]:
    """The optimisers of a stage: one, or two if weights are divided between two (muon, 8 bit).

    Weight decay acts on matrices; norms, biases and embeddings, a tied head included, are left out.
    Raises ConfigError if nothing can be trained, and as `check_optimizer` does.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    if not params:
        raise ConfigError("the model has no parameter that requires gradients; nothing to train.")
    if callable(optim.optimizer):
        optimizer = optim.optimizer(params)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"optim.optimizer must return a torch optimiser; got {type(optimizer).__name__}."
            )
        return [optimizer]
    check_optimizer(module, optim)
    kinds = _ParameterKinds(module)
    main_ids, make_main, make_other = _division(kinds, optim, vocab)
    main = [p for p in params if id(p) in main_ids]
    others = [p for p in params if id(p) not in main_ids]
    return [
        make(kinds.groups(part, optim.weight_decay), optim)
        for make, part in ((make_main, main), (make_other, others))
        if part
    ]


def check_optimizer(
    module: nn.Module, optim: OptimConfig, *, scaled: bool = False, sharded: bool = False
) -> None:
    """Raise ConfigError if an optimiser cannot train a model; called before any work.

    scaled: whether the loss is scaled, as in mixed precision with float16. sharded: whether FSDP2
    will spread the weights over processes. An optimiser that a function makes is not checked.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    half = any(p.dtype == torch.float16 for p in trained)
    sharded = sharded or any(hasattr(p, "to_local") for p in trained)
    advice = (
        f"Load the model in float32 (and set {mixed_precision('fp16')} for speed), or train an "
        f"adapter with {an_adapter()}, whose weights are float32."
    )
    if half and scaled:
        raise ConfigError(
            f"{setting('mixed_precision', 'fp16')} scales the loss so that small gradients are "
            f"kept, which needs trained weights in float32; some are float16. {advice}"
        )
    if half and optim.optimizer in ("adamw", "muon"):
        raise ConfigError(
            "AdamW keeps its mean of squared gradients in the type of the weights, and some of "
            "these are float16, where the share that a gradient below 5e-3 has in that mean is 0: "
            f"steps become many times too long. {advice}"
        )
    if sharded and optim.optimizer in _UNSHARDED_ONLY:
        raise ConfigError(
            f"{setting('optimizer', optim.optimizer)} cannot step weights that FSDP2 spreads over "
            "processes: torch's Adafactor and bitsandbytes compute on whole tensors. Take 'adamw', "
            "'muon' or 'sgd', or train without FSDP."
        )
    if optim.optimizer in _EIGHT_BIT and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{setting('optimizer', optim.optimizer)} needs the package bitsandbytes, which is not "
            f"installed: {install('bitsandbytes')}"
        )


def learning_rate_at(step: int, total: int, optim: OptimConfig) -> float:
    """The rate of optimiser step `step` of `total`, the first being 0.

    In w warm-up steps it is learning_rate * (step + 1) / w, so that the last of them has all of
    learning_rate. The step after them has it too, and from there it falls to final_learning_rate
    at the last step. With "constant", or a single step after the warm-up, it stays learning_rate.
    """
    peak, final = optim.learning_rate, optim.final_learning_rate
    assert peak is not None and final is not None
    warmup = warmup_steps_of(total, optim)
    if step < warmup:
        return peak * (step + 1) / warmup
    if optim.schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - 1 - warmup)  # 0 to 1
    height = 1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final + (peak - final) * height


def warmup_steps_of(total: int, optim: OptimConfig) -> int:
    """Steps of warm-up among `total`; if given as a share below 1, rounded up."""
    steps = optim.warmup_steps
    return int(steps) if steps >= 1 else math.ceil(steps * total - 1e-9)  # 0.07 * 100 is over 7


@torch.no_grad()
def updates_vanish(params: Iterable[nn.Parameter], rate: float) -> float:
    """The share of trained weights w with w - rate equal to w in their own type, from 0 to 1.

    In bfloat16 these are all with |w| > 512 * rate, and none with |w| < 256 * rate. Of a large
    parameter a sample is looked at; of one that is spread over processes, this process's part.
    """
    lost = total = 0.0
    for parameter in params:
        local: Tensor = getattr(parameter, "to_local", lambda p=parameter: p)()
        if not parameter.requires_grad or local.numel() == 0:
            continue
        stride = -(-local.numel() // SAMPLED_NUMBERS)  # rounded up
        sample = local.reshape(-1)[::stride]  # (n,)
        wide = sample if sample.dtype == torch.float64 else sample.float()
        is_lost = (wide - rate).to(sample.dtype) == sample
        lost += is_lost.float().mean().item() * local.numel()
        total += local.numel()
    return lost / total if total else 0.0


def warn_of_lost_updates(
    module: nn.Module, optim: OptimConfig, stage: str, *, checker: Checker | None = None
) -> None:
    """Check `lost_updates`: whether most updates of a stage would be rounded away.

    Only for optimisers whose updates are about as large as the learning rate: not for SGD,
    Adafactor or a function. Raises TrainingError if the check is set to "error".
    """
    if optim.optimizer not in _STEPS_OF_THE_RATE or optim.learning_rate is None:
        return
    share = updates_vanish(module.parameters(), optim.learning_rate)
    trained = [p for p in module.parameters() if p.requires_grad]
    dtypes = {str(p.dtype).removeprefix("torch.") for p in trained}
    (checker or Checker(None, stage)).see(
        "lost_updates",
        share,
        f"a step of learning rate {optim.learning_rate:.3g} does not change {share:.0%} of the "
        "weights: it is less than half of the distance to the next number of their type "
        f"({', '.join(sorted(dtypes))}). Load the model in float32 (and set "
        f"{mixed_precision('bf16')} for speed), train an adapter with {an_adapter()}, or take "
        "a higher learning rate.",
    )


class _ParameterKinds:
    """The ids of a module's parameters, by the kind of layer that holds them."""

    def __init__(self, module: nn.Module) -> None:
        self.embeddings: set[int] = set()
        self.linear: dict[int, nn.Parameter] = {}
        norms: set[int] = set()
        for layer in module.modules():
            params = list(layer.parameters(recurse=False))
            if isinstance(getattr(layer, "base_layer", layer), _EMBEDDINGS):  # or peft's around one
                self.embeddings |= {id(p) for p in layer.parameters()}
            elif _is_linear(layer):
                self.linear |= {id(p): p for p in params if p.ndim >= 2}
            elif type(layer).__name__.lower().endswith("norm"):
                norms |= {id(p) for p in params}
        self.all = {id(p) for p in module.parameters()}
        undecayed = self.embeddings | norms
        self.decayed = {
            id(p)
            for p in module.parameters()
            # an axis of length 1 is for broadcasting: a scale or a bias, such as one of each head
            if p.ndim >= 2 and id(p) not in undecayed and (id(p) in self.linear or 1 not in p.shape)
        }

    def hidden(self, vocab: int) -> set[int]:
        """Matrices of linear layers that neither read nor write the vocabulary."""
        ids = {i for i, p in self.linear.items() if p.ndim == 2 and vocab not in p.shape}
        return ids - self.embeddings

    def groups(self, params: list[nn.Parameter], weight_decay: float) -> Groups:
        """An optimiser's groups: parameters with weight decay, and without."""
        decayed = [p for p in params if id(p) in self.decayed]
        others = [p for p in params if id(p) not in self.decayed]
        groups: Groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def _is_linear(layer: nn.Module) -> bool:
    # transformers' Conv1D, of GPT-2, is a linear layer whose weight is transposed
    return isinstance(layer, _LINEAR) or type(layer).__name__.endswith("Conv1D")


Maker = Callable[[Groups, OptimConfig], torch.optim.Optimizer]


def _division(
    kinds: _ParameterKinds, optim: OptimConfig, vocab: int
) -> tuple[set[int], Maker, Maker]:
    """Ids of the main optimiser's parameters, what makes it, and what makes that of the others."""
    if optim.optimizer == "muon":
        return kinds.hidden(vocab), _muon, _adamw
    if optim.optimizer in _EIGHT_BIT:
        return kinds.all - kinds.embeddings, _adamw_8bit, _adamw_32bit
    make = {"adamw": _adamw, "adafactor": _adafactor, "sgd": _sgd}[optim.optimizer]
    return kinds.all, make, make


def _adamw(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    rate = optim.learning_rate or 0.0
    return torch.optim.AdamW(groups, lr=rate, betas=optim.betas, fused=_can_fuse(groups))


def _muon(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    # match_rms_adamw makes one learning rate right for both optimisers
    rate = optim.learning_rate or 0.0
    return torch.optim.Muon(groups, lr=rate, adjust_lr_fn="match_rms_adamw")


def _adafactor(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=optim.learning_rate or 0.0)


def _sgd(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=optim.learning_rate or 0.0)  # its fused step knows no DTensor


def _adamw_8bit(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    from bitsandbytes import optim as optimizers  # type: ignore[import-not-found]

    is_paged = optim.optimizer == "paged_adamw_8bit"
    make = optimizers.PagedAdamW8bit if is_paged else optimizers.AdamW8bit
    return make(groups, lr=optim.learning_rate or 0.0, betas=optim.betas)


def _adamw_32bit(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    """Of embeddings, beside 8 bit (arXiv:2110.02861): their gradients differ most in size."""
    from bitsandbytes import optim as optimizers  # type: ignore[import-not-found]

    is_paged = optim.optimizer == "paged_adamw_8bit"
    make = optimizers.PagedAdamW32bit if is_paged else optimizers.AdamW32bit
    return make(groups, lr=optim.learning_rate or 0.0, betas=optim.betas)


def _can_fuse(groups: Groups) -> bool | None:
    """True if all weights are on devices that have the fused step; None leaves it to torch."""
    params = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)
    return fused or None
