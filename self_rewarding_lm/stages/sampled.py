"""Stages that make their own pairs: sample, judge, pair, then train, once or in rounds.

With few prompts in each round this is online DPO, or OAIF (arXiv:2402.04792). Optimisers, a moving
reference and the learning rate schedule continue through all rounds as if they were one training.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from pydantic import model_validator

from self_rewarding_lm.checks import Checker
from self_rewarding_lm.config import SelfInstruct
from self_rewarding_lm.context import Context, Need, Round
from self_rewarding_lm.data.control_tokens import from_data
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.rows import PromptRow, check_prompt, prompt_of
from self_rewarding_lm.errors import ConfigError, NoPairError, give_tokenizer
from self_rewarding_lm.generation.candidates import decoding_of
from self_rewarding_lm.judges.consistency import check_consistency, smoothed
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.records import Instruction, PreferencePair
from self_rewarding_lm.runs.lines import Joined
from self_rewarding_lm.runs.run import of_another_run
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stages.base import read_once
from self_rewarding_lm.stages.lengths import Counted, Lengths, prompt_lengths
from self_rewarding_lm.stages.pair_maker import PairMaker, PairSettings, block_size
from self_rewarding_lm.stages.ranges import NOTHING, UNKNOWN, Range, total
from self_rewarding_lm.stages.self_instruct.write import (
    CURRENT,
    SEED,
    check_self_instruct,
    seed_text,
    write_prompts,
)
from self_rewarding_lm.stages.taken import source_of, taken_work
from self_rewarding_lm.stages.work import (
    NOTHING_ASKED,
    Asking,
    Counting,
    RowShape,
    Work,
    longest_prompt,
    new_tokens,
    prompt_tokens,
)
from self_rewarding_lm.text import amount
from self_rewarding_lm.training.loss_config import losses_in, read_by
from self_rewarding_lm.training.state import RoundState

logger = logging.getLogger(__name__)

Maker = TypeVar("Maker")


OBJECT = "its judge is an object, of which nothing is known here"
"""The note in a plan if the user's judge object judges."""

WRITING = "writing the new prompts is not counted, as it is not known how many lists that takes"
"""The note in a plan if the stage has its prompts written."""


class SampledPreferenceConfig(PairSettings):
    """DPO on pairs of the model's own responses, ranked by a judge.

    Prompts are sampled and judged in blocks of `prompts_per_block`, in their order, until
    `num_generated_preference_pairs` are kept; the stage trains on these. A later stage with the
    same prompt dataset continues after the last prompt used, unless it sets `reuse_prompts`. With
    `rounds`, each round samples from the weights that the one before has trained
    (docs/references.md).
    """

    maker: ClassVar[type[PairMaker]] = PairMaker
    """The class that makes the stage's pairs."""

    def datasets(self) -> dict[str, Any]:
        datasets = super().datasets()
        if isinstance(self.prompt_dataset, SelfInstruct):
            del datasets["prompt_dataset"]
            datasets["seed_dataset"] = self.prompt_dataset.seed_dataset
        return datasets

    def weights_used(self) -> set[str]:
        writer = (
            self.prompt_dataset.model if isinstance(self.prompt_dataset, SelfInstruct) else None
        )
        of_writer = {writer} if isinstance(writer, str) and writer != "current" else set()
        previous = {str(self.consistency.previous)} if self.consistency is not None else set()
        judge = self.given_judge()
        of_judge = make_judge(judge).weights_used() if hasattr(judge, "judge") else set()
        return super().weights_used() | of_writer | previous | of_judge

    def given_judge(self) -> Any:
        """The user's judge object, None if there is none."""
        return self.unshuffled_judge

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
        if self.candidates_from is not None and of_another_run(self.candidates_from):
            source_of(ctx.stage, self.candidates_from)
        ctx.check_needs(self.needs(ctx))
        self._check_repeats(ctx)
        if self.judge is not None and not hasattr(self.judge, "judge"):
            raise ConfigError(
                f"{ctx.stage}: judge must have a method judge(ctx, prompts, candidates_PG); got "
                f"{type(self.judge).__name__}."
            )
        if self.consistency is not None:
            check_consistency(ctx.stage, self.consistency, self.scoring_judge(ctx))
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
                    f"{ctx.stage}: postprocess_response reads texts, which need a tokenizer. "
                    f"{give_tokenizer()}"
                )

    def check_row(self, row: Any, where: str, ctx: Context) -> PromptRow | None:
        if isinstance(self.prompt_dataset, SelfInstruct):
            seed_text(row, where, ctx.tokens)
            return None
        prompt = prompt_of(row, where, ctx.tokens)
        check_prompt(prompt.ids, where, ctx.limit(self.max_seq_len))
        return prompt

    def run(self, ctx: Context, out: StageDir) -> None:
        """Make pairs and train on them, once or in rounds.

        If the stage was stopped while a round was trained, it continues from the saved state and
        reads the records of this and the earlier rounds from disk. Without a state it trains all
        rounds again, on the stored records. Raises NoPairError if no round has a pair.
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
                # 1. make pairs with the present weights, or read them from disk
                pairs = self.trained(in_round, out, self.made(self.maker, in_round, out))
                if several:
                    self._log_round(in_round, out, len(pairs))
                # 2. compute what the loss needs of the reference
                objective = self.objective(in_round, out, pairs, round=number)
            except NoPairError as error:
                rounds_without_pairs += 1
                if rounds_without_pairs == self.rounds:
                    raise
                message = "%s: round %d of %d is left out: %s"
                logger.warning(message, ctx.stage, number + 1, self.rounds, error)
                continue
            finally:
                place = out.summary.get("next_prompt", place)
            num_pairs += len(pairs)
            # 3. train on them, unless the state is that of a later round
            if number < trained_round:
                steps += self.planned_steps(len(objective))
            else:
                steps += self.fit(ctx, out, objective, round=number, first_step=steps, kept=kept)
        out.summary |= {f"{self.maker.noun}s": num_pairs, "steps": steps}
        if several:
            out.summary |= {"rounds": self.rounds, "rounds_without_pairs": rounds_without_pairs}

    def _log_round(self, ctx: Context, out: StageDir, num_pairs: int) -> None:
        metrics, results = out.summary["metrics"], [amount(num_pairs, self.maker.noun)]
        for name, label in (("judge/score_mean", "score"), ("completions/mean_length", "length")):
            if metrics.get(name) is not None:
                results.append(f"mean {label} {metrics[name]:.4g}")
        number, line = ctx.round.number + 1, ", ".join(results)
        logger.info("%s: round %d of %d: %s", ctx.stage, number, self.rounds, line)

    def trained(
        self, ctx: Context, out: StageDir, pairs: Sequence[PreferencePair]
    ) -> Sequence[PreferencePair]:
        """The pairs to train on: those of earlier stages in `mix_pairs`, then the pairs made.

        pairs: those that were just made; with `rounds`, those of one round.
        """
        if self.consistency is not None:
            pairs = smoothed(ctx, out, pairs, self.consistency)
        if ctx.run is None or not self.mix_pairs:
            return pairs
        mixed = {name: ctx.run.pairs(name) for name in self.mix_pairs}
        for name in (name for name, their_pairs in mixed.items() if not their_pairs):
            logger.warning("%s: mix_pairs: the stage %s has no pairs.", ctx.stage, name)
        return Joined(*mixed.values(), pairs)

    def rehearse(self, ctx: Context, out: StageDir) -> None:
        judged, _ = self.for_rehearsal(self.maker, ctx, out).rehearse()
        chosen, rejected = judged.candidates[:2]
        self.try_pair(ctx, out, judged.prompt.ids, chosen.ids, rejected.ids)

    def for_rehearsal(self, maker: Callable[..., Maker], ctx: Context, out: StageDir) -> Maker:
        """A maker of pairs from two short candidates of each prompt.

        If the prompts are still to be written, the seeds take their place.
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
        """A copy of the settings with `changes` and with what else makes a rehearsal short."""
        return self.model_copy(update={**changes, "min_parse_rate": 0.0, "candidates_from": None})

    def made(self, maker: type[PairMaker], ctx: Context, out: StageDir) -> Sequence[Any]:
        """Make the stage's records; a server runs meanwhile if the engine has one.

        Returns pairs, or what `maker` makes in place of pairs.
        """
        if self.candidates_from is not None:
            out.take(source_of(ctx.stage, self.candidates_from, ctx.run))
        is_read = ctx.round.weights_gone  # all records are on disk, so no server is needed
        with nullcontext() if is_read else ctx.serving(self.needs(ctx)):
            return maker(self, self.with_prompts(ctx, out), out).make()

    def needs(self, ctx: Context) -> list[Need]:
        """How the stage samples, and whether it needs probabilities with it."""
        if self.candidates_from is not None:
            return []
        return [(decoding_of(self.generation, ctx.tokens), False)]

    def with_prompts(self, ctx: Context, out: StageDir) -> Context:
        """The context with new prompts as its prompt dataset, if the stage has them written.

        The weights of the stage's start write them, in the first round; other weights write in this
        process, because no server holds them.
        """
        settings = self.prompt_dataset
        if not isinstance(settings, SelfInstruct) or self.candidates_from is not None:
            return ctx
        dataset = ctx.rows["seed_dataset"]

        def make(row: int, record_id: str) -> Instruction:
            return Instruction(
                record_id, seed_text(dataset.read(row), dataset.where(row), ctx.tokens), ()
            )

        name = f"{ctx.stage}/{SEED}"
        seeds = read_once(ctx, out, dataset, Instruction, name, make, on_bad_row=self.on_bad_row)
        if settings.model == CURRENT:
            writer = replace(ctx, round=Round(weights_gone=ctx.round.number > 0))
        else:
            writer = replace(ctx, round=Round(), engine=ctx.local_engine())
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
        answers: int = 2,
    ) -> Work:
        """The work of a stage that samples responses and trains on them.

        models: the number of models that answer each prompt. texts: each candidate's prompt has one
        of them added. answers: the responses in each row to train on.
        """
        taken = taken_work(self.candidates_from, counting.works)
        new = new_tokens(self.generation) if taken is None else taken.candidates.new
        limit = counting.limit(self.max_seq_len)
        # 1. count the prompts
        notes: tuple[str, ...] = ()
        remarks: tuple[str, ...] = ()
        if isinstance(self.prompt_dataset, SelfInstruct):
            data, notes = Counted(Range.of(self.prompt_dataset.num_prompts)), (WRITING,)
        else:
            data = counting.data(self.prompt_dataset, prompt_lengths)
        available = data.rows if taken is None else taken.prompts
        wanted = self._wanted_of(available)
        if taken is None:
            prompts_of_round = self._prompts_needed(data.rows)
            if prompts_known := data.rows.most:
                said = self.one_pass_instead(prompts_known), self.asked_often(prompts_known)
                remarks = tuple(filter(None, said))
        else:
            prompts_of_round = self._prompts_taken(taken.prompts)
        prompts, prompt = prompts_of_round.times(self.rounds), prompt_tokens(data.lengths, limit)
        # 2. count the candidates
        each = self.num_candidate_responses * models
        read = prompts.times(prompt)
        longest = longest_prompt(data.lengths, self.max_seq_len, new)
        if texts:  # each candidate has a prompt of its own
            added = counting.sizes(texts)
            read = prompts.times(each).times(prompt + added)
            longest = None if longest is None or added.most is None else longest + added.most
        at_once = self.prompts_per_block * each
        candidates = Asking(prompts.times(each), new, read, longest, at_once)
        if taken is not None:
            candidates = replace(candidates, count=_share(taken, prompts))
        # 3. count the judgements
        judgements, unknown = self.judging_work(counting, candidates, prompt)
        # 4. count the training of all rounds
        most = prompts_of_round.times(self.most_of_prompt).most
        records = Range.of(wanted) if wanted else Range(0, most)
        mixed = total(counting.made.get(name, UNKNOWN) for name in self.mix_pairs)
        row = sampled_row(data.lengths, new, answers).capped(limit)
        training = self.planned_training(records + mixed, row).repeated(self.rounds)
        records = records.times(self.rounds)
        notes = (*unknown, *notes)
        if taken is not None:
            candidates = NOTHING_ASKED
        return Work(
            prompts,
            prompt,
            candidates,
            judgements,
            training,
            records,
            notes=notes,
            remarks=remarks,
        )

    def judging_work(
        self, counting: Counting, candidates: Asking, prompt: Range
    ) -> tuple[Asking, tuple[str, ...]]:
        """The judgements of the candidates, and notes on what is not known of them.

        prompt: the tokens of a prompt.
        """
        if self.unshuffled_judge is not None:
            return Asking(UNKNOWN, NOTHING, NOTHING, here=False), (OBJECT,)
        return Asking(candidates.count, NOTHING, NOTHING, here=False), ()

    def remarks(self, ctx: Context) -> list[str]:
        prompts = self._prompts_known(ctx)
        return [] if prompts is None else list(filter(None, [self.one_pass_instead(prompts)]))

    def _prompts_known(self, ctx: Context) -> int | None:
        """How many prompts the stage has; None if that is known only when it begins."""
        if self.candidates_from is not None:
            return None
        if isinstance(self.prompt_dataset, SelfInstruct):
            return self.prompt_dataset.num_prompts
        return ctx.rows["prompt_dataset"].known_length()

    def _check_repeats(self, ctx: Context) -> None:
        """The check `repeated_prompts`, of what the settings ask for."""
        prompts = self._prompts_known(ctx)
        words = self.asked_often(prompts) if prompts else None
        if prompts and words is not None:
            asked = self._prompts_needed(Range.of(prompts)).least
            checker = Checker(self.checks, ctx.stage, warns=ctx.runtime.is_main)
            checker.see("repeated_prompts", asked / prompts, f"{words}.")

    def asked_often(self, prompts: int) -> str | None:
        """Words if a round asks each of so many prompts more than twice, with what to change."""
        asked = self._prompts_needed(Range.of(prompts)).least
        if asked <= self.checks.of("repeated_prompts")[0] * prompts:
            return None
        setting = "num_generated_preference_pairs"
        if self.prompts_per_round is not None:
            setting = "prompts_per_round"
        elif self.num_generated_preference_pairs is None:
            setting = "max_prompt_passes"
        return (
            f"{amount(prompts, 'prompt')} will be asked {math.ceil(asked / prompts):,} times each "
            f"or more, as {setting} is {getattr(self, setting):,}; answers to one prompt become "
            f"alike. Give more prompts, or lower {setting}"
        )

    def _wanted_of(self, prompts: Range) -> int | None:
        """The pairs that a round makes of its prompts, as far as their number is known."""
        if prompts.most is None:
            return self.num_generated_preference_pairs
        return self.pairs_wanted(prompts.most)

    def _prompts_needed(self, rows: Range) -> Range:
        """The number of prompts that a round works on until it has the wanted pairs.

        rows: the number of rows in the dataset.
        """
        wanted = self._wanted_of(rows)
        if self.prompts_per_round is not None:
            return Range(1 if wanted else self.prompts_per_round, self.prompts_per_round)
        if wanted is None:
            return rows.times(self.max_prompt_passes or 1)
        least = self._least_prompts(wanted, rows.most or 0)
        if not rows.most:
            return Range(least)
        passes = self.max_prompt_passes or 4 * math.ceil(wanted / rows.most)
        return Range(least, passes * rows.most).capped(passes * rows.most)

    def _prompts_taken(self, sampled: Range) -> Range:
        """The number of prompts that are judged of those that another stage answered."""
        capped, wanted = sampled.capped(self.prompts_per_round), self._wanted_of(sampled)
        if wanted is None:
            return capped
        least = self._least_prompts(wanted, sampled.most or 0)
        return Range(min(least, capped.least), capped.most)

    def _least_prompts(self, wanted: int, prompts: int) -> int:
        """How many prompts are worked if each gives as many pairs as it can.

        prompts: of one pass, 0 if unknown.
        """
        place = 0
        while place * self.most_of_prompt < wanted:
            first = wanted if place == 0 else None
            place += block_size(place, self.prompts_per_block, prompts, first)
        return place


def _share(taken: Work, prompts: Range) -> Range:
    """The candidates of so many prompts, if each has its share of those that were taken."""
    all_of_them, answered = taken.candidates.count, taken.prompts
    if not all_of_them.most or not answered.most:
        return UNKNOWN
    return prompts.times(math.ceil(all_of_them.most / answered.most))


def sampled_row(lengths: Lengths | None, new: Range, answers: int) -> RowShape:
    """The shape of a row to train on: a dataset's prompt with `answers` of `new` tokens each."""
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
