"""The fast paths on a CUDA device against float64 on the CPU."""

from copy import deepcopy

import pytest
import torch

from self_rewarding_lm.models.batching import pad_rows
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.inference import inferring
from self_rewarding_lm.models.interface import Plan
from self_rewarding_lm.models.policy import Policy
from tests.support.models import VOCAB, transformer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu, needs_cuda]
PROMPTS = [(1, 2, 3), (1, 2, 3, 4, 5), (1, 2)]
NEW = ((6, 7, 8), (9, 10, 11), (12, 13, 14))
FARTHEST = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Log-probs of lively weights, whose logits are large."""


def of_transformers():
    pytest.importorskip("transformers")
    from tests.support.hf_models import tiny

    return tiny("llama", VOCAB)


@pytest.fixture(params=[transformer, of_transformers], ids=["x_transformers", "transformers"])
def module(request):
    return request.param()


def exact(module):
    """The log-probs of all next tokens after each prefix of each row, by the model's forward."""
    wide = adapt(deepcopy(module).double())
    rows = [(*p, *n) for p, n in zip(PROMPTS, NEW, strict=True)]
    with inferring(wide.module):
        return [wide.logits(torch.tensor([row]))[0].log_softmax(-1) for row in rows]


@pytest.mark.parametrize("dtype", FARTHEST)
def test_decoding_on_a_gpu_gives_what_float64_gives_on_the_cpu(module, dtype):
    truth = exact(module)
    model = adapt(module.to("cuda", dtype))
    with inferring(model.module):
        session = model.session(Plan((1, 2), 5, 3, 3))
        steps = [session.prefill(PROMPTS)]
        session.add(range(3))
        steps += [
            session.extend(torch.tensor(new, device="cuda")) for new in zip(*NEW, strict=True)
        ]
    for row, prompt in enumerate(PROMPTS):
        found = torch.stack([step[row] for step in steps]).double().log_softmax(-1).cpu()
        wanted = truth[row][len(prompt) - 1 :]
        assert float((found - wanted).abs().max()) < FARTHEST[dtype]


@pytest.mark.parametrize("dtype", FARTHEST)
def test_log_probs_of_packed_rows_on_a_gpu_are_those_of_float64_on_the_cpu(module, dtype):
    truth = exact(module)
    model = adapt(module.to("cuda", dtype))
    rows = [(*p, *n) for p, n in zip(PROMPTS, NEW, strict=True)]
    ids, lengths = pad_rows(rows)
    with inferring(model.module):
        found = Policy(model)(ids, lengths).double().cpu()
    for row, tokens in enumerate(rows):
        wanted = truth[row][:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert float((found[row, 1 : len(tokens)] - wanted).abs().max()) < FARTHEST[dtype]
