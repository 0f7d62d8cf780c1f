"""One run of one side, in a process of its own: its memory is its own, its conditions are alike.

python benchmarks/training_worker.py request.json result.json
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from training_meter import DeviceMeter, Meter
from training_request import OURS, Request, read_request
from training_rows import load_pairs


def load_model(folder: str, device: str) -> Any:
    """A model in float32, each parameter in memory of its own, not in that of the file.

    Without weights in the folder they are drawn.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not any(Path(folder).glob("*.safetensors")):
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


def run(request: Request, folder: Path) -> dict:
    """Load, warm up, then one epoch under the meter."""
    torch.set_num_threads(request.threads)
    if request.side == OURS:  # both sides' libraries are imported before the meter begins
        from training_ours import Ours as Side
    else:
        from trl_side import Trl as Side
    pairs = load_pairs(Path(request.rows))[: request.pairs]
    module = load_model(request.model, request.device)
    meter = Meter(module) if request.device == "cpu" else DeviceMeter(module)
    side = Side(module, request, pairs=pairs, folder=folder, meter=meter)
    warm_loss = side.warm()
    meter.start()
    first_loss = side.run()
    return {
        **meter.report(),
        "side": request.side,
        "kind": request.kind,
        "pairs": len(pairs),
        "warm_loss": warm_loss,
        "first_loss": first_loss,
        "settings": {**side.settings(), "threads": torch.get_num_threads()},
    }


def main() -> None:
    request, result = read_request(Path(sys.argv[1])), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        found = run(request, Path(folder))
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
