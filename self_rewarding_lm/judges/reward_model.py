"""A reward model of transformers judges: a sequence classifier with a tokenizer of its own.

Knows conversations and their scores; nothing of the policy's tokens.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from self_rewarding_lm.context import Context
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import JudgeError, give_tokenizer
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.functions import RewardOutputs
from self_rewarding_lm.models.batching import micro_batches, pad_rows
from self_rewarding_lm.models.inference import inferring
from self_rewarding_lm.models.interface import device_of
from self_rewarding_lm.models.loading import load_classifier, longest_input
from self_rewarding_lm.records import Candidate, Ids, Judgement, Prompt
from self_rewarding_lm.scores import score_of


class RewardModelJudge(Judge):
    """Scores by a sequence-classification model that reads prompt and response as a conversation.

    model: a folder, a name on the hub or a module. tokenizer: default the one beside the model.
    chat_template: a name or Jinja text; default the tokenizer's own. torch_dtype: default that of
    the checkpoint ("auto"). A single output is the score; from several classes it is the expected
    class number under their softmax, as in ModuleJudge. A conversation longer than the model's
    limit is never cut and has no score (`too_long`). micro_batch_tokens: tokens that go through the
    model at once.

    The candidates of a prompt go through the model together and with no others; one by one if the
    model's config has no pad_token_id, because transformers would then read the score at a wrong
    token. Raises ConfigError if the model cannot be loaded, JudgeError without a chat template.
    """

    reads_weights = False

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: Any = None,
        *,
        chat_template: str | None = None,
        torch_dtype: str | torch.dtype = "auto",
        micro_batch_tokens: int = 16_384,
    ) -> None:
        self.module, own_tokenizer = load_classifier(model, torch_dtype=torch_dtype)
        source = own_tokenizer if tokenizer is None else tokenizer
        if source is None or not (chat_template or getattr(source, "chat_template", None)):
            raise JudgeError(
                "a RewardModelJudge renders prompt and response with its own tokenizer's chat "
                f"template; there is no {'tokenizer' if source is None else 'template'}. Give "
                "tokenizer= (transformers.AutoTokenizer.from_pretrained(...)) or chat_template=."
            )
        config: Any = getattr(self.module, "config", None)
        self.tokens = Tokens(source, eos_id=None, vocab=None, chat_template=chat_template)
        self.limit = longest_input(self.module, source)
        self.pad_id: int | None = getattr(config, "pad_token_id", None)
        self.micro_batch_tokens = micro_batch_tokens
        self._outputs = RewardOutputs()
        self.name = str(getattr(config, "_name_or_path", "") or type(self.module).__name__)

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        self.module.to(ctx.runtime.device)
        self.tokens.follow(ctx.tokens.rules, ctx.tokens.date)
        for prompt, candidates in zip(prompts, candidates_PG, strict=True):
            # 1. render the conversations; those that are too long have no score
            rows: list[tuple[Candidate, Ids]] = []
            for candidate in candidates:
                ids = self.conversation(prompt, candidate)
                if self.limit is None or len(ids) <= self.limit:
                    rows.append((candidate, ids))
                else:
                    yield self._judgement(candidate, None, "too_long")
            # 2. score the others in micro batches
            groups = micro_batches(
                [len(ids) for _, ids in rows],
                token_budget=self.micro_batch_tokens,
                max_rows=1 if self.pad_id is None else None,
            )
            for group in groups:
                scores = self._scores([rows[i][1] for i in group])
                for i, parsed in zip(group, map(score_of, scores), strict=True):
                    yield self._judgement(rows[i][0], parsed.score, parsed.reason)

    def conversation(self, prompt: Prompt, candidate: Candidate) -> Ids:
        """The ids that the reward model reads: the prompt's messages and the response."""
        if prompt.text is None or candidate.text is None:
            raise JudgeError(
                f"a RewardModelJudge reads texts, which need a tokenizer. {give_tokenizer()}"
            )
        messages = prompt.messages or ({"role": "user", "content": prompt.text},)
        begun = ""
        if messages[-1]["role"] == "assistant":  # the response goes on with an answer
            begun, messages = messages[-1]["content"], messages[:-1]
        response = {"role": "assistant", "content": begun + candidate.text}
        return self.tokens.conversation([*messages, response], candidate.id)

    @torch.no_grad()
    def _scores(self, rows: list[Ids]) -> list[float]:
        """The score of each row of ids."""
        ids, lengths = pad_rows(rows, self.pad_id or 0)  # (b, t), (b,)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (b, t)
        device = device_of(self.module)
        ids, mask = ids.to(device), mask.long().to(device)
        with inferring(self.module):
            return self._outputs.scores(
                lambda n: self.module(ids[:, :n], attention_mask=mask[:, :n]), *ids.shape
            )

    def _judgement(
        self, candidate: Candidate, score: float | None, reason: str | None
    ) -> Judgement:
        return Judgement(f"{candidate.id}/j0", (candidate.id,), self.name, score, reason)
