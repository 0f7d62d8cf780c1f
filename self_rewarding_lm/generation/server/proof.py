"""Whether a server has the model's present weights: its log-probs beside the model's own.

Knows tokens and their log-probs; nothing of how a server is asked.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from self_rewarding_lm.errors import ServerError
from self_rewarding_lm.generation.server.reloading import Logprobs
from self_rewarding_lm.models.inference import inferring
from self_rewarding_lm.models.interface import TokenModel, device_of
from self_rewarding_lm.records import Ids
from self_rewarding_lm.text import amount

ROWS, ROW = 32, 33
"""Rows that are compared, and tokens of each: so many that a cache of prefixes would hold them."""


TOKENS = 16
"""Tokens whose log-probs are asked for after each row."""


MOST_APART = 0.5
"""How far log-probs of the server and the model may be apart (root of the mean square). bfloat16
beside float32 makes 0.09 in SmolLM2; even chances for all tokens would be 3 off there."""


LEAST = -30.0
"""Log-probs below it count as it."""


LEAST_CHANGE = 5e-3
"""A change of the model's log-probs that a server shows, whatever its logits are rounded to."""


FOLLOWED = 0.5
"""The share of the model's own change that the server must have made, at least."""


def rows_of(model: TokenModel) -> list[Ids]:
    """The rows, the same ones for all weights; no tokens of a vocabulary's ends, which are special.

    Shorter than ROW if the model takes no more.
    """
    vocab = model.vocab
    length = ROW if model.max_len is None else max(1, min(ROW, model.max_len - 1))
    first, middle = vocab // 4, max(1, vocab // 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(first, first + middle, (ROWS, length), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def tokens_of(model: TokenModel) -> list[int]:
    """The tokens whose log-probs are compared, spread over the vocabulary."""
    return sorted({place * model.vocab // TOKENS for place in range(TOKENS)})


@torch.no_grad()
def own_logprobs(model: TokenModel) -> Float[Tensor, "r v"]:
    """What the model says after each row, on the CPU."""
    with inferring(model.module):
        model.refresh()
        device = device_of(model.module)
        last = [model.logits(torch.tensor([row], device=device))[0, -1] for row in rows_of(model)]
    return torch.stack(last).float().log_softmax(dim=-1).cpu()


class Proof:
    """What one server said of the weights that it had, from one set of weights to the next."""

    def __init__(self) -> None:
        self._own: Float[Tensor, "r v"] | None = None
        self._said: list[Logprobs] = []
        self._apart = 0.0

    def check(self, own: Float[Tensor, "r v"], said: list[Logprobs]) -> None:
        """Compare what the server says of each row with what the model says.

        Raises ServerError if they are further apart than rounding can make it, or if the server
        did not go along with the model since the weights before: it changed by less than half as
        much, or, where the model changed by more than rounding explains, not in its direction.
        """
        present = _side_by_side(own, said, said)
        apart = _size(present[:, 1] - present[:, 0])
        if not len(present) or not apart <= MOST_APART:
            raise ServerError(
                f"the server does not have the model's weights: their log-probs of "
                f"{amount(len(present), 'token')} are {apart:.3g} apart (root of the mean square), "
                f"and rounding makes {MOST_APART:g} at most. Nothing was generated. Does the "
                "command serve {checkpoint}, in 16 bits at least? Without reload each stage starts "
                "a server."
            )
        if self._own is not None:
            now, then = (
                _side_by_side(own, said, self._said),
                _side_by_side(self._own, self._said, said),
            )
            ours, theirs = (now - then).unbind(dim=1)
            ours_size, theirs_size = _size(ours), _size(theirs)
            stayed = ours_size > LEAST_CHANGE and theirs_size < FOLLOWED * ours_size
            along = float(ours @ theirs) >= FOLLOWED * float(ours @ ours)
            if stayed or (ours_size > 2 * self._apart and not along):
                raise ServerError(
                    "the server still has the weights of an earlier stage: since then the model's "
                    f"log-probs changed by {ours_size:.3g} (root of the mean square), and the "
                    f"server's by {theirs_size:.3g}. Nothing was generated. Without reload each "
                    "stage starts a server."
                )
        self._own, self._said, self._apart = own, said, apart


def _side_by_side(
    own: Tensor, said: list[Logprobs], wanted: list[Logprobs]
) -> Float[Tensor, "n 2"]:
    """The model's and the server's log-probs of all tokens that are in `said` and `wanted`."""
    pairs = [
        (float(own[row, token]), value)
        for row, logprobs in enumerate(said)
        for token, value in sorted(logprobs.items())
        if token in wanted[row] and token < own.shape[1]
    ]
    return torch.tensor(pairs, dtype=torch.float64).view(-1, 2).clamp(min=LEAST)


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
