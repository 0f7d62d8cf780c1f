"""SPIN: self-play against one's own last iterate (arXiv:2401.01335, Algorithm 1)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import AliasChoices, Field

from self_rewarding_lm.checks import Checker
from self_rewarding_lm.config import Object, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.rows import PromptRow, prompt_and_completion, truncated
from self_rewarding_lm.records import Candidate, PreferencePair, Prompt
from self_rewarding_lm.runs.lines import Joined, Picked
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.stored import Groups, Stored
from self_rewarding_lm.stages.base import read_once, report_unanswered
from self_rewarding_lm.stages.lengths import Lengths, training_row_lengths
from self_rewarding_lm.stages.preference import PreferenceConfig
from self_rewarding_lm.stages.ranges import Range
from self_rewarding_lm.stages.work import (
    Asking,
    Counting,
    RowShape,
    Work,
    longest_prompt,
    new_tokens,
    prompt_tokens,
    row_shape,
)
from self_rewarding_lm.text import amount


class SelfPlayConfig(PreferenceConfig):
    """Self-play (SPIN): the human response is chosen, the model's own response is rejected.

    An iteration samples responses from the weights it starts from, which are opponent and
    reference, then trains. Defaults: lambda 0.1, learning rate 5e-7, 2 epochs (arXiv:2401.01335,
    B.1).
    Rows: as for SFT, with a prompt and a completion.
    """

    folder_name: ClassVar[str] = "spin"
    hub_tag: ClassVar[str | None] = "spin"
    default_learning_rates: ClassVar[tuple[float, float]] = (5e-7, 5e-8)
    default_epochs: ClassVar[int] = 2

    train_dataset: Object
    """Rows to train on."""
    valid_dataset: Object = None
    """Held-out rows; their loss is logged every optim.eval_every steps."""
    spin_lambda: float = Field(
        default=0.1, gt=0, validation_alias=AliasChoices("spin_lambda", "spin_λ")
    )
    """lambda of Eq. 4.7; it takes the place of dpo_beta."""
    iterations: int = Field(default=1, ge=1)
    """Iterations; each samples from and trains against the weights of the one before."""
    mix_previous: bool = False
    """Train also on the pairs of the iteration before, as the authors do."""
    generation: SamplingConfig = SamplingConfig()
    """How the model's own responses are sampled."""

    @property
    def spin_λ(self) -> float:
        return self.spin_lambda

    def check_row(self, row: Any, where: str, ctx: Context) -> None:
        self._parts(row, where, ctx)

    def run(self, ctx: Context, out: StageDir) -> None:
        humans = self._humans(ctx, out, ctx.rows["train_dataset"], ctx.stage)
        held_out, held_out_name = None, f"{ctx.stage}/valid"
        if "valid_dataset" in ctx.rows:
            held_out = self._humans(ctx, out, ctx.rows["valid_dataset"], held_out_name)
        steps, kept, earlier = 0, 0, Joined()
        for iteration in range(self.iterations):
            own = self._pairs(ctx, out, humans, ctx.stage, iteration)
            valid = None
            if held_out is not None:
                pairs = self._pairs(ctx, out, held_out, held_out_name, iteration)
                valid = self.objective(ctx, out, pairs, beta=self.spin_lambda, round=iteration)
            mixed = Joined(earlier, own) if self.mix_previous else own
            objective = self.objective(ctx, out, mixed, beta=self.spin_lambda, round=iteration)
            earlier = own
            name = f"iteration-{iteration}"
            kept += len(own)
            if (done := out.weights(name)) is not None:  # the stage was stopped after it
                ctx.load(done)
                steps += out.steps_of(name) or self.planned_steps(len(objective))
                continue
            taken = self.fit(ctx, out, objective, valid=valid, round=iteration, first_step=steps)
            steps += taken
            if iteration + 1 < self.iterations:
                out.save_weights(ctx.model, name, steps=taken)
        out.summary |= {"pairs": kept, "iterations": self.iterations, "steps": steps}

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        human = self._humans(ctx, out, ctx.rows["train_dataset"], ctx.stage)[0]
        assert human.completion is not None
        answers = ctx.sample([human], self.generation.shortened(), 1, max_seq_len=self.max_seq_len)
        self.try_pair(ctx, out, human.ids, human.completion, next(answers).ids)

    def work(self, counting: Counting) -> Work:
        data = counting.data(self.train_dataset, training_row_lengths)
        limit, new = counting.limit(self.max_seq_len), new_tokens(self.generation)
        # 1. an own answer to each row, in each iteration
        prompts, prompt = data.rows.times(self.iterations), prompt_tokens(data.lengths, limit)
        longest = longest_prompt(data.lengths, self.max_seq_len, new)
        candidates = Asking(prompts, new, prompts.times(prompt), longest)
        # 2. a pair of each row at most
        pairs, row = Range(0, data.rows.most), played_row(data.lengths, new).capped(limit)
        first = self.planned_training(pairs, row)
        later = first
        if self.mix_previous:  # all iterations but the first have twice the pairs
            later = self.planned_training(pairs.times(2), row)
        training = first.plus(later.repeated(self.iterations - 1))
        made = pairs.times(self.iterations)
        return Work(prompts, prompt, candidates, training=training, made=made)

    def own_weights(self) -> int:
        return self.iterations - 1

    def _humans(self, ctx: Context, out: StageDir, rows: Rows, name: str) -> Stored[Prompt]:
        """The rows as prompts that hold their human completion."""

        def make(row: int, record_id: str) -> Prompt:
            prompt, completion = self._parts(rows.read(row), rows.where(row), ctx)
            return Prompt(
                record_id,
                row,
                prompt.ids,
                prompt.text,
                completion=completion,
                messages=prompt.messages,
            )

        return read_once(ctx, out, rows, Prompt, name, make, on_bad_row=self.on_bad_row)

    def _parts(self, row: Any, where: str, ctx: Context) -> tuple[PromptRow, tuple[int, ...]]:
        """A row's prompt and its human completion. Raises DataError if there is no room for one."""
        prompt, completion = prompt_and_completion(row, where, ctx.tokens)
        limit = ctx.limit(self.max_seq_len)
        truncated((*prompt.ids, *completion), len(prompt.ids), limit, where)
        return prompt, completion

    def _pairs(
        self, ctx: Context, out: StageDir, humans: Stored[Prompt], name: str, iteration: int
    ) -> Sequence[PreferencePair]:
        """Each row's human answer against one that the present weights give.

        Pairs of equal answers are dropped. name: with which the ids of the rows begin.
        """

        def asked(human: Prompt) -> Prompt:
            return replace(human, id=f"{human.id}/{iteration}")

        known, known_prompts = Groups(out.known(Candidate)), Groups(out.known(Prompt))
        all_mine = Picked(humans, ctx.runtime.share([*range(len(humans))]), asked)
        out.append(prompt for prompt in all_mine if prompt.id not in known_prompts)
        missing = [i for i, n in enumerate(humans.ids()) if _own_id(n, iteration) not in known]
        mine = Picked(humans, ctx.runtime.share(missing), asked)
        label = f"{ctx.stage}: own answers"
        with ctx.runtime.progress(len(mine), label, "row", is_share=True) as bar:
            limit = self.max_seq_len
            sampled = ctx.sample(mine, self.generation, 1, max_seq_len=limit)
            for candidate in bar.counting(sampled):
                out.append([candidate])
        out.merge(Prompt)
        out.merge(Candidate)
        own = Groups(out.known(Candidate)).in_order(_own_id(n, iteration) for n in humans.ids())
        report_unanswered(ctx, out, own)
        if ctx.runtime.is_main:
            out.append(_make_pairs(Picked(humans, change=asked), own, ctx))
        out.merge(PreferencePair)

        def is_ours(record_id: str) -> bool:
            row, _, last = record_id.rpartition("/")
            return last == str(iteration) and row.rpartition("/")[0] == name

        found = out.known(PreferencePair, is_ours)
        Checker(self.checks, ctx.stage, warns=ctx.runtime.is_main, tell=out.tell).see(
            "pairs_per_prompt",
            len(found) / max(1, len(humans)),
            f"{amount(len(found), 'pair')} of {amount(len(humans), 'row')}: if the model's own "
            "response is the human one, token by token, there is nothing to learn. More "
            "iterations give nothing.",
        )
        return found


def played_row(lengths: Lengths | None, new: Range) -> RowShape:
    """The shape of a dataset's row with its own answer and one of `new` sampled tokens."""
    human = row_shape(lengths, 1)
    if lengths is None or human.longest is None:
        return RowShape(answers=2)
    most = new.most or 0
    return RowShape(
        human.tokens + new,
        Range(min(human.answer.least, new.least), max(human.answer.most or 0, most)),
        human.longest + most,
        lengths.longest_prompt + max(lengths.longest_answer, most),
        2,
    )


def _own_id(human_id: str, iteration: int) -> str:
    """The id of the model's own answer to a row."""
    return f"{human_id}/{iteration}/0"


def _make_pairs(
    prompts: Sequence[Prompt], own: Sequence[Candidate], ctx: Context
) -> Iterator[PreferencePair]:
    for prompt, candidate in zip(prompts, own, strict=True):
        assert prompt.completion is not None
        if candidate.reason is None and candidate.ids != prompt.completion:
            yield _pair(prompt, prompt.completion, candidate, ctx)


def _pair(
    prompt: Prompt, completion: tuple[int, ...], candidate: Candidate, ctx: Context
) -> PreferencePair:
    return PreferencePair(
        id=prompt.id,
        prompt_ids=prompt.ids,
        chosen_ids=completion,
        rejected_ids=candidate.ids,
        prompt=prompt.text,
        chosen=ctx.tokens.decode(completion),
        rejected=candidate.text,
        rejected_id=candidate.id,
        messages=prompt.messages,
    )
