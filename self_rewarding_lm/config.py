"""Settings that several rooms share: frozen, closed, checked when they are written.

Importing this needs no torch. Object fields (datasets, modules, functions) are taken as they are
and checked when a trainer is built; configurations compare by identity and are never copied. The
settings of one stage, judge or loss stand in its own file.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError, model_validator

from self_rewarding_lm.errors import ConfigError, did_you_mean, setting, typed
from self_rewarding_lm.rubrics import (
    COMPARISON_PROMPT,
    DEFAULT_JUDGE_PROMPT,
    PAPER_LENGTH_JUDGE_PROMPT,
    TEN_POINT_JUDGE_PROMPT,
)
from self_rewarding_lm.scores import exact, exact_sum
from self_rewarding_lm.text import amount, html_table


class Config(BaseModel):
    """What all settings share: frozen, closed, identity comparison, messages that help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, populate_by_name=True
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_in_words(type(self), error)) from None

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """What must be given stands first in the signature, so `help` begins with it."""
        parameters = cls.__signature__.parameters.values()
        by_need = sorted(parameters, key=lambda it: (it.kind, it.default is not it.empty))
        cls.__signature__ = cls.__signature__.replace(parameters=by_need)

    def _repr_html_(self) -> str:
        """The settings that were given, as a table."""
        given = [[name, repr(getattr(self, name))] for name in sorted(self.model_fields_set)]
        rest = len(type(self).model_fields) - len(given)
        return html_table(["setting", "given"], given, f"{type(self).__name__}, {rest} by default")


def _in_words(cls: type[Config], error: ValidationError) -> str:
    """pydantic's problems with the values of a class as one message."""
    lines = []
    names = list(cls.model_fields)
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            hint = did_you_mean(where, names)
            lines.append(f"{where!r} is not a setting{hint} It has: {', '.join(names)}.")
        elif item["type"] == "missing":
            lines.append(f"{where!r} is required.")
        else:
            came = f"; got {item['input']!r:.200}" if where else ""
            lines.append(f"{where + ': ' if where else ''}{item['msg']}{came}.")
    return f"{cls.__name__}: " + " ".join(lines).replace("Value error, ", "")


Object = SkipValidation[Any]
"""A dataset, module or function: taken as it is."""


MAX_NUMBERS = 1001
"""Allowed numbers whose probabilities are computed, at most: 0 to 1000."""


class SamplingConfig(Config):
    """How a stage, a judge or `generate` samples tokens.

    Defaults: temperature 0.7, top-p 0.9 (arXiv:2401.10020, 3.1.3).
    """

    temperature: float = Field(default=0.7, ge=0)
    """0 takes the likeliest token."""
    top_p: float | None = Field(default=0.9, gt=0, le=1)
    """Sample only from the likeliest tokens that together have this probability; None: from all."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample only from this many of the likeliest tokens; None: from all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Sample only from tokens with at least this share of the likeliest one's probability; None:
    from all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """New tokens at most, the prompt not counted; fewer if the model has no room for more."""
    min_new_tokens: int = Field(default=0, ge=0)
    """No end token is sampled before this many tokens; a stop text still ends a response."""
    stop: tuple[str, ...] = ()
    """Texts that end a response wherever they stand; they stay in it."""
    stop_fn: Object = None
    """A function text -> bool: whether a response with that text is complete. It is called after
    each token, with the local engine only."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Over 1: tokens that already occur become less likely (arXiv:1909.05858)."""
    filter_fn: Object = None
    """A function logits (rows, vocabulary) -> logits of that shape, applied before all other
    filters."""

    @model_validator(mode="after")
    def _lengths(self) -> "SamplingConfig":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens "
                f"({self.max_new_tokens})"
            )
        return self

    def shortened(self, tokens: int = 2) -> "SamplingConfig":
        """The same settings with at most this many new tokens, as rehearsals sample."""
        new = min(tokens, self.max_new_tokens)
        least = min(new, self.min_new_tokens)
        return self.model_copy(update={"max_new_tokens": new, "min_new_tokens": least})


class SelfInstruct(Config):
    """New prompts that a model writes, as the `prompt_dataset` of a stage (arXiv:2401.10020, 2.2).

    The model is shown examples and continues the list (Self-Instruct, arXiv:2212.10560); what it
    writes is filtered and kept until there are `num_prompts`.
    """

    seed_dataset: Object
    """Prompts by people: the first examples. New prompts that are too similar to them are left
    out."""
    num_prompts: int = Field(ge=1)
    """New prompts to keep. The paper gives the number of its pairs, not of its prompts."""
    model: Object = "current"
    """Who writes: "current" (the weights of the stage's start), "initial", an earlier stage's name,
    or a module. The paper: a fixed Llama 2-Chat 70B."""
    tokenizer: Object = None
    """The tokenizer of `model`, if that is a module; default the trainer's."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.9)
    """Temperature 0.6, top-p 0.9 (arXiv:2401.10020, 3.1.3)."""
    num_seed_examples: int = Field(default=6, ge=1)
    """Seeds shown for each list, drawn at random (arXiv:2401.10020, 3.1.3: 6 and 2 generated)."""
    num_generated_examples: int = Field(default=2, ge=0)
    """Generated prompts shown for each list; seeds take their place while there are none."""
    min_words: int = Field(default=4, ge=1)
    """Fewest words of a new prompt (Self-Instruct's code: 4 to 150)."""
    max_words: int = Field(default=150, ge=1)
    """Most words of a new prompt."""
    max_rouge_l: float = Field(default=0.7, gt=0, le=1)
    """Greatest ROUGE-L F of a new prompt with a seed or a kept prompt."""
    keywords: tuple[str, ...] | None = None
    """Words that a prompt must not have; None: words for images, files and other things that a
    text model cannot handle."""
    samples_per_round: int = Field(default=32, ge=1)
    """Lists that are written at once; later lists may show prompts of these."""
    max_samples: int | None = Field(default=None, ge=1)
    """Lists at most. Default: four for each wanted prompt."""

    @model_validator(mode="after")
    def _go_together(self) -> "SelfInstruct":
        if self.min_words > self.max_words:
            raise ValueError(
                f"min_words ({self.min_words}) is more than max_words ({self.max_words})"
            )
        if self.tokenizer is not None and isinstance(self.model, str):
            raise ValueError(
                f"tokenizer is for a module of its own as model; {self.model!r} has the trainer's"
            )
        return self


OPTIMIZERS = ("adamw", "muon", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd")


class OptimConfig(Config):
    """How a stage trains: optimiser, learning rate, batches. None takes the stage's own default."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Defaults: SFT 5.5e-6, preference stages 1e-6 (arXiv:2401.10020, 3.1.3), SPIN 5e-7
    (arXiv:2401.01335)."""
    final_learning_rate: float | None = Field(default=None, ge=0)
    """At the last step. Defaults: SFT 1.1e-6, preference stages 1e-7, SPIN a tenth of the first; a
    tenth of learning_rate if that is given."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From learning_rate to final_learning_rate at the last optimiser step; the paper's is cosine.
    "constant" stays at learning_rate."""
    warmup_steps: int | float = Field(default=0, ge=0)
    """First steps, in which the learning rate rises evenly to learning_rate. Below 1: a share of
    all steps, as in transformers, rounded up."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the rows; cannot be given with num_train_steps. Defaults: SFT 3, SPIN 2,
    preference stages 1."""
    batch_size: int = Field(default=16, ge=1)
    """Rows or pairs of an optimiser step, over all processes (the paper's 16)."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens, padding included, that go through the model at once. It sets memory and speed; the
    gradient is the same except for rounding. None: up to 16,384, as many as fit into half of the
    free memory when the stage begins; a stage that is resumed keeps them."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows or pairs at most that go through the model at once."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping them: about a third more
    work for a fraction of the memory (arXiv:1604.06174). Models of transformers only."""
    optimizer: Object = "adamw"
    """"adamw", "muon" (torch.optim.Muon for hidden matrices, AdamW for the rest), "adamw_8bit" and
    "paged_adamw_8bit" (bitsandbytes), "adafactor", "sgd" (without momentum), or a function from the
    list of trainable parameters to a torch optimiser."""
    betas: tuple[float, float] = (0.9, 0.999)
    """The two betas of AdamW, in each of its forms."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices; norms, biases and embeddings, a tied head included, do not decay.
    If optimizer is a function, it sets its own."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients with a greater norm are scaled down to it; None: never."""
    eval_every: int = Field(default=200, ge=1)
    """Steps between evaluations and early-stopping checks (the paper's 200)."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between copies of the weights, kept as checkpoint-<step>/ in the stage's folder."""
    save_state_every: int | None = Field(default=None, ge=1)
    """Steps after which the state of training (weights, optimiser, step) is saved, from which a
    run that was killed resumes."""
    save_state_minutes: float | None = Field(default=15.0, gt=0)
    """Minutes after which the state is saved. None: only after save_state_every steps, and if a
    signal stops the run."""

    @model_validator(mode="after")
    def _optimizer_known(self) -> "OptimConfig":
        if not callable(self.optimizer) and self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be {', '.join(map(repr, OPTIMIZERS))} or a function parameters -> "
                f"optimiser; got {self.optimizer!r}"
            )
        if self.optimizer in ("adafactor", "sgd") and self.learning_rate is None:
            raise ValueError(
                f"optimizer={self.optimizer!r} needs learning_rate: the stages' default rates "
                "are for AdamW, whose steps differ in size"
            )
        return self

    @model_validator(mode="after")
    def _whole_steps(self) -> "OptimConfig":
        if self.warmup_steps >= 1 and self.warmup_steps % 1 != 0:
            raise ValueError(
                "warmup_steps must be a whole number of steps, or a share of all steps below 1; "
                f"got {self.warmup_steps}"
            )
        return self

    def completed(self, learning_rate: float, final: float, epochs: int) -> "OptimConfig":
        """The same settings, with a stage's defaults for what is None."""
        rate = self.learning_rate or learning_rate
        if self.final_learning_rate is not None:
            final = self.final_learning_rate
        elif self.learning_rate is not None:
            final = rate / 10
        changes = {"learning_rate": rate, "final_learning_rate": final}
        return self.model_copy(update={**changes, "epochs": self.epochs or epochs})


class MarkedRubric(Config):
    """The items of an additive rubric, and the words by which a judge marks each of them.

    The score is the sum of the points of the items that the judge marked yes; a sum that it states
    is ignored, because small judges often add badly. A text with fewer or more marks
    than items has no score. Words are matched as text, ignoring case and Markdown.
    """

    items: int | tuple[str, ...]
    """How many items there are. Or their names, if the judge writes the same ones each time: the
    first name must stand before the first mark, each further one between two marks."""
    yes: str
    """What the judge writes after an item that is met, such as ", yes."."""
    no: str
    """What it writes after an item that is not met, such as ", no."."""
    points: tuple[float, ...] | None = None
    """The points of each item, all above 0. None: 1 each."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the items; empty if only their number is given."""
        return self.items if isinstance(self.items, tuple) else ()

    @property
    def worth(self) -> tuple[float, ...]:
        """The points of each item."""
        count = len(self.items) if isinstance(self.items, tuple) else self.items
        return (1.0,) * count if self.points is None else self.points

    @property
    def score_range(self) -> tuple[float, float]:
        """The score with no item met, and the score with all items met."""
        return 0.0, float(exact_sum(map(exact, self.worth)))

    @model_validator(mode="after")
    def _countable(self) -> "MarkedRubric":
        count = len(self.names) if isinstance(self.items, tuple) else self.items
        if count < 1:
            raise ValueError(f"items must be 1 or more, or their names; got {self.items}")
        if not all(map(_bare, self.names)):
            raise ValueError(f"names of items must have letters, digits or signs; got {self.names}")
        if not _bare(self.yes) or not _bare(self.no) or _bare(self.yes) == _bare(self.no):
            raise ValueError(
                "yes and no must differ in their letters, digits or signs (case, space and the "
                f"Markdown signs *, _ and ` do not count); got {self.yes!r} and {self.no!r}"
            )
        worth = self.worth
        if len(worth) != count or not all(0 < point < math.inf for point in worth):
            raise ValueError(
                f"points must be {amount(count, 'number')} above 0, one for each item; got "
                f"{self.points}"
            )
        return self


def _bare(words: str) -> str:
    """What counts of words that are looked for in a judge's text."""
    return re.sub(r"[\s*_`]", "", words).casefold()


class RewardConfig(Config):
    """A reward prompt: what the judge is shown, and how its text becomes a score.

    The score is read by `marks`, or `parse_reward`, else `reward_regex_template`. Every judgement
    records how its score came about (`source`).
    """

    template_variables: ClassVar[tuple[str, ...]] = ("prompt", "response")

    prompt_template: str
    """jinja2 text with {{ prompt }} and {{ response }}."""
    reward_regex_template: str | None = None
    """Text with {{ reward }} in the place of the number, e.g. "Score: {{ reward }}"."""
    marks: MarkedRubric | None = None
    """Count the judge's marks instead of reading a number: for rubrics whose items it marks one
    after the other. `score_range` is then (0, the sum of the points)."""
    parse_reward: Object = None
    """A function from the judge's text to a number, or None if there is none."""
    score_range: tuple[float, float] | None = None
    """Least and greatest score; a number outside is no score (None)."""
    allowed_scores: tuple[float, ...] | None = None
    """The only numbers that are scores; any other is no score (None)."""
    auto_dedent: bool = True
    """Remove the common indentation and the outer empty lines of the template."""
    score_mode: Literal["sampled", "expected"] = "sampled"
    """"sampled": the score that the judge wrote. "expected": the mean of the allowed numbers,
    weighted by their probabilities at the place where it wrote one. With `marks`: the sum over the
    items of the probability of yes, where it marked them, times their points."""
    forced_ending: bool | Literal["at_once"] = False
    """True: if the judge wrote no valid score, the words before {{ reward }} are appended to
    its text and the expected score is taken there. "at_once": it writes no review, so one
    forward judges a candidate, once."""

    @model_validator(mode="after")
    def _readable(self) -> "RewardConfig":
        if self.marks is not None:
            self._check_marks(self.marks)
            return self
        if self.parse_reward is None and self.reward_regex_template is None:
            raise ValueError(
                "give reward_regex_template (for example 'Score: {{ reward }}'), marks (the words "
                "for yes and no at each item of a rubric) or parse_reward, a function from the "
                "judge's text to a number"
            )
        if self.parse_reward is not None and not callable(self.parse_reward):
            raise ValueError(f"parse_reward must be a function, got {self.parse_reward!r}")
        if self.score_range is not None and self.score_range[0] >= self.score_range[1]:
            raise ValueError(f"score_range must be (low, high), got {self.score_range}")
        if self.score_mode == "expected" or self.forced_ending:
            self._check_numbers()
        return self

    def allowed_numbers(self) -> tuple[float, ...]:
        """`allowed_scores`, else the whole numbers of `score_range`; empty without either."""
        if self.allowed_scores is not None:
            return tuple(sorted(set(map(float, self.allowed_scores))))
        if self.score_range is None:
            return ()
        low, high = math.ceil(self.score_range[0]), math.floor(self.score_range[1])
        if high - low >= MAX_NUMBERS:
            raise ConfigError(
                f"score_range {self.score_range} has more than {MAX_NUMBERS} whole numbers; give "
                "allowed_scores"
            )
        return tuple(map(float, range(low, high + 1)))

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> "RewardConfig":
        """The same settings with those of `update` changed, which are checked as in a new one."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **(update or {})})

    def as_written(self) -> "RewardConfig":
        """The same judge, asked for a text with its score: sampled, without forced ending."""
        return self.model_copy(update={"score_mode": "sampled", "forced_ending": False})

    def _check_marks(self, marks: MarkedRubric) -> None:
        ways = ("reward_regex_template", "parse_reward", "allowed_scores")
        others = ", ".join(name for name in ways if getattr(self, name) is not None)
        if others:
            raise ValueError(
                f"marks alone make the score, the sum of their points; leave out {others}, or marks"
            )
        if self.forced_ending:
            raise ValueError(
                "forced_ending appends words that lead to one number, but marks stand "
                f"within a review; leave one of them out. {setting('score_mode', 'expected')} "
                "takes the "
                "probabilities of the marks in the review that was written"
            )
        if self.score_range not in (None, marks.score_range):
            raise ValueError(
                f"the marks make scores from 0 to {marks.score_range[1]:g}, so score_range is "
                f"{marks.score_range}; leave it out, got {self.score_range}"
            )
        object.__setattr__(self, "score_range", marks.score_range)  # the model is frozen

    def _check_numbers(self) -> None:
        ways = f"{setting('score_mode', 'expected')} and forced_ending"
        if self.parse_reward is not None:
            raise ValueError(
                f"{ways} read probabilities where reward_regex_template has its number, and "
                "parse_reward reads texts; leave one of them out"
            )
        if len(self.allowed_numbers()) < 2:
            raise ValueError(
                f"{ways} need at least two numbers that a judge may give: allowed_scores, or a "
                "score_range that contains whole numbers"
            )


class ComparisonConfig(Config):
    """A judge prompt that shows two responses, and how its verdict is read.

    Every two candidates are shown in both orders; if the two verdicts disagree it is a tie.
    """

    template_variables: ClassVar[tuple[str, ...]] = ("prompt", "response_a", "response_b")

    prompt_template: str = COMPARISON_PROMPT
    """jinja2 text with {{ prompt }}, {{ response_a }} and {{ response_b }}."""
    labels: tuple[str, str] = ("A", "B")
    """What the judge calls the first and the second response; upper and lower case count."""
    tie_label: str | None = None
    """What it says if neither is better; None: it has to choose."""
    verdict_prefix: str = "Better: "
    """The words that the judge writes before its verdict."""
    score_mode: Literal["sampled", "expected"] = "sampled"
    """"sampled": the verdict that the judge wrote. "expected": the labels' probabilities at the
    place where it wrote one, a tie counting half."""
    forced_ending: bool | Literal["at_once"] = False
    """As in RewardConfig, with `verdict_prefix`."""
    auto_dedent: bool = True

    @model_validator(mode="after")
    def _told_apart(self) -> "ComparisonConfig":
        labels = [label for label in (*self.labels, self.tie_label) if label is not None]
        if len(set(labels)) < len(labels) or any(not x or x != x.strip() for x in labels):
            raise ValueError(f"labels must be different words without white space; got {labels}")
        if not self.verdict_prefix.strip():
            raise ValueError("verdict_prefix must have words, such as 'Better: '")
        return self


def _scored(prompt_template: str, highest: int) -> RewardConfig:
    stated = "Score: {{ reward }}"
    return RewardConfig(
        prompt_template=prompt_template, reward_regex_template=stated, score_range=(0, highest)
    )


DEFAULT_REWARD_CONFIG = _scored(DEFAULT_JUDGE_PROMPT, 5)


PAPER_REWARD_CONFIG = _scored(PAPER_LENGTH_JUDGE_PROMPT, 5)


TEN_POINT_REWARD_CONFIG = _scored(TEN_POINT_JUDGE_PROMPT, 10)


class FinetuneConfig(Config):
    """The base class of all stages. Subclass it and write `run` for a stage of your own.

    `run(ctx, out)` does the work: it reads what it needs from the context, writes its records to
    `out` and leaves the trained weights in the model; the trainer saves them afterwards.
    """

    folder_name: ClassVar[str] = "custom"
    hub_tag: ClassVar[str | None] = None
    """The tag of its model card on the hub, if the stage is a method of its own. The card cites
    the papers that the class's docstring names."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The stage's name, in its folder and for `from_stage`; default: the kind of stage."""
    init_from: str | Path = "previous"
    """Weights that the stage starts from: "previous", "initial", an earlier stage's name or a
    path."""

    @abstractmethod
    def run(self, ctx: Any, out: Any) -> None:
        """Do the stage's work. ctx: Context, out: StageDir."""

    def see_result(self, ctx: Any, out: Any) -> None:
        """Check what the stage did, after `run`. ctx, out: as of `run`. Default: nothing."""

    def check(self, ctx: Any) -> None:
        """Raise an error for what is wrong and can be known before stage 1 begins."""

    def remarks(self, ctx: Any) -> list[str]:
        """Sentences that a check prints: what is worth knowing before the stage begins."""
        return []

    def shown(
        self, field: str, row: Any, where: str, tokens: Any
    ) -> list[tuple[str, Sequence[int], Sequence[bool]]]:
        """What the model reads of a row of a dataset, for a preview. Default: nothing.

        field: the dataset's. where: names the row in errors. tokens: Tokens. Returns for each text
        what it is, its ids, and whether each of them is learnt.
        """
        return []

    def rehearse(self, ctx: Any, out: Any) -> None:
        """Try the stage's parts once before stage 1 begins, so that what cannot work fails then.

        ctx, out: as of `run`, with a few rows of each dataset, stand-ins for those of earlier
        stages, no `ctx.run`, and a temporary folder. No weights may be changed. Default: nothing.
        """

    def work(self, counting: Any) -> Any:
        """The `Work` of the stage that a plan counts; None if unknown. counting: Counting."""
        return None

    def reward_names(self) -> tuple[str, ...]:
        """Names of the trainer's reward prompts with which the stage judges."""
        return ()

    def weights_used(self) -> set[str]:
        """Names of the weights that the stage needs: "initial", earlier stages, paths."""
        return {str(self.init_from)} - {"previous"}

    def datasets(self) -> dict[str, Any]:
        """The given datasets by field name: the fields whose names end in `_dataset`."""
        names = [name for name in type(self).model_fields if name.endswith("_dataset")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class FromStage:
    """The records of an earlier stage as a dataset."""

    stage: str


@typed
def from_stage(stage: str) -> FromStage:
    """The records of the stage with that name, as a dataset of a later stage.

    A preference stage gives its pairs: a DPO stage trains on them again, an SFT stage on the chosen
    responses alone. An EFT stage gives its demonstrations, for an SFT stage.
    """
    return FromStage(stage)
