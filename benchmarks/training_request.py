"""What one run of one side is to do: written by the benchmark, read by its process.

And the settings of TRL that are tried; of each figure TRL's best one counts.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

WARM_RATE = 1e-30
"""A learning rate that leaves float32 weights as they are: that of the warm-up step."""
BETA = 0.1
DPO, SFT = "dpo", "sft"
OURS = "ours"


@dataclass(frozen=True)
class Setting:
    """Settings of TRL that change how its work is done, not what it is.

    grouped: rows of similar length share a batch (`train_sampling_strategy`). live: the reference
    is a second model, asked in each step; else it is asked before, `reference_batch` pairs at once
    (None: as many as in training). padding_free: rows stand one after the other in one line.
    """

    kind: str
    grouped: bool = False
    live: bool = False
    reference_batch: int | None = None
    padding_free: bool = False


SETTINGS = {
    "dpo_precomputed": Setting(DPO),
    "dpo_grouped": Setting(DPO, grouped=True),
    "dpo_grouped_one": Setting(DPO, grouped=True, reference_batch=1),
    "dpo_live": Setting(DPO, grouped=True, live=True),
    "sft_padded": Setting(SFT),
    "sft_grouped": Setting(SFT, grouped=True),
    "sft_padding_free": Setting(SFT, padding_free=True),
}


@dataclass(frozen=True)
class Request:
    """One run.

    side: "ours", or the name of a setting of TRL. kind: "dpo" or "sft". model, rows: a folder and a
    file. pairs: of the file's, the first so many. batch_size: pairs or rows an optimiser step, all
    of which go through the model at once. model without weights: they are drawn, the same ones on
    all sides. precision: of products, as Accelerate names it.
    """

    side: str
    kind: str
    model: str
    rows: str
    pairs: int
    batch_size: int
    max_length: int
    learning_rate: float
    checkpointing: bool
    threads: int
    device: str = "cpu"
    precision: str = "no"

    @property
    def batch_tokens(self) -> int:
        """The most tokens that a batch may have: what goes through the model at once."""
        return self.batch_size * self.max_length * (2 if self.kind == DPO else 1)

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_request(file: Path) -> Request:
    return Request(**json.loads(file.read_text(encoding="utf-8")))
