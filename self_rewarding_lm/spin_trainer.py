"""A trainer for those who want self-play alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from self_rewarding_lm.config import OptimConfig, SamplingConfig
from self_rewarding_lm.errors import ConfigError, typed
from self_rewarding_lm.stages import SelfPlayConfig
from self_rewarding_lm.tokens import Tokenizer
from self_rewarding_lm.trainer import SelfRewardingTrainer


class SPINTrainer(SelfRewardingTrainer):
    """A trainer of one SPIN stage (arXiv:2401.01335).

    train_sft_dataset: rows with a prompt and a completion, as for SFT. spin_lambda, or
    spin_kwargs=dict(λ=...): lambda of Eq. 4.7. checkpoint_every: steps between copies of the
    weights. checkpoint_folder is the run directory; the other arguments are those of
    SelfRewardingTrainer and OptimConfig.
    """

    @typed
    def __init__(
        self,
        model: nn.Module,
        *,
        train_sft_dataset: Any,
        valid_sft_dataset: Any = None,
        max_seq_len: int | None = None,
        spin_lambda: float = 0.1,
        spin_kwargs: Mapping[str, float] = {},
        iterations: int = 1,
        mix_previous: bool = False,
        epochs: int | None = None,
        num_train_steps: int | None = None,
        batch_size: int = 16,
        learning_rate: float | None = None,
        dropout: float = 0.0,
        generation: SamplingConfig | None = None,
        checkpoint_every: int | None = None,
        tokenizer: Tokenizer | None = None,
        tokenizer_encode: Callable[[str], Any] | None = None,
        tokenizer_decode: Callable[[Tensor], str] | None = None,
        eos_id: int | None = None,
        seed: int = 0,
        checkpoint_folder: str | Path = "./spin-checkpoints",
        accelerate_kwargs: Mapping[str, Any] = {},
        quiet: bool = False,
    ) -> None:
        unknown = set(spin_kwargs) - {"λ", "spin_lambda"}
        if unknown:
            raise ConfigError(
                f"spin_kwargs knows 'λ' (or 'spin_lambda'); got {', '.join(sorted(unknown))}."
            )
        stage = SelfPlayConfig(
            train_dataset=train_sft_dataset,
            valid_dataset=valid_sft_dataset,
            max_seq_len=max_seq_len,
            spin_lambda=next(iter(spin_kwargs.values()), spin_lambda),
            iterations=iterations,
            mix_previous=mix_previous,
            num_train_steps=num_train_steps,
            dropout=dropout,
            generation=generation or SamplingConfig(),
            optim=OptimConfig(
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                checkpoint_every=checkpoint_every,
            ),
        )
        super().__init__(
            model,
            finetune_configs=[stage],
            tokenizer=tokenizer,
            tokenizer_encode=tokenizer_encode,
            tokenizer_decode=tokenizer_decode,
            eos_id=eos_id,
            seed=seed,
            checkpoints_folder=checkpoint_folder,
            accelerate_kwargs=accelerate_kwargs,
            quiet=quiet,
        )
