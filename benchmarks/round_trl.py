"""The same round as a user puts it together today: generate, a regex, TRL's DPOTrainer.

Prompts are sorted by length and padded on the left; candidates of a prompt share a batch by
num_return_sequences, and so do the judgements of a candidate. Candidates that were cut off are
judged too, and enter no pair. TRL's trainer has its own defaults but for what a round says: it
asks the reference before it trains, which takes less memory than a second model, and keeps its
activations, as ours does.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from round_clock import PhaseClock
from round_request import JUDGE_PROMPT, Round, score_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer


class TrlRound:
    def __init__(self, asked: Round, folder: Path, clock: PhaseClock) -> None:
        self.asked, self.folder, self.clock = asked, folder, clock
        self.tokenizer: Any = AutoTokenizer.from_pretrained(asked.model, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)

    def run(self) -> dict:
        """The round; what it made."""
        asked = self.asked
        with self.clock.phase("candidates"):
            found = self._generate(asked.prompts, asked.samples, asked.new_tokens)
        new_tokens = sum(len(ids) for group in found for ids, _ in group)
        texts = [[self._text(ids) for ids, _ in group] for group in found]
        with self.clock.phase("judging"):
            questions = [
                JUDGE_PROMPT.format(prompt=prompt, response=text)
                for prompt, group in zip(asked.prompts, texts, strict=True)
                for text in group
            ]
            answers = self._generate(questions, asked.judgements, asked.judge_tokens)
            scores = iter(
                sum(score_of(self._text(ids)) for ids, _ in group) / len(group) for group in answers
            )
        rows = []
        for prompt, group, words in zip(asked.prompts, found, texts, strict=True):
            rated = [
                (next(scores), text, ended) for text, (_, ended) in zip(words, group, strict=True)
            ]
            whole = sorted((score, text) for score, text, ended in rated if ended)
            if len(whole) > 1 and whole[-1][0] > whole[0][0]:
                rows.append(_row(prompt, whole[-1][1], whole[0][1]))
        if rows:
            self._train(rows)
        self.model.save_pretrained(str(self.folder / "model"))
        return {
            "candidates": len(asked.prompts) * asked.samples,
            "new_tokens": new_tokens,
            "judgements": sum(map(len, answers)),
            "pairs": len(rows),
        }

    @torch.no_grad()
    def _generate(
        self, texts: Sequence[str], samples: int, new_tokens: int
    ) -> list[list[tuple[list[int], bool]]]:
        """For each text so many answers: new ids up to the end token, and whether it came."""
        asked, tokenizer = self.asked, self.tokenizer
        ends = {*_listed(self.model.generation_config.eos_token_id), tokenizer.eos_token_id}
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
        order = sorted(range(len(chats)), key=lambda i: len(chats[i]))
        found: list[list[tuple[list[int], bool]]] = [[] for _ in texts]
        each = max(1, asked.rows // samples)
        narrow = (
            torch.autocast("cpu", torch.bfloat16) if asked.precision == "bf16" else nullcontext()
        )
        self.model.eval()
        for start in range(0, len(order), each):
            batch = order[start : start + each]
            inputs = tokenizer(
                [chats[i] for i in batch],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            )
            with narrow:
                out = self.model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    do_sample=True,
                    temperature=asked.temperature,
                    top_p=asked.top_p,
                    top_k=0,
                    num_return_sequences=samples,
                    max_new_tokens=new_tokens,
                    eos_token_id=sorted(ends),
                    pad_token_id=tokenizer.pad_token_id,
                )
            for place, row in enumerate(out[:, inputs["input_ids"].shape[1] :].tolist()):
                end = next((n for n, token in enumerate(row, 1) if token in ends), None)
                found[batch[place // samples]].append((row[:end], end is not None))
        return found

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _train(self, rows: list[dict]) -> None:
        asked, clock = self.asked, self.clock
        settings = DPOConfig(
            output_dir=str(self.folder / "trl"),
            num_train_epochs=1,
            per_device_train_batch_size=asked.batch,
            learning_rate=asked.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            beta=asked.beta,
            max_length=None,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=asked.precision == "bf16",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        original = DPOTrainer._precompute_ref_logps
        DPOTrainer._precompute_ref_logps = clock.calls("reference", original)  # type: ignore[method-assign]
        trainer = DPOTrainer(
            model=self.model,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
        )
        with clock.phase("training"):
            trainer.train()


def run(asked: Round, folder: Path, clock: PhaseClock) -> dict:
    return TrlRound(asked, folder, clock).run()


def _listed(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _row(prompt: str, chosen: str, rejected: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
