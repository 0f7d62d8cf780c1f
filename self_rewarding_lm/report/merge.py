"""A stage's adapter merged into its model: a folder that needs neither peft nor this library.

Beside the weights are a card and what was beside the adapter: the tokenizer, where responses end.
"""

import shutil
from pathlib import Path

from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.models.loading import load_causal_lm
from self_rewarding_lm.models.merging import MergedAdapter
from self_rewarding_lm.report.card import with_card
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.runs.stage_files import ADAPTER_FILE
from self_rewarding_lm.runs.weights import CARD, TRAINED, save_folder

OF_ADAPTER = (ADAPTER_FILE, "adapter_config.json", CARD, TRAINED)
"""Files that the merged model has no use for, or has its own of."""


def merge_stage(run: Run, stage: str, folder: Path, *, torch_dtype: str | None = None) -> None:
    """Write a stage's model with its adapter merged into the weights to a new folder.

    torch_dtype: of the weights, as for load_causal_lm. Raises StoreError if the folder holds
    anything, the stage's weights are not there or no adapter's, or the merged model gives other
    logits than the adapter; ConfigError if the base model is not found.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise StoreError(f"{folder} exists and holds something; give the name of a new folder.")
    file = run.weights(stage)
    if file.name != ADAPTER_FILE:
        raise StoreError(
            f"stage {stage!r} of {run.folder} has no adapter to merge: {file.parent} already holds "
            "all weights and what goes with them."
        )
    model, _ = load_causal_lm(file.parent, torch_dtype=torch_dtype)

    def beside(draft: Path) -> None:
        for other in file.parent.iterdir():
            if other.is_file() and other.name not in OF_ADAPTER:
                shutil.copy(other, draft / other.name)

    save_folder(MergedAdapter(model), folder, with_card(run, stage, beside))
