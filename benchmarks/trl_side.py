"""TRL's side of a training run.

TRL's trainers get the ids that ours gets: DPOTrainer reads texts alone, so its reading is replaced
by the ids; SFTTrainer takes ids. What it does before training (maps, hashes of the weights) is not
timed; its pass of the reference and `train()` are.
"""

import gc
from pathlib import Path
from typing import Any

from datasets import Dataset
from training_meter import Meter
from training_request import BETA, DPO, SETTINGS, WARM_RATE, Request
from training_rows import Pair
from transformers import AutoTokenizer, PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

IGNORED = -100  # labels that are not learnt


class Trl:
    """One model and its rows. folder: for what TRL writes."""

    def __init__(
        self, module: Any, request: Request, *, pairs: list[Pair], folder: Path, meter: Meter
    ) -> None:
        self.module, self.request, self.pairs = module, request, pairs
        self.folder, self.meter = folder, meter
        self.setting = SETTINGS[request.side]
        self.tokenizer = AutoTokenizer.from_pretrained(request.model)
        meter.watch(module)

    def settings(self) -> dict:
        return {"attention": self.module.config._attn_implementation}

    def warm(self) -> float:
        """A step on the first batch, which changes no weight; its loss."""
        return self._train(self.pairs[: self.request.batch_size], WARM_RATE)

    def run(self) -> float:
        """One epoch, with the reference where there is one; the first step's loss."""
        return self._train(self.pairs, self.request.learning_rate)

    def _train(self, pairs: list[Pair], rate: float) -> float:
        make = self._dpo if self.request.kind == DPO else self._sft
        trainer = make(pairs, rate)
        trainer.remove_callback(PrinterCallback)
        with self.meter.phase("training"):
            trainer.train()
        loss = trainer.state.log_history[0]["loss"]
        del trainer
        gc.collect()
        return loss

    def _dpo(self, pairs: list[Pair], rate: float) -> DPOTrainer:
        setting = self.setting
        rows = [
            {
                "prompt_ids": list(pair.prompt),
                "chosen_ids": list(pair.chosen),
                "rejected_ids": list(pair.rejected),
                "length": pair.longest,
            }
            for pair in pairs
        ]
        settings = DPOConfig(
            **self._common(rate),
            beta=BETA,
            max_length=self.request.max_length,
            precompute_ref_log_probs=not setting.live,
            precompute_ref_batch_size=setting.reference_batch,
        )
        trainer = _Pairs(self.meter, self.module, settings, Dataset.from_list(rows), self.tokenizer)
        if trainer.ref_model is not None:
            self.meter.watch(trainer.ref_model)
        return trainer

    def _sft(self, pairs: list[Pair], rate: float) -> SFTTrainer:
        rows = [
            {
                "input_ids": [*pair.prompt, *pair.chosen],
                "labels": [*[IGNORED] * len(pair.prompt), *pair.chosen],
                "length": len(pair.prompt) + len(pair.chosen),
            }
            for pair in pairs
        ]
        settings = SFTConfig(
            **self._common(rate),
            max_length=None,  # they are cut already
            padding_free=self.setting.padding_free,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        return SFTTrainer(
            model=self.module,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
        )

    def _common(self, rate: float) -> dict:
        """What both trainers are told alike, and ours is told too."""
        request, grouped = self.request, self.setting.grouped
        return {
            "output_dir": str(self.folder / "trl"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": request.batch_size,
            "gradient_accumulation_steps": 1,
            "learning_rate": rate,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "gradient_checkpointing": request.checkpointing,
            "bf16": request.precision == "bf16",
            "use_cpu": request.device == "cpu",
            "seed": 0,
            "train_sampling_strategy": "group_by_length" if grouped else "random",
            "remove_unused_columns": False,  # else the column of lengths is gone before it is read
            "report_to": "none",
            "save_strategy": "no",
            "logging_first_step": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }


class _Pairs(DPOTrainer):
    """A DPOTrainer of rows that are ids already, with a clock at its pass of the reference."""

    def __init__(
        self, meter: Meter, model: Any, settings: DPOConfig, rows: Dataset, tokenizer: Any
    ) -> None:
        self.meter = meter
        super().__init__(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)

    def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        with self.meter.phase("reference"):
            return super()._precompute_ref_logps(dataset, name, batch_size)
