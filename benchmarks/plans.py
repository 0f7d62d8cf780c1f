"""What all trials share: names, bars, sizes of the work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workloads import Chat, Recording, Sampler

SAMPLES = 4
JUDGEMENTS = 3
WARM_TOKENS = 4
OVER_OWN = "_over_own_sampled"

BARS = {
    "candidates_bf16": 2.2,
    "candidates_fp32": 1.9,
    "judging_bf16": 3.3,
    "judging_fp32": 3.0,
    "expected_score_bf16": 15.0,
    "expected_score": 15.0,
    "x_transformers": 1.5,
    "ancestor": 30.0,
    "plain_module": 1.3,
}
"""The ratios that are aimed at, by the comparison's name."""


def trials_of(dtypes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The comparisons of each trial, by name. Expected scores have no suffix in fp32."""
    found: dict[str, tuple[str, ...]] = {}
    for dtype in dtypes:
        found[f"candidates_{dtype}"] = (f"candidates_{dtype}",)
    for dtype in dtypes:
        expected = "expected_score" if dtype == "fp32" else f"expected_score_{dtype}"
        found[f"judging_{dtype}"] = (f"judging_{dtype}", expected, f"{expected}{OVER_OWN}")
    if "fp32" in dtypes:
        found["x_transformers"] = ("x_transformers",)
        found["ancestor"] = ("ancestor", "plain_module")
    return found


def dtype_of(trial: str) -> str:
    return trial.rpartition("_")[2] if trial.startswith(("candidates", "judging")) else "fp32"


@dataclass(frozen=True)
class Scale:
    """The share of the prompts that is used: one for all, and others by trial or precision."""

    default: float
    others: dict[str, float]

    @classmethod
    def read(cls, text: str, ancestor: float) -> "Scale":
        """From "0.5,bf16=0.1,ancestor=0.02"; the ancestor's default is a share of its own."""
        default, others = 1.0, {"ancestor": ancestor}
        for part in text.split(","):
            name, _, value = part.rpartition("=")
            if name:
                others[name] = float(value)
            else:
                default = float(value)
                others["ancestor"] = ancestor * default
        return cls(default, others)

    def of(self, trial: str) -> float:
        """A trial's own share before its precision's, and that before the share of all."""
        by_dtype = self.others.get(dtype_of(trial), self.default)
        return self.others.get(trial, by_dtype)


@dataclass(frozen=True)
class Plan:
    """prompts: those of the whole work. chat: the language model in a precision.

    batch_seconds: of `generate_batch`'s process, 0 for none.
    """

    prompts: list[str]
    recording: Recording
    sampler: Sampler
    new_tokens: int
    judge_tokens: int
    rows: int
    counts: dict[str, int]
    chat: Callable[[str], Chat]
    batch_seconds: float
