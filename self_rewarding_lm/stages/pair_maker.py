"""Makes pairs of prompts: samples, judges and pairs block by block, with each record on disk.

Knows nothing of training.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from self_rewarding_lm.checks import Checker
from self_rewarding_lm.config import Object, SamplingConfig
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import BadRows, read_prompt
from self_rewarding_lm.errors import ConfigError, JudgeError, NoPairError
from self_rewarding_lm.judges.asking import FIRST_LOOK
from self_rewarding_lm.judges.base import Judge
from self_rewarding_lm.judges.consistency import ComparingJudge, ConsistencyConfig
from self_rewarding_lm.judges.make import make_judge
from self_rewarding_lm.judges.shuffled import ShuffledJudge
from self_rewarding_lm.judges.tally import JudgeWatcher, StageTally, together
from self_rewarding_lm.records import (
    Candidate,
    Judgement,
    PreferencePair,
    Prompt,
    prompt_id_of,
    stable_hash,
)
from self_rewarding_lm.runs.lines import batched
from self_rewarding_lm.runs.stage_files import FORMAT
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.runs.stored import Groups, IdOrder, id_order
from self_rewarding_lm.stages.pairing import (
    DropCounts,
    PairingConfig,
    Picker,
    Rated,
    make_pairs,
    pairable,
    score_variances,
)
from self_rewarding_lm.stages.preference import PreferenceConfig
from self_rewarding_lm.stages.taken import next_place, own_prompt, taken_prompts
from self_rewarding_lm.text import amount

logger = logging.getLogger(__name__)


class PairSettings(PreferenceConfig):
    """How a stage makes its pairs: from prompts to judged candidates, and from these to pairs."""

    prompt_dataset: Object
    """Texts, message lists, ids, `{"prompt": ...}` rows or any row with a prompt part
    (docs/data.md); or SelfInstruct(...), with which a model writes new prompts."""
    num_generated_preference_pairs: int | None = Field(default=None, ge=1)
    """Pairs to make, in each round. None: all that one pass over the prompts gives."""
    unless_few_prompts: Literal[True] | None = None
    """True: if one pass over the prompts cannot give num_generated_preference_pairs, the stage
    makes one pass, as with None. paper_recipe sets it for the paper's own numbers."""
    rounds: int = Field(default=1, ge=1)
    """Times that pairs are made and trained on; optimiser and schedule continue through all."""
    prompts_per_round: int | None = Field(default=None, ge=1)
    """Prompts of each round. None: as many as its pairs need."""
    num_candidate_responses: int = Field(default=4, ge=2)
    """Responses sampled to each prompt, N of arXiv:2401.10020, 3.1.3."""
    generation: SamplingConfig = SamplingConfig()
    """How responses are sampled."""
    postprocess_response: Object = None
    """A function str -> str: what judges see of a response in place of its text; training uses the
    response as it was sampled. Without thoughts, for example:
    `lambda text: re.sub(r"(?s)<think>.*?</think>\\s*", "", text)`."""
    judge_all: bool = False
    """Judge also candidates that can be in no pair, whatever their scores (docs/pairs.md): those
    that were cut off, and all of a prompt with fewer than two others. It costs judgements and
    makes no more pairs; measures of the judge are then of all responses."""
    judge: Object = None
    """A Judge of your own in place of the stage's, or a class of judges that needs no settings,
    such as VoteJudge; ShuffledJudge moves the scores of the stage's own (docs/controls.md)."""
    prompts_per_block: int = Field(default=32, ge=1)
    """Prompts that are sampled and judged at most before the pairs are counted again. A block ends
    with a pass over the prompts; the first one has no more prompts than pairs to make."""
    max_prompt_passes: int | None = Field(default=None, ge=1)
    """Passes over the prompts at most. Default: four times what the pairs need."""
    candidates_from: str | None = None
    """The stage whose candidates are judged in place of new ones: an earlier stage's name, or
    FOLDER:STAGE of another run. Its prompts must be those of the same rows of `prompt_dataset`;
    `generation` and `num_candidate_responses` are not used. If the stage does not start from the
    weights that sampled them (`init_from`), they are off-policy."""
    reuse_prompts: bool = False
    """Begin at the first prompt even if an earlier stage used it."""
    min_parse_rate: float = Field(default=0.2, ge=0, le=1)
    """Least share of judgements with a score, checked from the 64th on; 0 turns it off."""
    min_margin: float = Field(default=0.0, ge=0)
    """Least difference of the two scores of a pair."""
    is_valid_reward: Object = None
    """A function float -> bool; candidates for whose mean score it returns False are left out."""
    is_valid_reward_pair: Object = None
    """A function of the scores (chosen, rejected), scalar tensors, -> bool; pairs for which it
    returns False are left out."""
    pick_paired_rewards_fn: Object = None
    """A function from a prompt's scores, a tensor (n,), to the indices (2,) of chosen and rejected.
    None: `pairing` picks."""
    pairing: PairingConfig = PairingConfig()
    """Which candidates become pairs. Default: the best against the worst."""
    mix_pairs: tuple[str, ...] = ()
    """Names of earlier stages whose pairs are trained on beside the stage's own."""
    consistency: ConsistencyConfig | None = None
    """Weight pairs by how far an earlier model ranks the candidates alike (arXiv:2410.12735)."""

    @model_validator(mode="after")
    def _one_picker(self) -> "PairSettings":
        if self.pick_paired_rewards_fn is not None and self.pairing.picks_otherwise:
            raise ValueError(
                "pick_paired_rewards_fn picks a pair itself; leave it out, or those of pairing's "
                "pick, pairs_per_prompt, length_control, length_penalty and tie_break that are set"
            )
        return self

    @property
    def most_of_prompt(self) -> int:
        """The most pairs that a prompt gives."""
        return self.pairing.pairs_per_prompt

    def pairs_wanted(self, prompts: int, run_format: int = FORMAT) -> int | None:
        """How many pairs a round makes of so many prompts; None: all that one pass gives."""
        number = self.num_generated_preference_pairs
        if number is None or not self.unless_few_prompts or run_format == 1:
            return number
        return number if number <= prompts * self.most_of_prompt else None

    def one_pass_instead(self, prompts: int, run_format: int = FORMAT) -> str | None:
        """Words if one pass takes the place of `num_generated_preference_pairs`."""
        number = self.num_generated_preference_pairs
        if number is None or self.pairs_wanted(prompts, run_format) is not None:
            return None
        return (
            f"{amount(prompts, 'prompt')}, each used once: too few for the {number:,} pairs of "
            "the paper. num_generated_preference_pairs sets another number"
        )

    @field_validator("judge")
    @classmethod
    def _judge_made(cls, judge: Any) -> Any:
        """The judge of a class, as a recipe names one."""
        if not (isinstance(judge, type) and issubclass(judge, Judge)):
            return judge
        try:
            return judge()
        except TypeError as error:
            raise ValueError(f"{judge.__name__} needs settings: {error}. Give an object") from error

    @model_validator(mode="after")
    def _candidates_once(self) -> "PairSettings":
        if self.candidates_from is not None and self.rounds > 1:
            raise ValueError(
                "candidates_from: another stage's candidates are there once, and every round would "
                "need new ones; leave rounds out"
            )
        return self

    def build_judge(self, ctx: Context) -> Judge:
        """The stage's judge; the user's if `judge` is given. Its scores are not moved yet."""
        if self.unshuffled_judge is None:
            raise ConfigError(f"{ctx.stage}: give judge=, an object with a judge method.")
        return make_judge(self.unshuffled_judge)

    @property
    def unshuffled_judge(self) -> Any:
        """`judge`, or the one whose scores it moves; None if the stage's own judge scores."""
        return self.judge.of if isinstance(self.judge, ShuffledJudge) else self.judge

    def scoring_judge(self, ctx: Context) -> Judge:
        """The judge that scores: the built one, with its scores moved if `judge` moves them."""
        judge = make_judge(self.build_judge(ctx))
        return ShuffledJudge(judge) if isinstance(self.judge, ShuffledJudge) else judge

    def judges_all(self, run_format: int) -> bool:
        """Whether candidates are judged that can be in no pair, as in runs of format 1."""
        return self.judge_all or run_format == 1

    def score_scale(self, ctx: Context) -> tuple[float, float] | None:
        """The lowest and the highest score that the judge may give; None if they are not known."""
        return None

    def picker(self) -> Picker | None:
        """The picker that calls `pick_paired_rewards_fn`; None if `pairing` picks."""
        function = self.pick_paired_rewards_fn
        if function is None:
            return None

        def pick(rated: Sequence[Rated]) -> Iterable[tuple[Rated, Rated]]:
            scores = torch.tensor([it.score for it in rated])  # (n,)
            picked = torch.as_tensor(function(scores)).flatten().tolist()
            if len(picked) != 2 or not all(0 <= i < len(rated) for i in picked):
                raise ConfigError(
                    "pick_paired_rewards_fn must return two indices, of the chosen and the "
                    f"rejected of {len(rated)} candidates; got {picked}."
                )
            return [(rated[int(picked[0])], rated[int(picked[1])])]

        return pick

    def pair_check(self) -> Callable[[float, float], bool] | None:
        """`is_valid_reward_pair`, which takes scalar tensors, as a function of two floats."""
        function = self.is_valid_reward_pair
        if function is None:
            return None
        return lambda chosen, rejected: bool(function(torch.tensor(chosen), torch.tensor(rejected)))


@dataclass(eq=False)
class JudgedPrompt:
    """A prompt with the candidates and judgements that it has so far."""

    prompt: Prompt
    candidates: list[Candidate]
    judgements: list[Judgement]

    @property
    def answers(self) -> list[Candidate]:
        """The candidates that have a response: those without a reason why there is none."""
        return [candidate for candidate in self.candidates if candidate.reason is None]


class PairMaker:
    """Samples, judges and pairs a stage's prompts block by block; uses records on disk again.

    Only counts and ids of a finished block stay in memory. Subclasses change what is made by five
    hooks: `sample` (the candidates of a block), `learnable` (those that may be learnt from),
    `candidates_to_judge` (the candidates of a prompt that the judge is shown), `judged_together`
    (those of the judgements of a whole block) and `pair` (the records that a prompt gives).
    """

    record_type: ClassVar[type[Any]] = PreferencePair
    noun: ClassVar[str] = "pair"
    """The word for a record that a prompt gives."""
    counted: ClassVar[tuple[str, str]] = ("pairs", "pairs")
    """What metrics call the records that are kept, and the prompts that give none."""

    asks_logprobs: ClassVar[bool] = False
    """Whether candidates get the sampler's log-probs."""

    @property
    def cut_responses(self) -> str:
        """What becomes of responses that were cut off, in words."""
        return f"no {self.noun} is made of them"

    def __init__(self, config: PairSettings, ctx: Context, out: StageDir) -> None:
        self.config, self.ctx, self.out = config, ctx, out
        self.judge = config.scoring_judge(ctx)
        self.judges_all = config.judges_all(ctx.format)
        if config.consistency is not None:
            self.judge = ComparingJudge(self.judge, config.consistency)
        self.known_prompts = Groups(out.known(Prompt))
        self.known_candidates = Groups(out.known(Candidate), lambda c: c.prompt_id)
        self.taken: list[str] | None = None
        """With `candidates_from` the ids of all prompts, by their places."""
        if config.candidates_from is not None:
            of_source = self.known_prompts, self.known_candidates
            self.taken = taken_prompts(ctx, config.candidates_from, *of_source)
        self.known_judgements = Groups(out.known(Judgement), self.prompt_id_of)
        self.known_records = Groups(out.known(self.record_type))
        rows = ctx.rows.get("prompt_dataset", ())
        self.num_prompts = len(rows if self.taken is None else self.taken)
        """Prompts of one pass."""
        self.wanted = config.pairs_wanted(self.num_prompts, ctx.format)
        self.rows_asked = set[str]()
        """The rows whose prompts were worked."""
        self.checker = Checker(config.checks, ctx.stage, warns=ctx.runtime.is_main, tell=out.tell)
        self.watcher = JudgeWatcher(
            self.checker, min_parse_rate=config.min_parse_rate, world=ctx.runtime.world
        )
        self.bad_rows = BadRows(config.on_bad_row)
        self.tally = StageTally()

    # The five hooks

    def sample(self, block: Sequence[JudgedPrompt]) -> None:
        """Sample the candidates that are missing, store them and add them to their prompts.

        With `candidates_from` none is missing.
        """
        if self.taken is None:
            self.sample_missing(self.ctx, self.without_all_candidates(block))

    def learnable(self, judged: JudgedPrompt, drops: DropCounts) -> list[Candidate]:
        """The candidates that can be learnt from, whatever they are scored; [] if the prompt can
        give no record. `drops` counts the others by reason."""
        longest = self.config.pairing.max_chosen_length
        return pairable(judged.candidates, drops, max_chosen_length=longest)

    def candidates_to_judge(self, judged: JudgedPrompt) -> list[Candidate]:
        """The candidates of a prompt that the judge is shown together, to make what judgements are
        missing; [] if none is missing."""
        shown = self.shown_to_judge(judged)
        return [] if not shown or self.has_judged(judged, shown) else shown

    def judged_together(self, judged: JudgedPrompt) -> list[Candidate]:
        """The candidates of a prompt for `Judge.judge_block`, the same whenever it is asked."""
        return self.shown_to_judge(judged)

    def pair(self, judged: JudgedPrompt, drops: DropCounts) -> list[Any]:
        """The records that a prompt gives; `drops` counts what was left out, by reason."""
        candidates = self.usable_candidates(judged, drops, least=2)
        if not candidates:
            return []
        scores = self.judge.scores(candidates, judged.judgements)
        return self.pairs_of(judged, candidates, scores, drops)

    def shown_to_judge(self, judged: JudgedPrompt) -> list[Candidate]:
        """The candidates of a prompt that are judged: those whose score can matter.

        All that have a response if the judge needs all, or the settings say so.
        """
        if self.judges_all:
            return judged.answers
        learnable = self.learnable(judged, DropCounts())
        return judged.answers if learnable and self.judge.needs_all else learnable

    def has_judged(self, judged: JudgedPrompt, candidates: Sequence[Candidate]) -> bool:
        """Whether a prompt has all judgements of these of its candidates."""
        return self.judge.has_judged(candidates, judged.judgements, self.ctx.format)

    # The loop over all prompts

    def make(self) -> Sequence[Any]:
        """Make and store the stage's records, and return them in the order of the prompts.

        Raises JudgeError if the judge cannot be used, and the error of `nothing_made` if no prompt
        gave a record.
        """
        ctx, out, wanted, places = self.ctx, self.out, self.wanted, self.places()
        place, end = places.start, places.stop
        words = self.config.one_pass_instead(self.num_prompts, ctx.format)
        if words is not None:
            logger.info("%s: %s.", ctx.stage, words)
        drops, kept_ids = DropCounts(Counter(bad_row=0)), list[str]()
        label, unit = f"{ctx.stage}: sampling and judging", self.noun if wanted else "prompt"
        with ctx.runtime.progress(wanted or end - place, label, unit) as bar:
            while place < end and (wanted is None or len(kept_ids) < wanted):
                block = self.next_block(place, places)
                self.see_repeated(block.start - places.start, len(kept_ids))
                # 1. sample, judge and pair the block's prompts, each process its own
                prompts = self.read_prompts(ctx.runtime.share(list(block)))
                by_prompt = self.make_block(prompts, drops)
                self.rows_asked.update(prompt_id.split("/")[1] for prompt_id in by_prompt)
                # 2. store the records, in the order of the prompts
                in_order = [by_prompt.get(self.prompt_id(place), []) for place in block]
                records = list(chain.from_iterable(in_order))
                if wanted is not None:
                    records = records[: wanted - len(kept_ids)]
                self.keep(records)
                kept_ids += [record.id for record in records]
                place = block.stop
                bar.update(len(records) if wanted else len(block))
        bad_rows = self.bad_rows.together(ctx.runtime.gather([self.bad_rows]))
        prompts_worked = place - places.start
        bad_rows.report(f"{ctx.stage}: prompts", prompts_worked, warn=ctx.runtime.is_main)
        drops.prompts["bad_row"] = bad_rows.count
        drops.prompts["surplus"] = drops.kept - len(kept_ids)
        drops.kept = len(kept_ids)
        for record_type in (Prompt, Candidate, Judgement, self.record_type):
            out.merge(record_type)
        out.summary["next_prompt"] = place if self.taken is None else self.next_prompt(place)
        self.report(drops)
        return Groups(out.known(self.record_type)).in_order(kept_ids)

    def make_block(self, prompts: Sequence[Prompt], drops: DropCounts) -> dict[str, list[Any]]:
        """Sample, judge and pair this process's prompts of a block.

        Returns the records of all processes by prompt id, and counts in `drops` what all of them
        left out. Raises JudgeError on every process if the judge cannot be used.
        """
        # 1. sample and judge what is missing
        block, failure = self.sampled_and_judged(prompts)
        # 2. pair
        local_drops, local_records = DropCounts(), dict[str, list[Any]]()
        for judged in block:
            of_prompt = local_records.setdefault(prompt_id_of(judged.prompt.id), [])
            of_prompt += self.pair(judged, local_drops)
        # 3. check the scores; all processes stop if one has to
        counted = set[str]()
        for judged in block:
            judgements = self.judge.own(judged.judgements)
            scores = self.judge.scores(judged.candidates, judgements)
            skipped = 0
            if not self.has_judged(judged, judged.answers):
                skipped = len(judged.answers) - len(self.shown_to_judge(judged))
            made = made_by_judging(judgements)
            prompt_id = prompt_id_of(judged.prompt.id)
            again = prompt_id in counted
            self.tally.add(judged.candidates, made, scores, skipped=skipped, again=again)
            counted.add(prompt_id)
        failure = failure or self.watcher.see_scores(self.tally.judge)
        failures = [text for text in self.ctx.runtime.gather([failure]) if text]
        if failures:
            raise JudgeError(failures[0])
        # 4. gather the records of all processes
        records = dict[str, list[Any]]()
        for part, dropped in self.ctx.runtime.gather([(local_records, local_drops)]):
            records |= part
            drops.add(dropped)
        return records

    def sampled_and_judged(
        self, prompts: Sequence[Prompt]
    ) -> tuple[list[JudgedPrompt], str | None]:
        """This process's prompts of a block with all their records, missing ones made and stored.

        With them the text of an error if the judge cannot be used, else None.
        """
        block = [self.with_known_records(prompt) for prompt in prompts]
        return block, self.make_missing(block)

    def make_missing(self, block: Sequence[JudgedPrompt]) -> str | None:
        """Sample and judge what is missing; the text of an error if the judge cannot be used."""
        self.sample(block)
        failure = self.judge_missing(block)
        if self.judge.judges_blocks:
            self.judge_block(block, failure)
        return failure

    def keep(self, records: Sequence[Any]) -> None:
        """Store the records that are not on disk yet; the main process does it for all."""
        if self.ctx.runtime.is_main:
            self.out.append([record for record in records if record.id not in self.known_records])

    def rehearse(self) -> tuple[JudgedPrompt, list[Any]]:
        """Sample, judge and pair the shortest prompt; returns it, judged, and its records.

        Judgements that cannot be read get scores of the judge's scale if that is known. Raises
        JudgeError if the judge cannot be used or has no room to answer.
        """
        self.judges_all = True  # responses of two tokens are never whole
        # 1. find the shortest prompt; seeds of new prompts may all be too long for a prompt
        prompts = self.read_prompts(range(len(self.ctx.rows["prompt_dataset"])))
        if not prompts:
            prompts = [Prompt(self.prompt_id(0), 0, (0,), self.ctx.tokens.decode((0,)))]
        prompt = min(prompts, key=lambda p: len(p.ids))
        # 2. sample and judge it
        judged = JudgedPrompt(prompt, [], [])
        self.sample([judged])
        failure = self.judge_missing([judged])
        if failure is not None:
            raise JudgeError(failure)
        if self.judge.judges_blocks:
            self.judge_block([judged])
        if judged.judgements and all(j.reason == "too_long" for j in judged.judgements):
            raise JudgeError(
                f"{self.ctx.stage}: the judge's prompt with the shortest of the first "
                f"{amount(len(prompts), 'prompt')} ({amount(len(prompt.ids), 'token')}) and a "
                "response of two tokens is longer than its model takes, or leaves no room for what "
                "the judge writes. Use a shorter reward prompt or shorter prompts."
            )
        # 3. pair it as if the answers were finished and scored differently
        judged.candidates = [replace(c, finished=None) for c in judged.candidates]
        scale = self.config.score_scale(self.ctx)
        if scale is not None:
            first = judged.candidates[0].id
            judged.judgements = [
                replace(j, score=scale[j.candidate_ids[0] == first], reason=None)
                if j.score is None
                else j
                for j in judged.judgements
            ]
        return judged, self.pair(judged, DropCounts())

    # Prompts

    def places(self) -> range:
        """The places of the prompts that may be worked."""
        config, wanted = self.config, self.wanted
        if self.taken is not None:
            return range(len(self.taken))[: config.prompts_per_round]
        total, start = self.num_prompts, self.ctx.first_prompt
        passes = config.max_prompt_passes or (4 * math.ceil(wanted / total) if wanted else 1)
        return range(start, start + (config.prompts_per_round or passes * total))

    def next_block(self, place: int, places: range) -> range:
        """The places of the block that begins at `place`, one of `places`.

        In runs of format 1 a block has `prompts_per_block` prompts, whatever it crosses.
        """
        size, prompts = self.config.prompts_per_block, self.num_prompts
        if self.ctx.format > 1:
            wanted = self.wanted if place == places.start else None
            size = block_size(place, size, prompts, wanted)
        return range(place, min(place + size, places.stop))

    def see_repeated(self, worked: int, kept: int) -> None:
        """The check `repeated_prompts`, before a block. worked: the round's prompts before it."""
        number = 1 + worked // self.num_prompts
        self.checker.see(
            "repeated_prompts",
            number,
            f"pass {number} over the {amount(self.num_prompts, 'prompt')} begins: those before "
            f"gave {amount(kept, self.noun)}. {REPEATED}",
        )

    def next_prompt(self, place: int) -> int:
        """Where a later stage goes on in the dataset after prompts that were taken."""
        worked, rows = (self.taken or [])[:place], self.ctx.rows.get("prompt_dataset")
        after = 0 if rows is None else next_place(worked, len(rows))
        return max(self.ctx.first_prompt, after)

    def prompt_id(self, place: int) -> str:
        """The id of a prompt by its place, counted over all passes: <stage>/<row>/<pass>."""
        if self.taken is not None:
            return self.taken[place]
        pass_number, row = divmod(place, len(self.ctx.rows["prompt_dataset"]))
        return f"{self.ctx.stage}/{row}/{pass_number}"

    def read_prompts(self, places: Sequence[int]) -> list[Prompt]:
        """The prompts at some places, from disk or read from the dataset and stored.

        Bad rows are left out if the stage skips them; otherwise they raise. With `candidates_from`
        they are those of its stage, with the columns of the stage's own dataset.
        """
        which = self.config.candidates_from
        if which is not None:
            known = [self.known_prompts[self.prompt_id(place)][0] for place in places]
            has_rows = "prompt_dataset" in self.ctx.rows
            return [own_prompt(self.ctx, which, p) for p in known] if has_rows else known
        rows, limit = self.ctx.rows["prompt_dataset"], self.ctx.limit(self.config.max_seq_len)
        prompts, new = list[Prompt](), list[Prompt]()
        for place in places:
            prompt_id, row = self.prompt_id(place), place % len(rows)
            known = self.known_prompts[prompt_id]
            if known:
                prompts += known
                continue
            with self.bad_rows.tolerated(rows.where(row)):
                new.append(read_prompt(rows, row, prompt_id, self.ctx.tokens, limit))
                prompts.append(new[-1])
        self.out.append(new)
        return prompts

    def prompt_id_of(self, judgement: Judgement) -> str:
        """The id of the prompt whose candidates were judged, as a JudgedPrompt has it."""
        return prompt_id_of_judgement(judgement)

    def with_known_records(self, prompt: Prompt) -> JudgedPrompt:
        """A prompt with its candidates and judgements from disk."""
        candidates = sorted(self.known_candidates[prompt.id], key=order_of)
        return JudgedPrompt(prompt, candidates, self.known_judgements[prompt.id])

    # 1. Sampling

    def without_all_candidates(
        self, block: Iterable[JudgedPrompt], part: str = ""
    ) -> dict[str, JudgedPrompt]:
        """The prompts that miss candidates, by the text that begins their candidates' ids.

        This is the prompt's id, with `part` (such as "/anchor") added if other weights sample.
        """
        numbers, missing = range(self.config.num_candidate_responses), {}
        for judged in block:
            name = f"{judged.prompt.id}{part}"
            known = {candidate.id for candidate in judged.candidates}
            if not known.issuperset(f"{name}/{number}" for number in numbers):
                missing[name] = judged
        return missing

    def sample_missing(self, ctx: Context, missing: Mapping[str, JudgedPrompt]) -> None:
        """Sample the missing candidates with the weights in `ctx`, and store them.

        missing: prompts by the text that begins their candidates' ids.
        """
        if not missing:
            return
        self.ctx.round.check_weights()
        known_ids = {c.id for judged in missing.values() for c in judged.candidates}
        sampled = ctx.sample(
            [replace(judged.prompt, id=name) for name, judged in missing.items()],
            self.config.generation,
            self.config.num_candidate_responses,
            max_seq_len=self.config.max_seq_len,
            known=known_ids,
            logprobs=self.asks_logprobs,
        )
        numbers = range(self.config.num_candidate_responses)
        total = sum(f"{name}/{n}" not in known_ids for name in missing for n in numbers)
        named = (replace(c, prompt_id=missing[c.prompt_id].prompt.id) for c in sampled)
        counted = ctx.runtime.counted(named, total, "candidate")
        self.keep_candidates(counted, missing.values())

    def keep_candidates(
        self, candidates: Iterable[Candidate], block: Collection[JudgedPrompt]
    ) -> None:
        """Store candidates as they arrive, and add them to their prompts, sorted by id."""
        by_id = {judged.prompt.id: judged for judged in block}
        for stored in self.out.keep(candidates):
            for candidate in stored:
                by_id[candidate.prompt_id].candidates.append(candidate)
        for judged in block:
            judged.candidates.sort(key=order_of)

    # 2. Judging

    def judge_missing(self, block: Sequence[JudgedPrompt]) -> str | None:
        """Ask the judge for missing judgements, store them and add them to their prompts.

        Returns the text of an error if the judge cannot be used, else None.
        """
        # 1. find what is missing, and stop if too few stored judgements could be read
        for judged in block:
            self.watcher.count(made_by_judging(judged.judgements))
        to_judge = [(judged, self.candidates_to_judge(judged)) for judged in block]
        to_judge = [(judged, candidates) for judged, candidates in to_judge if candidates]
        candidates_PG = [[self.as_judged(c) for c in candidates] for _, candidates in to_judge]
        failure = self.watcher.see_parsed(self.ctx.stage, self.out.path)
        if failure is not None or not to_judge:
            return failure
        # 2. ask, and store and check the judgements in batches
        self.ctx.round.check_weights()
        by_id = {judged.prompt.id: judged for judged in block}
        known_ids = {j.id for judged, _ in to_judge for j in judged.judgements}
        prompts = [judged.prompt for judged, _ in to_judge]
        ids = {i for candidates in candidates_PG for i in self.judge.judgement_ids(candidates)}
        judgements = self.ctx.runtime.counted(
            self.judge.judge(self.ctx, prompts, candidates_PG), len(ids - known_ids), "judgement"
        )
        for batch in batched(self.ctx.runtime.stopping.between(judgements), FIRST_LOOK):
            new = [without_infinite_score(j) for j in batch if j.id not in known_ids]
            self.watcher.count(new)
            failure = self.watcher.see_new(new)  # if it fails, the batch is not stored
            if failure is not None:
                return failure
            self.out.append(new)
            for judgement in new:
                if (judged := by_id.get(self.prompt_id_of(judgement))) is not None:
                    judged.judgements.append(judgement)
            failure = self.watcher.see_parsed(self.ctx.stage, self.out.path)
            if failure is not None:
                return failure
        return None

    def judge_block(self, block: Sequence[JudgedPrompt], failure: str | None = None) -> None:
        """Store the judgements that are made of those of the whole block, in all processes.

        Raises JudgeError on every process if judging has failed on one.
        """
        # 1. what all processes judged
        mine = [(self.judged_together(judged), judged.judgements) for judged in block]
        failures, parts = zip(*self.ctx.runtime.gather([(failure, mine)]), strict=True)
        if any(failures):
            raise JudgeError(next(filter(None, failures)))
        candidates_PG = [candidates for part in parts for candidates, _ in part]
        judgements = [j for part in parts for _, of_prompt in part for j in of_prompt]
        # 2. each process keeps what is of its own prompts
        by_id = {judged.prompt.id: judged for judged in block}
        known_ids = {j.id for judged in block for j in judged.judgements}
        made = self.judge.judge_block(self.ctx, candidates_PG, judgements)
        new = [j for j in made if self.prompt_id_of(j) in by_id and j.id not in known_ids]
        self.out.append(new)
        for judgement in new:
            by_id[self.prompt_id_of(judgement)].judgements.append(judgement)

    def as_judged(self, candidate: Candidate) -> Candidate:
        """The candidate that the judge sees: with `postprocess_response` applied to its text.

        Training uses the candidate as it was sampled. Raises ConfigError if the function returns no
        text.
        """
        function = self.config.postprocess_response
        if function is None or candidate.text is None:
            return candidate
        text = function(candidate.text)
        if not isinstance(text, str):
            raise ConfigError(
                f"{self.ctx.stage}: postprocess_response must return the text that judges are "
                f"to see; got {type(text).__name__} for {candidate.text[:200]!r}."
            )
        if text == candidate.text:
            return candidate
        body = list(candidate.ids)  # without the end tokens, which stay
        while body and body[-1] in self.ctx.tokens.end_ids:
            body.pop()
        ids = (*self.ctx.tokens.encode_data(text), *candidate.ids[len(body) :])
        return replace(candidate, text=text, ids=ids)

    # 3. Pairing

    def usable_candidates(
        self, judged: JudgedPrompt, drops: DropCounts, *, least: int
    ) -> list[Candidate]:
        """Candidates that can be learnt from and that the judge does not filter out.

        Counts the others by reason; returns [] if fewer than `least` remain.
        """
        left, left_out = judged.answers, Counter[str]()
        if self.judges_all:
            left_out += Counter(c.reason for c in judged.candidates if c.reason is not None)
        else:
            left = self.learnable(judged, drops)
            if not left:
                return []
        filtered = self.judge.filtered(left, judged.judgements)
        left_out += Counter(filtered=len(filtered))
        drops.candidates.update(left_out)
        usable = [candidate for candidate in left if candidate.id not in filtered]
        if left_out and len(usable) < least:
            drops.prompts[left_out.most_common(1)[0][0]] += 1
            return []
        return usable

    def pairs_of(
        self,
        judged: JudgedPrompt,
        candidates: Sequence[Candidate],
        scores: Mapping[str, float | None],
        drops: DropCounts,
    ) -> list[PreferencePair]:
        """The pairs of a prompt's usable candidates; scores: by candidate id."""
        pairs = make_pairs(
            judged.prompt,
            candidates,
            scores,
            drops,
            pairing=self.config.pairing.of_round(self.ctx.round.number),
            pick=self.config.picker(),
            noise=lambda record_id: stable_hash(self.ctx.seed, "pairs", record_id),
            variances=score_variances(judged.judgements),
            is_valid_score=self.config.is_valid_reward,
            is_valid_pair=self.config.pair_check(),
            min_margin=self.config.min_margin,
        )
        said = made_by_judging(self.judge.own(judged.judgements))
        if self.taken is not None:  # the pairs are this stage's, whoever sampled their candidates
            rest = [pair.id.partition("/")[2] for pair in pairs]
            pairs = [
                replace(p, id=f"{self.ctx.stage}/{r}") for p, r in zip(pairs, rest, strict=True)
            ]
        if self.ctx.format > 1 and said and all(len(j.candidate_ids) == 2 for j in said):
            pairs = [_with_win_rates(pair) for pair in pairs]
        if not isinstance(self.judge, ComparingJudge):
            return pairs
        smoothing = self.judge.smoothing(candidates, judged.judgements)
        return [replace(pair, label_smoothing=smoothing) for pair in pairs]

    # The report

    def report(self, drops: DropCounts) -> None:
        """Log how much all processes sampled, judged, kept and dropped, and check the shares.

        Raises the error of `nothing_made` if nothing was kept.
        """
        ctx, out, noun = self.ctx, self.out, self.noun
        tally = together(ctx.runtime.gather([self.tally]))
        metrics: dict[str, Any] = {**tally.metrics(), **drops.metrics(*self.counted)}
        out.log({"step": self.ctx.round.first_step, **metrics})
        out.summary["metrics"] = metrics
        unused = f"no {self.counted[1].removesuffix('s')} could have"
        skipped = f" ({tally.skipped} that {unused} were not judged)" if tally.skipped else ""
        logger.info(
            "%s: %s, %s%s, %s, %s; dropped: %s",
            ctx.stage,
            self.in_words(tally.prompts),
            amount(tally.candidates, "candidate"),
            skipped,
            amount(tally.judgements, "judgement"),
            amount(drops.kept, noun),
            drops.in_words(),
        )
        if drops.kept == 0:
            raise self.nothing_made(self.in_words(tally.prompts), drops)
        if tally.answered:
            self.checker.see(
                "cut_off",
                tally.clipped / tally.answered,
                f"{tally.clipped} of {amount(tally.answered, 'response')} cut off before the end, "
                f"and {self.cut_responses}. Raise generation.max_new_tokens (or max_seq_len), or "
                "train the model to end first.",
            )
        total = drops.kept + drops.prompts["surplus"]
        self.checker.see(
            "pairs_per_prompt",
            total / max(1, tally.prompts),
            f"{self.in_words(tally.prompts)} gave {amount(total, noun)}; dropped: "
            f"{drops.in_words()}. The most frequent reason says what to change.",
        )
        wanted = self.wanted
        if wanted is not None:
            self.checker.see(
                "few_pairs",
                drops.kept / wanted,
                f"{amount(drops.kept, noun)} instead of {wanted} after max_prompt_passes over the "
                f"prompts; dropped: {drops.in_words()}. Give more prompts or passes, or change "
                "what the most frequent reason says. By default the stage trains on these.",
            )

    def in_words(self, prompts: int) -> str:
        """So many prompts that were worked, and how many of them are different rows."""
        different = len(self.rows_asked)
        asked_again = f" ({different} different)" if different < prompts else ""
        return f"{amount(prompts, 'prompt')}{asked_again}"

    def nothing_made(self, prompts: str, drops: DropCounts) -> Exception:
        """The error of a stage in which no prompt gave a record. prompts: such as "32 prompts"."""
        return NoPairError(
            f"{self.ctx.stage}: no preference pair could be made from {prompts}. "
            f"Dropped: {drops.in_words()}. 'unfinished' asks for more max_new_tokens; 'tie' "
            "and 'identical' for a higher temperature or more judgements (where comparisons follow "
            "the position, for another judge), 'unscored' for a "
            f"judge that can be read. The records are in {self.out.path}."
        )


REPEATED = (
    "Answers to one prompt, and pairs of them, become alike. Give more prompts, lower "
    "num_generated_preference_pairs, or set max_prompt_passes."
)


def block_size(place: int, most: int, prompts: int, wanted: int | None) -> int:
    """How many prompts a block has that begins at a place, counted over all passes.

    most: `prompts_per_block`. prompts: of one pass. wanted: in the first block the pairs that there
    shall be.
    """
    to_end = prompts - place % prompts if prompts else most
    return min(most, to_end, most if wanted is None else wanted)


def prompt_id_of_judgement(judgement: Judgement) -> str:
    """The id of the prompt whose candidates were judged."""
    return prompt_id_of(judgement.candidate_ids[0])


def made_by_judging(judgements: Iterable[Judgement]) -> list[Judgement]:
    """The judgements without those that only move a score."""
    return [judgement for judgement in judgements if not judgement.is_moved]


def _with_win_rates(pair: PreferencePair) -> PreferencePair:
    """The pair with its scores, which are shares of comparisons won, as probabilities to win."""
    return replace(
        pair,
        win_probability=pair.chosen_score,
        rejected_win_probability=pair.rejected_score,
    )


def order_of(candidate: Candidate) -> IdOrder:
    """The sort key of a candidate: its id, with numbers compared as numbers."""
    return id_order(candidate.id)


def without_infinite_score(judgement: Judgement) -> Judgement:
    """The judgement; if its score is NaN or infinite, with no score and the reason `not_finite`."""
    if judgement.score is None or math.isfinite(judgement.score):
        return judgement
    return replace(judgement, score=None, reason="not_finite")
