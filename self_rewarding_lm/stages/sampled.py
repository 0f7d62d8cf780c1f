"""Stages that make their own pairs: sample, judge, pair, then train, once or in rounds.

Online DPO and OAIF (arXiv:2402.04792) are this with few prompts a round. Optimisers, a moving
reference and the schedule of the learning rate go through all rounds as if they were one training.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from pydantic import model_validator

from self_rewarding_lm.config import SelfInstruct
from self_rewarding_lm.context import Context, Need, Round
from self_rewarding_lm.data.control_tokens import from_data
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.rows import check_prompt, prompt_of
from self_rewarding_lm.errors import ConfigError, NoPairError
from self_rewarding_lm.generation.candidates import decoding_of
from self_rewarding_lm.judges.consistency import check_consistency, smoothed
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.records import Instruction, PreferencePair
from self_rewarding_lm.runs.lines import Joined
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stages.base import read_once
from self_rewarding_lm.stages.lengths import Counted, Lengths, prompt_lengths
from self_rewarding_lm.stages.pair_maker import PairMaker, PairSettings
from self_rewarding_lm.stages.ranges import NOTHING, UNKNOWN, Range, total
from self_rewarding_lm.stages.self_instruct.write import (
    CURRENT,
    SEED,
    check_self_instruct,
    seed_text,
    write_prompts,
)
from self_rewarding_lm.stages.work import (
    Asking,
    Counting,
    RowShape,
    Work,
    longest_prompt,
    new_tokens,
    prompt_tokens,
)
from self_rewarding_lm.training.loss_config import losses_in, read_by
from self_rewarding_lm.training.state import RoundState

logger = logging.getLogger(__name__)

Maker = TypeVar("Maker")


OBJECT = "its judge is an object, of which nothing is known here"


WRITING = "writing the new prompts is not counted, as it is not known how many lists that takes"


class SampledPreferenceConfig(PairSettings):
    """DPO on pairs of the model's own responses, ranked by a judge.

    Prompts are worked in blocks of `prompts_per_block`, in their order, until
    `num_generated_preference_pairs` are kept; those are trained on. A later stage with the same
    prompt dataset goes on behind them unless it sets `reuse_prompts`. With `rounds` the next
    prompts are answered by the weights that were trained so far, and so on (docs/references.md).
    """

    maker: ClassVar[type[PairMaker]] = PairMaker
    """What makes the stage's pairs."""

    def datasets(self) -> dict[str, Any]:
        found = super().datasets()
        if isinstance(self.prompt_dataset, SelfInstruct):
            del found["prompt_dataset"]
            found["seed_dataset"] = self.prompt_dataset.seed_dataset
        return found

    def weights_used(self) -> set[str]:
        writer = (
            self.prompt_dataset.model if isinstance(self.prompt_dataset, SelfInstruct) else None
        )
        named = {writer} if isinstance(writer, str) and writer != "current" else set()
        compared = {str(self.consistency.previous)} if self.consistency is not None else set()
        judge = self.given_judge()
        judging = make_judge(judge).weights_used() if hasattr(judge, "judge") else set()
        return super().weights_used() | named | compared | judging

    def given_judge(self) -> Any:
        """The judge that is an object of the user's, if any."""
        return self.judge

    @model_validator(mode="after")
    def _rounds_are_passes(self) -> "SampledPreferenceConfig":
        if self.rounds > 1 and self.num_train_steps is not None:
            raise ValueError(
                "num_train_steps is the length of one training; with rounds each goes over its "
                "pairs optim.epochs times. Set rounds and prompts_per_round for the length"
            )
        if self.rounds > 1 and self.early_stopper_eval_module is not None:
            raise ValueError(
                "early stopping would end each round by itself and cannot be used with rounds; "
                "several stages in a row can each stop early"
            )
        return self

    def check(self, ctx: Context) -> None:
        if isinstance(self.prompt_dataset, SelfInstruct):
            check_self_instruct(ctx, self.prompt_dataset, self.on_bad_row)
        super().check(ctx)
        for name in self.mix_pairs:
            if name not in ctx.earlier:
                raise ConfigError(
                    f"{ctx.stage}: mix_pairs must name earlier stages "
                    f"({', '.join(ctx.earlier) or 'there is none'}); got {name!r}."
                )
        ctx.check_needs(self.needs(ctx))
        if self.judge is not None and not hasattr(self.judge, "judge"):
            raise ConfigError(
                f"{ctx.stage}: judge must have a method judge(ctx, prompts, candidates_PG); got "
                f"{type(self.judge).__name__}."
            )
        if self.consistency is not None:
            check_consistency(ctx.stage, self.consistency, self.build_judge(ctx))
            if not read_by(losses_in(self.loss)).compares:
                raise ConfigError(
                    f"{ctx.stage}: consistency is a label smoothing, and no loss of the stage "
                    f"compares the two responses of a pair, so it would change nothing."
                )
        if self.postprocess_response is not None:
            if not callable(self.postprocess_response):
                raise ConfigError(
                    f"{ctx.stage}: postprocess_response must be a function of a text; got "
                    f"{type(self.postprocess_response).__name__}."
                )
            if ctx.tokens.tokenizer is None:
                raise ConfigError(
                    f"{ctx.stage}: postprocess_response reads texts, so the trainer needs "
                    "tokenizer_encode and tokenizer_decode, or tokenizer."
                )

    def check_row(self, row: Any, where: str, ctx: Context) -> None:
        if isinstance(self.prompt_dataset, SelfInstruct):
            seed_text(row, where, ctx.tokens)
            return
        check_prompt(prompt_of(row, where, ctx.tokens).ids, where, ctx.limit(self.max_seq_len))

    def run(self, ctx: Context, out: StageDir) -> None:
        """Make pairs and train on them, once or in rounds.

        A stage that was stopped in the training of a round goes on from its state: what this round
        and those before it made is read from disk. Without a state all rounds are trained again,
        from their records. Raises NoPairError if no round has a pair.
        """
        several = self.rounds > 1
        if several and self.reference_from_start():
            ctx = replace(ctx, start=ctx.model.state())
        state = out.state_words() if several else None
        trained_round = 0 if state is None else state["round"]
        kept, num_pairs, steps, place = RoundState(self.rounds), 0, 0, ctx.first_prompt
        rounds_without_pairs = 0
        for number in range(self.rounds):
            if several:
                out.begin_round(number)
            round = Round(number, steps, weights_gone=0 < number <= trained_round)
            in_round = replace(ctx, first_prompt=place, round=round)
            try:
                # 1. make pairs with the present weights, or read what they made
                pairs = self.trained(in_round, out, self.made(self.maker, in_round, out))
                if several:
                    self._log_round(in_round, out, len(pairs))
                # 2. ask the reference about them
                objective = self.objective(in_round, out, pairs, round=number)
            except NoPairError as error:
                rounds_without_pairs += 1
                if rounds_without_pairs == self.rounds:
                    raise
                words = "%s: round %d of %d is left out: %s"
                logger.warning(words, ctx.stage, number + 1, self.rounds, error)
                continue
            finally:
                place = out.summary.get("next_prompt", place)
            num_pairs += len(pairs)
            # 3. train on them, unless the weights of a later round are at hand
            if number < trained_round:
                steps += self.planned_steps(len(objective))
            else:
                steps += self.fit(ctx, out, objective, round=number, first_step=steps, kept=kept)
        out.summary |= {"pairs": num_pairs, "steps": steps}
        if several:
            out.summary |= {"rounds": self.rounds, "rounds_without_pairs": rounds_without_pairs}

    def _log_round(self, ctx: Context, out: StageDir, num_pairs: int) -> None:
        metrics, words = out.summary["metrics"], [f"{num_pairs} pairs"]
        for name, label in (("judge/score_mean", "score"), ("completions/mean_length", "length")):
            if metrics.get(name) is not None:
                words.append(f"mean {label} {metrics[name]:.4g}")
        number, said = ctx.round.number + 1, ", ".join(words)
        logger.info("%s: round %d of %d: %s", ctx.stage, number, self.rounds, said)

    def trained(
        self, ctx: Context, out: StageDir, pairs: Sequence[PreferencePair]
    ) -> Sequence[PreferencePair]:
        """What is trained on, given the pairs that were made, with `rounds` those of each: with the
        pairs of earlier stages before them."""
        if self.consistency is not None:
            pairs = smoothed(ctx, out, pairs, self.consistency)
        if ctx.run is None or not self.mix_pairs:
            return pairs
        mixed = {name: ctx.run.pairs(name) for name in self.mix_pairs}
        for name in (name for name, found in mixed.items() if not found):
            logger.warning("%s: mix_pairs: the stage %s has no pairs.", ctx.stage, name)
        return Joined(*mixed.values(), pairs)

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        judged, _ = self.for_rehearsal(self.maker, ctx, out).rehearse()
        chosen, rejected = judged.candidates[:2]
        self.try_pair(ctx, out, judged.prompt.ids, chosen.ids, rejected.ids)

    def for_rehearsal(self, maker: Callable[..., Maker], ctx: Context, out: StageDir) -> Maker:
        """A maker that has less to do: two short candidates of each prompt.

        Seeds are answered in place of prompts that are still to be written.
        """
        changes: dict[str, Any] = {
            "generation": self.generation.shortened(),
            "num_candidate_responses": 2,
        }
        if "seed_dataset" in ctx.rows:
            ctx = replace(ctx, rows={**ctx.rows, "prompt_dataset": ctx.rows["seed_dataset"]})
            changes["on_bad_row"] = "skip"
        return maker(self.shortened(changes), ctx, out)

    def shortened(self, changes: dict[str, Any]) -> "SampledPreferenceConfig":
        """The stage with less to do."""
        return self.model_copy(update={**changes, "min_parse_rate": 0.0})

    def made(self, maker: type[PairMaker], ctx: Context, out: StageDir) -> Sequence[Any]:
        """What a maker makes; a server that the engine starts for it is gone afterwards."""
        is_read = ctx.round.weights_gone  # then there is nothing to ask a server
        with nullcontext() if is_read else ctx.serving(self.needs(ctx)):
            return maker(self, self.with_prompts(ctx, out), out).make()

    def needs(self, ctx: Context) -> list[Need]:
        """What the stage asks of the engine."""
        return [(decoding_of(self.generation, ctx.tokens), False)]

    def with_prompts(self, ctx: Context, out: StageDir) -> Context:
        """The context with new prompts in it, where the stage has them written.

        Other weights than the present ones write in this process: no server holds them.
        """
        settings = self.prompt_dataset
        if not isinstance(settings, SelfInstruct):
            return ctx
        dataset = ctx.rows["seed_dataset"]

        def make(row: int, record_id: str) -> Instruction:
            return Instruction(
                record_id, seed_text(dataset.read(row), dataset.where(row), ctx.tokens), ()
            )

        name = f"{ctx.stage}/{SEED}"
        seeds = read_once(ctx, out, dataset, Instruction, name, make, on_bad_row=self.on_bad_row)
        writer = ctx if settings.model == CURRENT else replace(ctx, engine=ctx.local_engine())
        written = write_prompts(writer, out, seeds, settings, limit=ctx.limit(self.max_seq_len))
        rows = [{"prompt": from_data(r.text), "instruction_id": r.id} for r in written]
        return replace(ctx, rows={"prompt_dataset": Rows(rows, "new prompts")})

    def work(self, counting: Counting) -> Work:
        return self.sampled_work(counting)

    def sampled_work(
        self,
        counting: Counting,
        *,
        models: int = 1,
        texts: Sequence[str] = (),
        rows_of_prompt: int | None = None,
        answers: int = 2,
    ) -> Work:
        """The work of a stage that samples and trains on what it sampled.

        models: how many answer each prompt. texts: one of them stands beside the prompt of each
        candidate. rows_of_prompt: rows to train on that a prompt gives at most; None for those of
        `pairing`. answers: how many each of these rows has.
        """
        rows_of_prompt = rows_of_prompt or self.pairing.pairs_per_prompt
        limit, new = counting.limit(self.max_seq_len), new_tokens(self.generation)
        # 1. prompts
        notes: tuple[str, ...] = ()
        if isinstance(self.prompt_dataset, SelfInstruct):
            data, notes = Counted(Range.of(self.prompt_dataset.num_prompts)), (WRITING,)
        else:
            data = counting.data(self.prompt_dataset, prompt_lengths)
        prompts_of_round = self._prompts_needed(data.rows, rows_of_prompt)
        prompts, prompt = prompts_of_round.times(self.rounds), prompt_tokens(data.lengths, limit)
        # 2. candidates
        each = self.num_candidate_responses * models
        read = prompts.times(prompt)
        longest = longest_prompt(data.lengths, self.max_seq_len, new)
        if texts:  # the prompt of each candidate is read for itself
            added = counting.sizes(texts)
            read = prompts.times(each).times(prompt + added)
            longest = None if longest is None or added.most is None else longest + added.most
        at_once = self.prompts_per_block * each
        candidates = Asking(prompts.times(each), new, read, longest, at_once)
        # 3. judgements
        judgements, unknown = self.judging_work(counting, candidates, prompt)
        # 4. training, in each round
        wanted = self.num_generated_preference_pairs
        most = prompts_of_round.times(rows_of_prompt).most
        made = Range.of(wanted) if wanted else Range(0, most)
        mixed = total(counting.made.get(name, UNKNOWN) for name in self.mix_pairs)
        row = sampled_row(data.lengths, new, answers).capped(limit)
        training = self.planned_training(made + mixed, row).repeated(self.rounds)
        made = made.times(self.rounds)
        notes = (*unknown, *notes)
        return Work(prompts, prompt, candidates, judgements, training, made, notes=notes)

    def judging_work(
        self, counting: Counting, candidates: Asking, prompt: Range
    ) -> tuple[Asking, tuple[str, ...]]:
        """The judgements of candidates, and notes on what is not known of them. prompt: tokens."""
        if self.judge is not None:
            return Asking(UNKNOWN, NOTHING, NOTHING, here=False), (OBJECT,)
        return Asking(candidates.count, NOTHING, NOTHING, here=False), ()

    def _prompts_needed(self, rows: Range, rows_of_prompt: int) -> Range:
        """Prompts that a round works on until it has as many pairs as are wanted. rows: of the
        dataset."""
        wanted, block = self.num_generated_preference_pairs, self.prompts_per_block
        if self.prompts_per_round is not None:
            return Range(1 if wanted else self.prompts_per_round, self.prompts_per_round)
        if wanted is None:
            return rows.times(self.max_prompt_passes or 1)
        least = block * math.ceil(wanted / rows_of_prompt / block)
        if not rows.most:
            return Range(least)
        passes = self.max_prompt_passes or 4 * math.ceil(wanted / rows.most)
        return Range(least, passes * rows.most).capped(passes * rows.most)


def sampled_row(lengths: Lengths | None, new: Range, answers: int) -> RowShape:
    """The shape of a dataset's prompt with sampled answers of `new` tokens each."""
    if lengths is None:
        return RowShape(answer=new, answers=answers)
    most = new.most or 0
    return RowShape(
        Range.of(round(lengths.prompt)) + new.times(answers),
        new,
        lengths.longest_prompt + answers * most,
        lengths.longest_prompt + most,
        answers,
    )
