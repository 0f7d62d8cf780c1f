"""Settings: frozen, closed, checked when they are written. Importing this needs no torch.

Object fields (datasets, modules, functions) are taken as they are and checked when a trainer is
built; configurations compare by identity and are never copied.
"""

import difflib
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError, model_validator

from self_rewarding_lm.errors import ConfigError

Object = SkipValidation[Any]
"""A dataset, module or function: taken as it is."""

DEFAULT_JUDGE_PROMPT = """\
Rate the response to the user's request on an additive scale from 0 to 5. Start at 0 and add one
point for each statement that is true:
- The response is about the request and gives some relevant information.
- It covers a good part of what was asked, if not all of it.
- It answers the main points in a way that helps the user.
- It is written as an assistant speaking to this user: direct, complete and well ordered.
- It fits the request exactly: expert, engaging, nothing superfluous.
Write a short review of at most 100 words, then end with the total on a line of its own, in the
form "Score: <points>".

Request: {{ prompt }}

Response: {{ response }}

Review:"""

PAPER_LENGTH_JUDGE_PROMPT = """\
You are given a question of a user and a response to it. Judge the response with the additive
scale of five points that is described here. A point is added to the ones before it when its
criterion is met:
- One point if the response has to do with the question and offers some information on it, even
if much is missing or part of it is beside the point.
- A second point if the response deals with a considerable part of the question, without settling
it completely or answering it outright.
- A third point if the response gives a useful answer to the essential parts of the question. It
does not matter here whether an AI assistant seems to have written it or whether it reads like a
blog post or a search result.
- A fourth point if the response is plainly written from the point of view of an AI assistant,
takes up the question directly and in full, is well organised and helpful, and leaves only little
to improve in clarity, brevity or focus.
- A fifth point if the response is tailored to the question without a flaw, contains nothing that
is not needed, shows the knowledge of an expert, and is engaging and full of insight.

User: {{ prompt }}

<response>{{ response }}</response>

Once you have examined the question and the response:
- Give reasons for your total in at most 100 words.
- End with the total, in this form: "Score: <total points>"

Keep the point of view of an AI assistant, and draw on what a web search would tell where that
helps. Go through the criteria one after the other and let the total follow from them.
"""


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


class SamplingConfig(Config):
    """How tokens are sampled. Defaults: temperature 0.7, top-p 0.9 (arXiv:2401.10020, 3.1.3)."""

    temperature: float = Field(default=0.7, ge=0)
    """0 takes the likeliest token."""
    top_p: float | None = Field(default=0.9, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    """New tokens, the prompt not counted; shortened to the room that a prompt leaves."""
    min_new_tokens: int = Field(default=0, ge=0)
    """No end token before this many."""
    stop: tuple[str, ...] = ()
    """Texts that end a response; they stay in it."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    filter_fn: Object = None
    """A function logits (rows, vocabulary) -> logits of that shape, before all other filters."""

    @model_validator(mode="after")
    def _lengths(self) -> "SamplingConfig":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens "
                f"({self.max_new_tokens})"
            )
        return self


class OptimConfig(Config):
    """How weights are fitted. None takes the stage's own default."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Defaults: SFT 5.5e-6, preference stages 1e-6 (arXiv:2401.10020, 3.1.3), SPIN 5e-7
    (arXiv:2401.01335)."""
    final_learning_rate: float | None = Field(default=None, ge=0)
    """At the last step. Defaults: SFT 1.1e-6, preference stages 1e-7, SPIN a tenth of the first;
    a tenth of learning_rate where that is given."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the rows; excludes num_train_steps. Defaults: SFT 3, SPIN 2, preference 1."""
    batch_size: int = Field(default=16, ge=1)
    """Rows or pairs an optimiser step, over all processes (the paper's 16)."""
    micro_batch_tokens: int = Field(default=16_384, ge=1)
    """Padded tokens that go through the model at once: memory and speed; the gradient is the same
    (with dropout, other units are dropped)."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows or pairs that go through the model at once at most."""
    optimizer: Object = "adamw"
    """"adamw", "muon" (torch.optim.Muon for hidden matrices, AdamW for the rest), or a function
    from the list of trainable parameters to a torch optimiser."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    eval_every: int = Field(default=200, ge=1)
    """Steps between evaluations and early-stopping checks (the paper's 200)."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between copies of the weights, kept as checkpoint-<step>/ in the stage's folder."""

    @model_validator(mode="after")
    def _optimizer_known(self) -> "OptimConfig":
        if not callable(self.optimizer) and self.optimizer not in ("adamw", "muon"):
            raise ValueError(
                f"optimizer must be 'adamw', 'muon' or a function parameters -> optimiser; "
                f"got {self.optimizer!r}"
            )
        return self

    def completed(self, learning_rate: float, final: float, epochs: int) -> "OptimConfig":
        """The same with a stage's defaults where nothing is said."""
        rate = self.learning_rate or learning_rate
        if self.final_learning_rate is not None:
            final = self.final_learning_rate
        elif self.learning_rate is not None:
            final = rate / 10
        changes = {"learning_rate": rate, "final_learning_rate": final}
        return self.model_copy(update={**changes, "epochs": self.epochs or epochs})


class RewardConfig(Config):
    """A judge's prompt and how its answer is read: `parse_reward` first, else the template."""

    prompt_template: str
    """jinja2 text with {{ prompt }} and {{ response }}."""
    reward_regex_template: str | None = None
    """Text with {{ reward }} where the number stands, e.g. "Score: {{ reward }}"."""
    parse_reward: Object = None
    """A function from the judge's text to a number, or None where there is none."""
    score_range: tuple[float, float] | None = None
    """Scores outside are None."""
    allowed_scores: tuple[float, ...] | None = None
    auto_dedent: bool = True

    @model_validator(mode="after")
    def _readable(self) -> "RewardConfig":
        if self.parse_reward is None and self.reward_regex_template is None:
            raise ValueError(
                "give reward_regex_template (for example 'Score: {{ reward }}') or parse_reward, "
                "a function from the judge's text to a number"
            )
        if self.parse_reward is not None and not callable(self.parse_reward):
            raise ValueError(f"parse_reward must be a function, got {self.parse_reward!r}")
        if self.score_range is not None and self.score_range[0] >= self.score_range[1]:
            raise ValueError(f"score_range must be (low, high), got {self.score_range}")
        return self


DEFAULT_REWARD_CONFIG = RewardConfig(
    prompt_template=DEFAULT_JUDGE_PROMPT,
    reward_regex_template="Score: {{ reward }}",
    score_range=(0, 5),
)
PAPER_REWARD_CONFIG = RewardConfig(
    prompt_template=PAPER_LENGTH_JUDGE_PROMPT,
    reward_regex_template="Score: {{ reward }}",
    score_range=(0, 5),
)


class FinetuneConfig(Config):
    """A stage. Subclass it and write `run` for a stage of your own.

    `run(ctx, out)` does the work: it reads what it needs from the context, writes its records to
    `out` and leaves the trained weights in the model; the trainer saves them afterwards.
    """

    folder_name: ClassVar[str] = "custom"

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the stage's folder and of `from_stage`; default: the kind of stage."""
    init_from: str | Path = "previous"
    """Weights it starts from: "previous", "initial", an earlier stage's name or a path."""

    @abstractmethod
    def run(self, ctx: Any, out: Any) -> None:
        """Do the stage's work. ctx: Context, out: StageDir."""

    def check(self, ctx: Any) -> None:
        """Raise where something is wrong that can be known before stage 1 begins."""

    def datasets(self) -> dict[str, Any]:
        """The datasets by field name: the fields that end in `_dataset` and are given."""
        names = [name for name in type(self).model_fields if name.endswith("_dataset")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _in_words(cls: type[Config], error: ValidationError) -> str:
    lines = []
    names = list(cls.model_fields)
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            lines.append(f"{where!r} is no setting; {hint}It has: {', '.join(names)}.")
        elif item["type"] == "missing":
            lines.append(f"{where!r} is required.")
        else:
            came = f"; got {item['input']!r:.200}" if where else ""
            lines.append(f"{where + ': ' if where else ''}{item['msg']}{came}.")
    return f"{cls.__name__}: " + " ".join(lines).replace("Value error, ", "")
