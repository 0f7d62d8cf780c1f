"""Whether the fast paths give on a device what float64 gives on the CPU.

Each model is small and random, once in float64 on the CPU, where its own forward is the truth, and
once on the device. A fast path may be as far from the truth as rounding takes the model's own
forward on that device in that type, times SLACK, or BOUNDS.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

from self_rewarding_lm.generation.engine import Decoding, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.score_trie import build_trie, score_probabilities
from self_rewarding_lm.models.batching import pad_rows
from self_rewarding_lm.models.families import adapt
from self_rewarding_lm.models.inference import inferring
from self_rewarding_lm.models.interface import Plan, TokenModel
from self_rewarding_lm.models.policy import Policy

VOCAB = 512
PROMPTS, SHARED, NEW = 6, 8, 12
SLACK = 3.0
BOUNDS = {torch.float32: 2e-4, torch.bfloat16: 2e-2}
WINDOW = 16  # of the model that slides


@dataclass(frozen=True)
class Rows:
    """Prompts with a beginning in common, of several lengths, and what follows each."""

    prompts: list[tuple[int, ...]]
    answers: list[tuple[int, ...]]

    @property
    def whole(self) -> list[tuple[int, ...]]:
        return [(*p, *a) for p, a in zip(self.prompts, self.answers, strict=True)]


def make_rows() -> Rows:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (count,), generator=generator).tolist())

    shared = ids(SHARED)
    prompts = [(*shared, *ids(5 + 3 * n)) for n in range(PROMPTS)]
    return Rows(prompts, [ids(NEW) for _ in prompts])


def make_models() -> dict[str, Callable[[], nn.Module]]:
    """Makers of models in float32 on the CPU, by name."""
    return {
        "llama": partial(_of_transformers, "Llama"),
        "llama with LoRA": partial(_of_transformers, "Llama", adapter=True),
        "mistral, sliding": partial(_of_transformers, "Mistral", sliding_window=WINDOW),
        "x-transformers": _x_transformer,
    }


def check_paths(
    name: str, make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype
) -> Iterator[dict]:
    """An entry for each path: how far it and the model's own forward are from float64."""
    torch.manual_seed(0)
    original, rows = make(), make_rows()
    exact = deepcopy(original).double()
    module = original.to(device, dtype)
    truth = _forward(exact, rows, torch.device("cpu"))  # (r, NEW, v)
    own = _apart(_forward(module, rows, device), truth)
    bound = max(SLACK * own, BOUNDS[dtype])
    model = adapt(module)
    for path, found in _paths(model, rows, truth):
        yield _entry(name, path, dtype, found, own, bound)
    found, own = _gradients(exact, module, rows, device)
    yield _entry(
        name, "training: gradients", dtype, found, own, max(SLACK * own, 5 * BOUNDS[dtype])
    )


def _paths(model: TokenModel, rows: Rows, truth: Tensor) -> Iterator[tuple[str, float]]:
    """The distance from the truth of each way to the log-probs of the answers' tokens."""
    yield "decoding, rows together", _apart(_decoded(model, rows), truth)
    chosen = truth.gather(-1, torch.tensor(rows.answers)[..., None])[..., 0]  # (r, NEW)
    policy = Policy(model)
    with inferring(model.module):
        ids, lengths = pad_rows(rows.whole)
        logprobs = policy(ids, lengths).cpu().double()
    of_answers = [row[int(n) - NEW : int(n)] for row, n in zip(logprobs, lengths, strict=True)]
    yield "log-probs of packed rows", _apart(torch.stack(of_answers), chosen)
    yield "expected scores", _scores(model, rows, truth)
    yield "greedy answers", _greedy(model, rows)


def _decoded(model: TokenModel, rows: Rows) -> Tensor:
    """Log-probs (r, NEW, v) of a session: prompts first, then a token of each row at a time."""
    longest = max(map(len, rows.prompts))
    plan = Plan(rows.prompts[0][:SHARED], longest, NEW, len(rows.prompts))
    with inferring(model.module):
        session = model.session(plan)
        steps = [session.prefill(rows.prompts)]
        session.add(range(len(rows.prompts)))
        answers = torch.tensor(rows.answers, device=steps[0].device)
        steps += [session.extend(answers[:, n]) for n in range(NEW - 1)]
    return torch.stack(steps, dim=1).double().log_softmax(-1).cpu()


def _scores(model: TokenModel, rows: Rows, truth: Tensor) -> float:
    """The largest error of the probability of a score that is one token."""
    trie = build_trie({float(n): (7 + n,) for n in range(5)})
    found = dict(LocalEngine().chances(model, rows.prompts, trie, frozenset()))
    errors = [
        abs(p - float(truth[row, 0, 7 + int(score)].exp()))
        for row, chances in found.items()
        for score, p in score_probabilities(trie, chances).items()
    ]
    return max(errors)


def _greedy(model: TokenModel, rows: Rows) -> float:
    """The share of tokens by which greedy answers in one batch differ from those one by one.

    Told, and not held against a bound: ties that rounding makes fall either way.
    """
    requests = [Request(ids, n, NEW) for n, ids in enumerate(rows.prompts)]
    decoding = Decoding(temperature=0.0)
    together = dict(LocalEngine().generate(model, requests, decoding))
    alone = dict(LocalEngine(max_rows=1).generate(model, requests, decoding))
    pairs = [
        one == other
        for n in together
        for one, other in zip(together[n].ids, alone[n].ids, strict=True)
    ]
    return 1 - sum(pairs) / len(pairs)


def _gradients(
    exact: nn.Module, module: nn.Module, rows: Rows, device: torch.device
) -> tuple[float, float]:
    """How far gradients of the packed rows' log-probs, and of the model's own forward, are from
    those in float64, as shares of their norm."""
    wanted = _gradient(exact, lambda: _own_sum(exact, rows, torch.device("cpu")))
    policy = Policy(adapt(module))
    ids, lengths = pad_rows(rows.whole)
    packed = _gradient(module, lambda: policy(ids, lengths).sum())
    own = _gradient(module, lambda: _own_sum(module, rows, device))
    return _share(packed, wanted), _share(own, wanted)


def _gradient(module: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    module.zero_grad()
    module.eval()
    loss().backward()
    grads = [p.grad.double().cpu().flatten() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    return torch.cat(grads)


def _own_sum(module: nn.Module, rows: Rows, device: torch.device) -> Tensor:
    """The sum of all tokens' log-probs by the module's own forward, a row at a time."""
    total: Tensor | float = 0.0
    for row in rows.whole:
        ids = torch.tensor([row], device=device)
        logits = _logits(module, ids)[0, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total = total + logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
    assert isinstance(total, Tensor)
    return total


def _forward(module: nn.Module, rows: Rows, device: torch.device) -> Tensor:
    """Log-probs (r, NEW, v) before each token of the answers, a row at a time."""
    module.eval()
    found = []
    with torch.no_grad():
        for row in rows.whole:
            logits = _logits(module, torch.tensor([row], device=device))
            found.append(logits[0, len(row) - NEW - 1 : -1].double().log_softmax(-1).cpu())
    return torch.stack(found)


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    output = module(ids)
    return getattr(output, "logits", output)


def _apart(found: Tensor, truth: Tensor) -> float:
    """The root of the mean square of the differences."""
    return float((found.double() - truth).square().mean().sqrt())


def _share(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _entry(
    name: str, path: str, dtype: torch.dtype, found: float, own: float, bound: float
) -> dict:
    is_held = not path.startswith("greedy")
    return {
        "name": f"{name}: {path}, {str(dtype).removeprefix('torch.')}",
        "error": found,
        "own_forward": own,
        "bound": bound if is_held else None,
        "holds": not is_held or found <= bound,
    }


def _of_transformers(kind: str, adapter: bool = False, **changes: int) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        **changes,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    if not adapter:
        return model
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.05)
    return wrapped


def _x_transformer() -> nn.Module:
    layers = Decoder(dim=128, depth=3, heads=4, attn_dim_head=32, rotary_pos_emb=True)
    return TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=256, attn_layers=layers, use_abs_pos_emb=False
    )
