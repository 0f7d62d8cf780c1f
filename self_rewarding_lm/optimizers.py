"""Optimisers by name, and the learning rate of a step."""

import math
from typing import Any

import torch
from torch import nn

from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.errors import ConfigError


def make_optimizers(
    module: nn.Module, optim: OptimConfig, vocab: int
) -> list[torch.optim.Optimizer]:
    """The optimisers of a stage: one, or two where matrices and the rest go apart (muon)."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("the model has no parameter that requires gradients; nothing to train.")
    params = [p for _, p in named]
    if callable(optim.optimizer):
        made = optim.optimizer(params)
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(
                f"optim.optimizer must return a torch optimiser; got {type(made).__name__}."
            )
        return [made]
    if optim.optimizer == "adamw":
        return [_adamw(params, optim)]
    hidden = _hidden_matrices(module, vocab)
    rest = [p for p in params if id(p) not in hidden]
    matrices = [p for p in params if id(p) in hidden]
    if not matrices:
        return [_adamw(rest, optim)]
    muon = torch.optim.Muon(
        matrices,
        lr=optim.learning_rate or 0.0,
        weight_decay=optim.weight_decay,
        adjust_lr_fn="match_rms_adamw",  # so that one learning rate serves both optimisers
    )
    return [muon, _adamw(rest, optim)] if rest else [muon]


def learning_rate_at(step: int, total: int, optim: OptimConfig) -> float:
    """Warm-up, then from learning_rate at its end to final_learning_rate at the last step."""
    peak, final = optim.learning_rate, optim.final_learning_rate
    assert peak is not None and final is not None
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return peak
    done = (step - optim.warmup_steps) / max(1, total - 1 - optim.warmup_steps)
    left = 1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final + (peak - final) * left


def _adamw(params: list[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=optim.learning_rate or 0.0,
        betas=optim.betas,
        fused=fused or None,
    )


def _hidden_matrices(module: nn.Module, vocab: int) -> set[int]:
    """Weights of linear layers that neither read nor write the vocabulary."""
    return {
        id(part.weight)
        for part in module.modules()
        if isinstance(part, nn.Linear) and vocab not in part.weight.shape
    }
