"""A stand-in for the ancestor's round: its own `sample`, its own `DPO`, in the order of its loop.

Its loop itself cannot be run: it reads no score in any text (`result.groups(1).isnumeric()` of a
tuple), and writes pairs of one fixed length. So this does what it does, one prompt after the other:
all candidates of a prompt in one call of `sample`, which has no cache, then the judgements of each
candidate in a call of their own, then DPO beside a live copy of the model.
"""

import warnings
from pathlib import Path

import torch
from peers import both_filters
from round_clock import PhaseClock
from round_request import SHORT_JUDGE_PROMPT, Round, score_of
from torch.nn.utils.rnn import pad_sequence
from workloads import Sampler, as_bytes, build_x_transformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from self_rewarding_lm_pytorch.dpo import DPO
    from self_rewarding_lm_pytorch.sampling_utils import sample

PAD = -1


class AncestorRound:
    def __init__(self, asked: Round, clock: PhaseClock) -> None:
        self.asked, self.clock = asked, clock
        self.net, _ = build_x_transformer(asked.dim, asked.depth)
        self.keep = both_filters(Sampler(asked.temperature, asked.top_p, None))

    def run(self) -> dict:
        """The round; what it made."""
        asked, clock = self.asked, self.clock
        pairs, judged = [], 0
        for text in asked.prompts:
            prompt = torch.tensor(as_bytes(text))
            with clock.phase("candidates"):
                answers = self._sample(prompt, asked.samples, asked.new_tokens)
            rated = []
            for answer in answers:
                question = SHORT_JUDGE_PROMPT.format(prompt=text, response=_text(answer))
                ids = torch.tensor(as_bytes(question))
                with clock.phase("judging"):
                    said = self._sample(ids, asked.judgements, asked.judge_tokens)
                rated.append((sum(score_of(_text(one)) for one in said) / len(said), answer))
                judged += len(said)
            best, worst = max(rated, key=_score), min(rated, key=_score)
            if best[0] > worst[0]:
                pairs.append(
                    (torch.cat((prompt, best[1])), torch.cat((prompt, worst[1])), len(prompt))
                )
        if pairs:
            self._train(pairs)
        count = len(asked.prompts) * asked.samples
        return {
            "candidates": count,
            "new_tokens": count * asked.new_tokens,
            "judgements": judged,
            "pairs": len(pairs),
        }

    @torch.no_grad()
    def _sample(self, prompt: torch.Tensor, samples: int, new_tokens: int) -> list[torch.Tensor]:
        out = sample(
            self.net,
            prompt.repeat(samples, 1),
            seq_len=len(prompt) + new_tokens,
            temperature=self.asked.temperature,
            filter_fn=self.keep,
            output_keep_prompt=True,
        )
        return [row[len(prompt) :] for row in out]

    def _train(self, pairs: list[tuple[torch.Tensor, torch.Tensor, int]]) -> None:
        asked = self.asked
        with self.clock.phase("training"):
            dpo = DPO(self.net, beta=asked.beta, pad_id=PAD)
            adam = torch.optim.Adam(self.net.parameters(), lr=asked.learning_rate)
            for start in range(0, len(pairs), asked.batch):
                some = pairs[start : start + asked.batch]
                better, worse = (
                    pad_sequence([pair[k] for pair in some], batch_first=True, padding_value=PAD)
                    for k in (0, 1)
                )
                loss = dpo(better, worse, torch.tensor([pair[2] for pair in some]))
                loss.backward()
                adam.step()
                adam.zero_grad()


def run(asked: Round, folder: Path, clock: PhaseClock) -> dict:
    return AncestorRound(asked, clock).run()


def _score(rated: tuple[float, torch.Tensor]) -> float:
    return rated[0]


def _text(ids: torch.Tensor) -> str:
    return "".join(chr(max(32, int(i))) for i in ids)
