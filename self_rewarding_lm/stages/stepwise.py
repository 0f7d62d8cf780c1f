"""Stepwise DPO: an answer grows by the better of some next steps (arXiv:2503.03746).

The model judges its own steps: of each position, a question with the steps before, the best next
step and the worst become a pair that is conditioned on them, and the best one goes on. This file
holds, in this order: what makes the pairs, and the stage.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

from pydantic import Field, model_validator

from self_rewarding_lm.config import ComparisonConfig, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.chat import transcript
from self_rewarding_lm.records import AGAIN, THEN, Candidate, Judgement, PreferencePair, Prompt
from self_rewarding_lm.rubrics import STEP_COMPARISON_PROMPT
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stages.pair_maker import JudgedPrompt, PairMaker
from self_rewarding_lm.stages.pairing import (
    DropCounts,
    learnable,
    pairable,
    passing,
    score_filters,
)
from self_rewarding_lm.stages.ranges import Range
from self_rewarding_lm.stages.self_reward import SelfRewardDPOConfig
from self_rewarding_lm.stages.work import Counting, RowShape, Work

ENDS = ("finished", "max_steps", "no_room", "stuck")
"""Why an answer does not grow any more: the model ended it, it has all steps that it may have, the
model has no room for more, or the judge told no steps apart and nothing may be taken back."""


@dataclass(eq=False)
class Answer:
    """An answer while it grows.

    position: where its next step is sampled, the question with the steps that were taken. taken:
    these steps, each with the position at which it was the best. end: one of ENDS; None while it
    grows.
    """

    question: Prompt
    position: Prompt
    taken: list[tuple[JudgedPrompt, Candidate]] = field(default_factory=list)
    rollbacks: int = 0
    end: str | None = None


class StepMaker(PairMaker):
    """Lets the answers of a block grow together, a step at a time, and pairs their steps.

    A position is a Prompt of its own, whose candidates are next steps. Its id is that of the step
    which was taken before, with "/then" after it; "/again1", "/again2" and so on name positions
    at which steps are sampled anew. So each record names all that it goes on from, and a stage that
    was stopped takes the same steps again, on the records that there are.
    """

    config: "StepwiseDPOConfig"

    def __init__(self, config: "StepwiseDPOConfig", ctx: Context, out: StageDir) -> None:
        super().__init__(config, ctx, out)
        self.taken_back = set[JudgedPrompt]()
        """Positions whose step was taken and then taken back."""
        self.counts: Counter[str] = Counter()

    def prompt_id_of(self, judgement: Judgement) -> str:
        """The position whose steps were judged; their ids are <position's id>/<number>."""
        return judgement.candidate_ids[0].rpartition("/")[0]

    def sampled_and_judged(
        self, prompts: Sequence[Prompt]
    ) -> tuple[list[JudgedPrompt], str | None]:
        """All positions of the prompts' answers, with their steps and judgements."""
        answers = [Answer(prompt, prompt) for prompt in prompts]
        positions, failure = list[JudgedPrompt](), None
        self.taken_back.clear()
        while failure is None and self.any_grows(answers):
            growing = [answer for answer in answers if answer.end is None]
            # 1. sample and judge the next steps of all answers that grow
            block = [self.with_known_records(answer.position) for answer in growing]
            failure = self.make_missing(block)
            positions += block
            # 2. take the best of each position, or take a step back
            for answer, judged in zip(growing, block, strict=True) if failure is None else ():
                self.grow(answer, judged)
        for answer in answers:
            steps = {"steps": len(answer.taken), "rolled_back": answer.rollbacks}
            self.counts.update(answers=1, **steps, **({answer.end: 1} if answer.end else {}))
        return positions, failure

    def any_grows(self, answers: Sequence[Answer]) -> bool:
        """Whether there is a next step; if judges look at whole blocks, in any process."""
        grows = any(answer.end is None for answer in answers)
        return any(self.ctx.runtime.gather([grows])) if self.judge.judges_blocks else grows

    def grow(self, answer: Answer, judged: JudgedPrompt) -> None:
        """Take the best next step, or take the last one back and sample it anew."""
        step = self.best_step(judged)
        if step is not None:
            answer.taken.append((judged, step))
            answer.end = self.end_behind(answer)
            if answer.end is None:
                answer.position = self.store_position(self.position_behind(answer))
        elif answer.rollbacks == self.config.max_rollbacks:
            answer.end = "stuck"
        else:
            answer.rollbacks += 1
            if answer.taken:
                judged, _ = answer.taken.pop()
                self.taken_back.add(judged)
            again = replace(judged.prompt, id=name_of_next_try(judged.prompt.id))
            answer.position = self.store_position(again)

    def best_step(self, judged: JudgedPrompt) -> Candidate | None:
        """The step that wins most at a position, the first of equals; None if no two differ in it.

        Steps that all say the same are not judged, and the first of them is taken. A step that was
        cut off is never taken.
        """
        # 1. steps of which nothing is to be compared
        whole = learnable(judged.candidates, DropCounts(), least=1)
        if not self.learnable(judged, DropCounts()):
            return whole[0] if whole else None
        # 2. the best of those that may be in a pair, as `pair` finds it
        usable = self.usable_candidates(judged, DropCounts(), least=2)
        scores = self.judge.scores(usable, judged.judgements)
        filters = score_filters(scores, self.config.is_valid_reward)
        rated = passing(usable, filters, DropCounts(), least=2)
        known = [score for step in rated if (score := scores[step.id]) is not None]
        if not known or max(known) == min(known):
            return None
        return rated[known.index(max(known))]

    def end_behind(self, answer: Answer) -> str | None:
        """Why the answer ends after the last step that was taken; None if it goes on."""
        judged, step = answer.taken[-1]
        limit = self.ctx.limit(self.config.max_seq_len)
        if step.ids[-1] in self.ctx.tokens.end_ids:
            return "finished"
        if len(answer.taken) == self.config.max_steps:
            return "max_steps"
        length = len(judged.prompt.ids) + len(step.ids)
        return "no_room" if limit is not None and length >= limit else None

    def position_behind(self, answer: Answer) -> Prompt:
        """The question with all steps that were taken, for people and judges as text too.

        With a chat template they are the beginning of the assistant's message.
        """
        question, (_, last) = answer.question, answer.taken[-1]
        ids = tuple(chain.from_iterable(step.ids for _, step in answer.taken))
        said = self.ctx.tokens.decode(ids) or ""
        messages, text = question.messages, f"{question.text or ''}{said}"
        if messages is not None:
            messages = (*messages, {"role": "assistant", "content": said})
            text = transcript(messages)
        name, ids = f"{last.id}/{THEN}", (*question.ids, *ids)
        return replace(question, id=name, ids=ids, text=text, messages=messages)

    def store_position(self, position: Prompt) -> Prompt:
        """The position, which is then on disk."""
        self.out.append([] if position.id in self.known_prompts else [position])
        return position

    def learnable(self, judged: JudgedPrompt, drops: DropCounts) -> list[Candidate]:
        """As of whole responses, but a step may be the best though it is too long to be chosen."""
        return pairable(judged.candidates, drops)

    def pair(self, judged: JudgedPrompt, drops: DropCounts) -> list[PreferencePair]:
        if judged in self.taken_back:
            drops.prompts["taken_back"] += 1
            return []
        return super().pair(judged, drops)

    def report(self, drops: DropCounts) -> None:
        super().report(drops)
        counts = sum(self.ctx.runtime.gather([self.counts]), Counter[str]())
        metrics = {
            "steps/taken": counts["steps"],
            "steps/per_answer": counts["steps"] / max(1, counts["answers"]),
            "steps/rolled_back": counts["rolled_back"],
            **{f"answers/{end}": counts[end] for end in ENDS},
        }
        self.out.log({"step": self.ctx.round.first_step, **metrics})
        self.out.summary["metrics"] |= metrics


def name_of_next_try(position_id: str) -> str:
    """The id of a position at which steps are sampled once more."""
    first, _, last = position_id.rpartition("/")
    if not last.startswith(AGAIN):
        return f"{position_id}/{AGAIN}1"
    return f"{first}/{AGAIN}{int(last.removeprefix(AGAIN)) + 1}"


class StepComparisonConfig(ComparisonConfig):
    """How the judge compares two next steps of an answer, in both orders."""

    prompt_template: str = STEP_COMPARISON_PROMPT
    """jinja2 text with {{ prompt }} (the question and the answer so far), {{ response_a }} and
    {{ response_b }} (two next steps)."""


class StepwiseDPOConfig(SelfRewardDPOConfig):
    """DPO on the steps of an answer: at each step the best next step wins against the worst.

    A step ends where `generation.stop` or `generation.stop_fn` says. At each position, the question
    with the steps before, `num_candidate_responses` next steps are sampled and all compared with
    each other in both orders. The step that wins most often is taken; it and the one that wins
    least often are a pair, whose prompt is the position. If all win equally often, the step before
    is removed and sampled anew. The answer ends at the model's end token (arXiv:2503.03746;
    docs/pairs.md). All other defaults are those of SelfRewardDPOConfig, ours for steps.
    """

    folder_name: ClassVar[str] = "stepwise"
    maker: ClassVar[type[PairMaker]] = StepMaker
    unused: ClassVar[tuple[str, ...]] = (
        *("candidates_from", "consistency", "pick_paired_rewards_fn"),
    )

    num_candidate_responses: int = Field(default=4, ge=2)
    """Next steps sampled at each position."""
    generation: SamplingConfig = SamplingConfig(stop=("\n\n",))
    """How steps are sampled: `stop` (texts) or `stop_fn` (a function of a step's text) says where
    one ends, `max_new_tokens` how long it may be; a step that is cut off is dropped."""
    comparison: StepComparisonConfig | None = StepComparisonConfig()
    """How the judge compares two next steps. None: reward prompts score each step by itself, with
    the position as the prompt."""
    max_steps: int = Field(default=20, ge=1)
    """Most steps of an answer; ours."""
    max_rollbacks: int = Field(default=2, ge=0)
    """How often steps of an answer may be removed; after that the answer ends. Ours."""

    @model_validator(mode="after")
    def _steps_go_on(self) -> "StepwiseDPOConfig":
        refused = [name for name in self.unused if name in self.model_fields_set]
        refused += ["what pairing picks by"] if self.pairing.picks_otherwise else []
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: this stage samples each step itself, and the step that "
                "wins most often is taken"
            )
        if not self.generation.stop and self.generation.stop_fn is None:
            raise ValueError(
                "generation does not say where a step ends: give its stop (such as a blank line, "
                '("\\n\\n",)) or its stop_fn, a function of a step\'s text'
            )
        return self

    @property
    def most_of_prompt(self) -> int:
        return self.max_steps

    def work(self, counting: Counting) -> Work:
        """Of each step at least, and of all that there may be with those that are taken back."""
        work = self.sampled_work(counting)  # as if the first step were the only one
        limit = counting.limit(self.max_seq_len)
        # 1. positions, and how long they are
        positions = work.prompts.times(Range(1, self.max_steps + 2 * self.max_rollbacks))
        before = Range(0, (self.max_steps - 1) * self.generation.max_new_tokens)
        shown = (work.prompt + before).capped(limit)
        # 2. what is sampled and judged there
        candidates = replace(
            work.candidates,
            count=positions.times(self.num_candidate_responses),
            read=positions.times(shown),
            longest=_longer(work.candidates.longest, before, limit),
        )
        judgements, _ = self.judging_work(counting, candidates, shown)
        # 3. rows to train on, which have the steps before in their prompt
        training = work.training
        if training is not None:
            row = _behind_steps(training.row, before).capped(limit)
            training = self.planned_training(training.rows, row).repeated(self.rounds)
        return replace(work, candidates=candidates, judgements=judgements, training=training)


def _behind_steps(row: RowShape, before: Range) -> RowShape:
    """The shape of rows with the tokens of steps before in their prompts."""
    return replace(
        row,
        tokens=row.tokens + before,
        longest=_longer(row.longest, before, None),
        sequence=_longer(row.sequence, before, None),
    )


def _longer(length: int | None, before: Range, limit: int | None) -> int | None:
    """A greatest length with the tokens of steps before; None if it is unknown."""
    if length is None:
        return None
    longer = length + (before.most or 0)
    return longer if limit is None else min(longer, limit)
