"""Contrastive DPO: responses to a prompt that asks for a property win against its opposite's.

The pairs are those of RLCD (arXiv:2307.12950); they are trained on by DPO in place of a reward
model and PPO. This file holds, in this order: the contrasts that ship, how a prompt looks with a
contrast, what makes the pairs, what is measured of them, and the stage.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from self_rewarding_lm.config import Config, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.chat import Message
from self_rewarding_lm.data.control_tokens import fill
from self_rewarding_lm.data.rows import PromptRow
from self_rewarding_lm.data.tokens import Rendered, Tokens
from self_rewarding_lm.errors import ConfigError, DataError, did_you_mean, give_tokenizer, setting
from self_rewarding_lm.judges.asking import FIRST_LOOK
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.records import (
    Candidate,
    Judgement,
    PreferencePair,
    Prompt,
    prompt_id_of,
    same_text,
    stable_hash,
)
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stages.pair_maker import JudgedPrompt, PairMaker
from self_rewarding_lm.stages.pairing import DropCounts
from self_rewarding_lm.stages.ranges import Range
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.work import Asking, Counting, Work

SIDES = ("positive", "negative")

NO_ROOM = "no_room"
"""Reason why a candidate has no response: the prompt with its contrast fills the model."""


class Contrast(Config):
    """Two texts that are shown with a prompt, one for each response: for a property and against it.

    Their wording should be alike, so that responses differ in the property alone
    (arXiv:2307.12950, section 3).
    """

    positive: str = Field(min_length=1)
    """Asks for the property; the response to it is chosen."""
    negative: str = Field(min_length=1)
    """Asks against the property; the response to it is rejected."""
    kind: Literal["system", "prefix", "suffix"] = "system"
    """"system": a system message, after the prompt's own if it has one. "prefix", "suffix":
    directly before or after the text of the last user message."""

    @model_validator(mode="after")
    def _differ(self) -> "Contrast":
        if self.positive.strip() == self.negative.strip():
            raise ValueError("positive and negative are the same text, so nothing is contrasted")
        return self


def _pairs(*texts: tuple[str, str]) -> tuple[Contrast, ...]:
    return tuple(Contrast(positive=positive, negative=negative) for positive, negative in texts)


GROUPS: dict[str, tuple[Contrast, ...]] = {
    "harmless": _pairs(
        (
            "You are a careful assistant. Your answers hurt nobody.",
            "You are a careless assistant. Your answers may hurt somebody.",
        ),
        (
            "Answer politely and with respect for others, even where the user does not.",
            "Answer rudely and with contempt for others, even where the user does not.",
        ),
        (
            "Where a request could do harm, say so, and offer something safe in its place.",
            "Where a request could do harm, do not say so, and offer nothing safe in its place.",
        ),
    ),
    "helpful": _pairs(
        (
            "You are a helpful assistant. Solve the problem that the user has.",
            "You are an unhelpful assistant. Avoid the problem that the user has.",
        ),
        (
            "Answer the question that was asked, in a way that the user can act on.",
            "Answer a question that was not asked, in a way that the user cannot act on.",
        ),
        (
            "Give the advice that an expert on the subject would give.",
            "Give the advice that a stranger to the subject would give.",
        ),
    ),
    "complete": _pairs(
        (
            "Deal with every part of the request and leave nothing important out.",
            "Deal with one part of the request and leave something important out.",
        ),
        (
            "Write an answer that is finished: it begins, covers the matter and comes to an end.",
            "Write an answer that is unfinished: it begins, skips the matter and breaks off.",
        ),
        (
            "Show all the steps of your answer, so that the user misses none.",
            "Show few of the steps of your answer, so that the user misses some.",
        ),
    ),
    "informative": _pairs(
        (
            "Write answers full of exact facts, names and numbers.",
            "Write answers free of exact facts, names and numbers.",
        ),
        (
            "Be specific: give examples and say why things are as they are.",
            "Be vague: give no examples and do not say why things are as they are.",
        ),
        (
            "Tell the user something that is new and worth knowing.",
            "Tell the user nothing that is new or worth knowing.",
        ),
    ),
}
"""Pairs of system messages, by the property that they ask for and against."""

AddText = Callable[[list[Message], str], list[Message]]
"""Returns messages with a text added; it does not change its argument."""


def render_both_sides(
    prompt: Prompt, contrast: Contrast, tokens: Tokens
) -> tuple[Rendered, Rendered]:
    """Returns a prompt with the contrast's positive text, and the same with its negative text.

    If the prompt went through no chat template, the text stands before it (for kind "system" with
    a blank line between) or after it. If the template refuses system messages or leaves them out,
    the text stands before the first message, with a blank line between.

    Raises DataError if the prompt has no text whose encoding is the prompt's ids.
    """
    texts = (contrast.positive, contrast.negative)
    if prompt.messages is None:
        is_data = comes_from_data(prompt, tokens)
        positive, negative = (
            _plain_with_text(prompt, text, contrast.kind, tokens, is_data) for text in texts
        )
        return positive, negative
    if contrast.kind != "system":
        return _render_messages(prompt.messages, _add_to_last_user(contrast.kind), texts, tokens)
    try:
        rendered = _render_messages(prompt.messages, _add_as_system, texts, tokens)
        if rendered[0].ids != rendered[1].ids:
            return rendered
    except DataError:  # the template refuses the system message, though it took the prompt alone
        pass
    return _render_messages(prompt.messages, _add_before_first, texts, tokens)


def comes_from_data(prompt: Prompt, tokens: Tokens) -> bool:
    """Whether control tokens count as plain text in a prompt that no template rendered.

    Raises DataError if the prompt's ids are not the encoding of its text.
    """
    if prompt.text is not None:
        for is_data in (False, True):
            if tokens.prompt(fill([(prompt.text, is_data)])).ids == prompt.ids:
                return is_data
    raise DataError(
        f"prompt {prompt.id}: a contrast is text, so it can only be added to text or messages; "
        "this prompt is token ids. Give it as text, or leave it out "
        f"({setting('on_bad_row', 'skip')})."
    )


def _plain_with_text(
    prompt: Prompt, text: str, kind: str, tokens: Tokens, is_data: bool
) -> Rendered:
    """A prompt without a chat template, with a text before or after it."""
    prompt_part, gap = (prompt.text or "", is_data), "\n\n" if kind == "system" else ""
    parts = [prompt_part, (text, False)] if kind == "suffix" else [(text + gap, False), prompt_part]
    return tokens.prompt(fill(parts))


def _render_messages(
    messages: Sequence[Message], add_text: AddText, texts: tuple[str, str], tokens: Tokens
) -> tuple[Rendered, Rendered]:
    """Renders messages with the positive text, and with the negative one."""
    positive, negative = (
        tokens.prompt(add_text([dict(m) for m in messages], text)) for text in texts
    )
    return positive, negative


def _add_as_system(messages: list[Message], text: str) -> list[Message]:
    """The text as the system message, or after the one that is there."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]


def _add_before_first(messages: list[Message], text: str) -> list[Message]:
    """The text before that of the first message, whatever its role."""
    return [{**messages[0], "content": f"{text}\n\n{messages[0]['content']}"}, *messages[1:]]


def _add_to_last_user(kind: str) -> AddText:
    """Adds the text before (kind "prefix") or after (any other) that of the last user message."""

    def add_text(messages: list[Message], text: str) -> list[Message]:
        users = [place for place, m in enumerate(messages) if m["role"] == "user"]
        place = users[-1] if users else len(messages) - 1
        content = messages[place]["content"]
        longer = text + content if kind == "prefix" else content + text
        return [*messages[:place], {**messages[place], "content": longer}, *messages[place + 1 :]]

    return add_text


class ContrastMaker(PairMaker):
    """Makes pairs of the responses to both sides of a contrast.

    Each prompt has two candidates: 0 answers the positive side, 1 the negative one.
    """

    config: "ContrastiveDPOConfig"

    def __init__(self, config: "ContrastiveDPOConfig", ctx: Context, out: StageDir) -> None:
        super().__init__(config, ctx, out)
        self.contrasts = config.pairs()
        self.counts: Counter[str] = Counter()

    def sample(self, block: Sequence[JudgedPrompt]) -> None:
        """Sample one response on each side, and store both as candidates of the prompt."""
        limit = self.ctx.limit(self.config.max_seq_len)
        # 1. find the prompt that each missing candidate answers
        known_ids = {c.id for judged in block for c in judged.candidates}
        sides = {  # by the id of the candidate
            candidate_id: side
            for judged in block
            for number, side in enumerate(self.prompts_of_sides(judged.prompt))
            if (candidate_id := f"{judged.prompt.id}/{number}") not in known_ids
        }
        if not sides:
            return
        self.ctx.round.check_weights()
        # 2. sample those that leave room for a response
        fitting = {i: side for i, side in sides.items() if limit is None or len(side.ids) < limit}
        sampled = self.ctx.sample(
            list(fitting.values()),
            self.config.generation,
            1,
            max_seq_len=self.config.max_seq_len,
        )
        candidate_ids = {side.id: candidate_id for candidate_id, side in sides.items()}
        responses = (
            replace(
                candidate,
                id=candidate_ids[candidate.prompt_id],
                prompt_id=prompt_id_of(candidate.prompt_id),
                shown_id=candidate.prompt_id,
            )
            for candidate in sampled
        )
        # 3. the others become candidates without a response, with the reason
        without_room = (
            Candidate(i, prompt_id_of(i), (), None, None, 0, reason=NO_ROOM, shown_id=side.id)
            for i, side in sides.items()
            if i not in fitting
        )
        self.keep_candidates(chain(responses, without_room), block)

    def prompts_of_sides(self, prompt: Prompt) -> list[Prompt]:
        """The prompt of the positive and of the negative side, read from disk or made and stored.

        A hash of the seed and the prompt's id picks the contrast.
        """
        ids = [f"{prompt.id}/{side}" for side in SIDES]
        stored = [self.known_prompts[record_id] for record_id in ids]
        if all(stored):
            return [records[0] for records in stored]
        place = stable_hash(self.ctx.seed, "contrast", prompt.id) % len(self.contrasts)
        rendered = render_both_sides(prompt, self.contrasts[place], self.ctx.tokens)
        prompts = [
            Prompt(record_id, prompt.row, r.ids, r.text, messages=r.messages)
            for record_id, r in zip(ids, rendered, strict=True)
        ]
        self.out.append([p for p, records in zip(prompts, stored, strict=True) if not records])
        return prompts

    def pair(self, judged: JudgedPrompt, drops: DropCounts) -> list[PreferencePair]:
        # 1. take the judge's scores if it was asked; else the positive side gets the higher one
        answers, is_judged = judged.answers, self.config.is_judged
        if is_judged and self.shown_to_judge(judged):
            scores = self.judge.scores(answers, judged.judgements)
        else:
            scores = {c.id: 1.0 - place for place, c in enumerate(answers)}
        # 2. with confirm="drop", leave the prompt out if the judge prefers the negative side
        if len(answers) == len(SIDES):
            positive, negative = answers
            self.counts.update(counts_of_prompt(positive, negative, scores))
            disagrees = _disagrees(scores[positive.id], scores[negative.id])
            if self.config.confirm == "drop" and disagrees:
                drops.prompts["disagreed"] += 1
                return []
        # 3. pair the two sides
        candidates = self.usable_candidates(judged, drops, least=2)
        pairs = self.pairs_of(judged, candidates, scores, drops) if candidates else []
        if is_judged:
            return pairs
        return [replace(pair, chosen_score=None, rejected_score=None) for pair in pairs]

    def rehearse(self) -> tuple[JudgedPrompt, list[PreferencePair]]:
        judged, pairs = super().rehearse()
        if any(c.reason == NO_ROOM for c in judged.candidates):
            raise DataError(
                f"{self.ctx.stage}: the shortest of the first prompts ({len(judged.prompt.ids)} "
                f"tokens) with its contrast fills the {self.ctx.limit(self.config.max_seq_len)} "
                "tokens that prompt and response may have. Raise max_seq_len, or use shorter "
                "contrasts."
            )
        return judged, pairs

    def report(self, drops: DropCounts) -> None:
        super().report(drops)
        counts = sum(self.ctx.runtime.gather([self.counts]), Counter[str]())
        metrics = metrics_of(counts, judged=self.config.is_judged)
        self.out.log({"step": self.ctx.round.first_step, **metrics})
        self.out.summary["metrics"] |= metrics
        if counts["finished"] >= FIRST_LOOK:
            self.checker.see(
                "identical_pairs",
                metrics["contrast/identical_rate"],
                f"{counts['identical']} of {counts['finished']} prompts got the same response on "
                "both sides of their contrast and give no pair: the model ignores the "
                "contrasts. Raise generation.temperature, make the texts differ more, or try "
                f"{setting('kind', 'prefix')} if the model was not trained with system "
                "messages.",
            )


def _disagrees(positive: float | None, negative: float | None) -> bool:
    """Whether the judge scores the negative side higher."""
    return positive is not None and negative is not None and negative > positive


def counts_of_prompt(
    positive: Candidate, negative: Candidate, scores: Mapping[str, float | None]
) -> Counter[str]:
    """What one prompt's two responses add to the counts that `metrics_of` reads."""
    counts = Counter(answered=1, positive=len(positive.ids), negative=len(negative.ids))
    if False in (positive.finished, negative.finished):
        return counts
    counts["finished"] = 1
    first, second = scores[positive.id], scores[negative.id]
    if same_text(positive, negative):
        counts["identical"] = 1
    elif first is not None and second is not None and first != second:
        counts.update(told_apart=1, agreed=int(first > second))
    return counts


def metrics_of(counts: Mapping[str, int], *, judged: bool) -> dict[str, float]:
    """Metrics of a stage's contrasts; a metric whose denominator is 0 is left out.

    contrast/identical_rate: of prompts with two finished responses, the share whose responses are
    the same. contrast/positive_length, contrast/negative_length: mean tokens of a response;
    contrast/length_ratio: the first over the second. contrast/judge_agreement: of pairs whose sides
    the judge scores differently, the share whose positive side has the higher score.
    """
    shares = {
        "identical_rate": ("identical", "finished"),
        "positive_length": ("positive", "answered"),
        "negative_length": ("negative", "answered"),
        "length_ratio": ("positive", "negative"),
        **({"judge_agreement": ("agreed", "told_apart")} if judged else {}),
    }
    return {
        f"contrast/{name}": counts[part] / counts[whole]
        for name, (part, whole) in shares.items()
        if counts[whole]
    }


class NoJudge(Judge):
    """A judge that makes no judgements, for stages that ask nobody."""

    def judge(
        self, ctx: Context, prompts: Sequence[Prompt], candidates_PG: Sequence[Sequence[Candidate]]
    ) -> Iterator[Judgement]:
        yield from ()

    def judgement_ids(self, candidates: Sequence[Candidate]) -> list[str]:
        return []


class ContrastiveDPOConfig(SelfRewardDPOConfig):
    """DPO on contrastive pairs, without a judge: RLCD's pairs (arXiv:2307.12950).

    Of each prompt two responses are sampled from the current weights, one with a text that asks for
    a property, which is chosen, and one with a text that asks against it, which is rejected. Both
    are trained on as responses to the prompt alone. A judge scores them only if `confirm` is set.
    Defaults: beta 0.1, learning rate 5e-7, one epoch, as in an implementation with system
    messages; the paper trains a reward model on such pairs, and then the policy by PPO.
    """

    folder_name: ClassVar[str] = "contrastive"
    hub_tag: ClassVar[str | None] = "rlcd"
    default_learning_rates: ClassVar[tuple[float, float]] = (5e-7, 5e-8)
    maker: ClassVar[type[PairMaker]] = ContrastMaker
    unused: ClassVar[tuple[str, ...]] = (
        *("num_candidate_responses", "pick_paired_rewards_fn", "pairing", "consistency"),
        *("candidates_from", "judge_all"),
    )
    of_judges: ClassVar[tuple[str, ...]] = (
        *("judge", "rewarding_model", "comparison", "postprocess_response"),
        *("is_valid_reward", "is_valid_reward_pair"),
    )

    contrasts: tuple[str | Contrast, ...] = Field(default=tuple(GROUPS), min_length=1)
    """Groups of contrasts that ship ("harmless", "helpful", "complete", "informative"), and
    Contrast(positive=..., negative=..., kind=...) of your own. Each prompt gets one of all these
    contrasts, by a hash of the seed and its id."""
    confirm: Literal["none", "drop", "reorder"] = "none"
    """"none": the positive side is chosen. "drop": pairs in which the judge does not give the
    positive side the higher score are left out. "reorder": the response with the higher score is
    chosen; ties are left out."""
    num_candidate_responses: int = Field(default=2, ge=2, le=2)
    """Always 2, one on each side."""
    generation: SamplingConfig = SamplingConfig()
    """How responses are sampled on both sides; the temperature must be over 0."""

    @field_validator("contrasts")
    @classmethod
    def _groups_known(cls, contrasts: tuple[str | Contrast, ...]) -> tuple[str | Contrast, ...]:
        for name in contrasts:
            if isinstance(name, str) and name not in GROUPS:
                hint = did_you_mean(name, GROUPS)
                raise ValueError(
                    f"{name!r} is not a group of contrasts{hint} There are {', '.join(GROUPS)}, "
                    "and Contrast(positive=..., negative=...) for your own"
                )
        return contrasts

    @model_validator(mode="after")
    def _go_together(self) -> "ContrastiveDPOConfig":
        refused = [name for name in self.unused if name in self.model_fields_set]
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: this stage samples one response on each side of a contrast"
            )
        if self.generation.temperature == 0:
            raise ValueError(
                "generation.temperature must be above 0: at 0 both sides of a contrast often give "
                "the same text, and such pairs are left out"
            )
        for_judges = [name for name in self.of_judges if getattr(self, name) is not None]
        for_judges += ["min_margin"] if self.min_margin else []
        if for_judges and not self.is_judged:
            raise ValueError(
                f"{', '.join(for_judges)}: no judge is asked with {setting('confirm', 'none')}; "
                "set "
                f"{setting('confirm', 'drop')} or 'reorder'"
            )
        return self

    @property
    def is_judged(self) -> bool:
        """Whether a judge scores the responses."""
        return self.confirm != "none"

    def pairs(self) -> tuple[Contrast, ...]:
        """All contrasts of the stage, with each group replaced by the contrasts in it."""
        groups = [GROUPS[it] if isinstance(it, str) else (it,) for it in self.contrasts]
        return tuple(contrast for group in groups for contrast in group)

    def judges_all(self, run_format: int) -> bool:
        """Never, as in runs of format 1 too."""
        return False

    def given_judge(self) -> Any:
        """The judge that SelfRewardDPOConfig would ask, or NoJudge if `confirm` is "none"."""
        return super().given_judge() if self.is_judged else NoJudge()

    def check(self, ctx: Context) -> None:
        if ctx.tokens.tokenizer is None:
            raise ConfigError(
                f"{ctx.stage}: contrasts are texts, which need a tokenizer. {give_tokenizer()}"
            )
        super().check(ctx)

    def check_row(self, row: Any, where: str, ctx: Context) -> PromptRow | None:
        prompt = super().check_row(row, where, ctx)
        if prompt is not None and prompt.messages is None:
            comes_from_data(Prompt(where, 0, prompt.ids, prompt.text), ctx.tokens)
        return prompt

    def work(self, counting: Counting) -> Work:
        texts = [text for c in self.pairs() for text in (c.positive, c.negative)]
        return self.sampled_work(counting, texts=texts)

    def judging_work(
        self, counting: Counting, candidates: Asking, prompt: Range
    ) -> tuple[Asking, tuple[str, ...]]:
        if not self.is_judged:
            return Asking(), ()
        return super().judging_work(counting, candidates, prompt)
