"""Writes new prompts: a model continues lists of examples (self-instruct), filters choose.

Input: seed prompts. Output: new prompts, stored in instructions.jsonl with those left out. What
the prompts are used for is no concern of this file.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from self_rewarding_lm.config import SelfInstruct
from self_rewarding_lm.context import Context
from self_rewarding_lm.data.control_tokens import from_data
from self_rewarding_lm.data.datasets import BadRows, OnBadRow
from self_rewarding_lm.data.rows import prompt_of
from self_rewarding_lm.data.tokenizers import Tokenizer
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, DataError, give_tokenizer, other_folder
from self_rewarding_lm.generation.candidates import sample_candidates
from self_rewarding_lm.models.interface import TokenModel
from self_rewarding_lm.models.loading import end_ids_of
from self_rewarding_lm.records import Instruction, Prompt, stable_hash
from self_rewarding_lm.runs.run import INITIAL
from self_rewarding_lm.runs.stage_folder import StageDir
from self_rewarding_lm.stages.self_instruct.few_shot import Example, FewShot, few_shot_prompt
from self_rewarding_lm.stages.self_instruct.filters import (
    DEFAULT_KEYWORDS,
    FilterCounts,
    InstructionPool,
    instruction_problem,
)
from self_rewarding_lm.stages.self_instruct.reading import PARSED_CHARACTERS, parse_instructions
from self_rewarding_lm.text import amount

logger = logging.getLogger(__name__)


CURRENT = "current"
"""The value of SelfInstruct(model=...) for the model that is being trained."""


SAMPLES_PER_PROMPT = 4  # lists that are sampled at most for each wanted prompt


ANSWER_TOKENS = 16  # tokens that the examples must leave for the model's continuation


TRIED_LISTS = 32  # lists of which one must fit into the model


TRIED_SEEDS = 1000  # seeds that are read when a trainer is built


SEED, NEW = "seed", "new"
"""The part of an id after the stage's name, for seeds and for new prompts."""


@dataclass(frozen=True)
class Author:
    """The model that writes new prompts, and its tokenizer."""

    model: TokenModel
    tokens: Tokens

    def prompt(self, name: str, few_shot: FewShot) -> Prompt | None:
        """The list of examples in this model's tokens; None if they leave no room to continue."""
        ids, limit = self.tokens.prompt(few_shot.text).ids, self.model.max_len
        fits = limit is None or len(ids) + ANSWER_TOKENS <= limit
        return Prompt(name, 0, ids) if fits else None


def write_prompts(
    ctx: Context,
    out: StageDir,
    seeds: Sequence[Instruction],
    settings: SelfInstruct,
    *,
    limit: int | None,
) -> list[Instruction]:
    """Write `settings.num_prompts` new prompts; returns the same list on every process.

    limit: tokens of a new prompt and its response together, None if there is no limit. The id of a
    new prompt is <stage>/new/<round>/<list>/<place in the list>. Its parents are the ids of the
    examples in that list: seeds and new prompts of earlier rounds. instructions.jsonl keeps all
    that the model wrote, and the reason for each prompt that was left out; prompts that are stored
    already are not written again.

    The reasons are those of `filters.py` and these:
    `unparsed`: the list has no instruction.
    `examples_too_long`: the examples of the list leave the model no room.
    `unfinished`: the instruction may go on, as the list was cut off.
    `no_tokens`: the trained model's tokenizer cannot encode the prompt.
    `no_room`: the prompt fills `limit`.
    `surplus`: the prompt is good, but enough are kept already.

    Raises DataError if the model writes too few good prompts, or if no list leaves it room.
    """
    examples = [Example(seed.id, seed.text) for seed in seeds]
    writing = _Rounds(ctx, out, settings, examples, limit)
    kept = writing.run()
    samples, metrics = writing.samples, writing.counts.metrics()
    out.log({"step": 0, **metrics})
    out.summary["new_prompts"] = metrics
    report = f"left out: {writing.counts.in_words()}"
    new, lists = amount(len(kept), "new prompt"), amount(samples, "list")
    logger.info("%s: %s from %s; %s", ctx.stage, new, lists, report)
    if len(kept) < settings.num_prompts:
        raise DataError(
            f"{ctx.stage}: the model gave {new} in {lists}, and {settings.num_prompts} wanted; "
            f"{report}. All that it wrote is in "
            f"{out.path / 'instructions.jsonl'}. Try another model= (a larger or an instruction-"
            "tuned one), a higher sampling temperature or max_new_tokens, more seeds, a higher "
            "max_rouge_l or max_samples, or fewer num_prompts. A stage that has begun keeps its "
            f"settings: for others delete {out.path} or take {other_folder()}."
        )
    return kept


def seed_text(row: Any, where: str, tokens: Tokens) -> str:
    """The text of a seed, given as a row of any form with a prompt (`rows.prompt_of`).

    where: names the row in errors. Raises DataError if the row has no text but white space.
    """
    prompt = prompt_of(row, where, tokens)
    text = tokens.decode(prompt.ids) if prompt.text is None else prompt.text
    if text is None or not text.strip():
        raise DataError(
            f"{where}: the prompt has no text; a seed is shown as an example. Leave it out."
        )
    return text


def check_self_instruct(ctx: Context, settings: SelfInstruct, on_bad_row: OnBadRow) -> None:
    """Check before the run that the model can write prompts.

    on_bad_row: what to do with seeds that cannot be read. Raises ConfigError if the settings name
    no usable model or tokenizer, DataError if no list of examples fits into the model.
    """
    if ctx.tokens.tokenizer is None:
        raise ConfigError(f"{ctx.stage}: new prompts are texts. {give_tokenizer()}")
    author = _author(ctx, settings)
    rows, bad, seeds = ctx.rows["seed_dataset"], BadRows(on_bad_row), []
    for row in islice(rows.preview(), TRIED_SEEDS):
        with bad.tolerated(rows.where(row)):
            text = seed_text(rows.peek(row), rows.where(row), ctx.tokens)
            seeds.append(Example(f"{ctx.stage}/{SEED}/{row}", text))
    if seeds and len(seeds) + bad.count >= min(len(rows), TRIED_SEEDS):
        _check_room(ctx, author, seeds, settings)


@dataclass
class _Rounds:
    """Samples lists in rounds until enough prompts are kept.

    A round depends only on the random seed, the seed prompts and the rounds before it.
    """

    ctx: Context
    out: StageDir
    settings: SelfInstruct
    seeds: Sequence[Example]
    limit: int | None

    def __post_init__(self) -> None:
        texts = [seed.text for seed in self.seeds]
        self.pool = InstructionPool(texts, max_rouge_l=self.settings.max_rouge_l)
        self.kept: list[Instruction] = []
        self.counts = FilterCounts()
        self.samples = 0
        self.stored = _whole_lists(self.out.known(Instruction))
        self.author: Author | None = None  # set when the first list is sampled
        self.other_weights = ExitStack()

    def run(self) -> list[Instruction]:
        """The new prompts that are kept; fewer than wanted if the limit of lists is reached."""
        wanted = self.settings.num_prompts
        limit = self.settings.max_samples or SAMPLES_PER_PROMPT * wanted
        bar = self.ctx.runtime.progress(wanted, f"{self.ctx.stage}: new prompts", "prompt")
        number = 0
        with self.other_weights, bar:
            while len(self.kept) < wanted and self.samples < limit:
                before = len(self.kept)
                size = min(self.settings.samples_per_round, limit - self.samples)
                self._round(number, size)
                self.samples += size
                number += 1
                bar.update(len(self.kept) - before)
                self.ctx.runtime.stopping.heed()
        self.out.merge(Instruction)
        return self.kept

    def _round(self, number: int, size: int) -> None:
        """Sample `size` lists, those on disk excepted, and filter the prompts in all of them."""
        # 1. sample the lists that are not on disk
        names = [f"{self.ctx.stage}/{NEW}/{number}/{place}" for place in range(size)]
        generated = [Example(record.id, record.text) for record in self.kept]
        missing = [name for name in names if name not in self.stored]
        few_shots = _few_shots(missing, self.seeds, generated, self.settings, self.ctx.seed)
        answers = self._answers(few_shots)
        # 2. filter their prompts, in the order of the lists
        new: list[Instruction] = []
        for name in names:
            if name in self.stored:
                for record in self.stored[name]:
                    self._take(record)
            else:  # the first place is stored last: once it is on disk, the list is complete
                new += reversed(self._read(name, few_shots[name], answers.get(name)))
        # 3. store them
        if self.ctx.runtime.is_main:
            self.out.append(new)

    def _answers(self, few_shots: Mapping[str, FewShot]) -> dict[str, tuple[str, bool]]:
        """How the model continues each list that fits: the text, and whether it is finished.

        Each process samples a part of the lists; all processes get all texts.
        """
        if not few_shots:
            return {}
        self.ctx.round.check_weights()
        author, runtime = self._load_author(), self.ctx.runtime
        prompts = [author.prompt(name, few_shots[name]) for name in runtime.share(list(few_shots))]
        candidates = sample_candidates(
            author.model,
            [prompt for prompt in prompts if prompt is not None],
            self.settings.sampling,
            1,
            engine=self.ctx.engine,
            tokens=author.tokens,
            seed=self.ctx.seed,
            limit=author.model.max_len,
        )
        # `finished` is None if no token is known to end a text: then only the limit ended it
        answers = [
            (candidate.prompt_id, candidate.text or "", candidate.finished is True)
            for candidate in runtime.counted(runtime.autocasted(candidates), len(prompts), "list")
        ]
        return {name: (text, finished) for name, text, finished in runtime.gather(answers)}

    def _load_author(self) -> Author:
        """The model that writes; its weights stay loaded until `other_weights` is closed."""
        if self.author is None:
            self.author = _author(self.ctx, self.settings)
            _check_room(self.ctx, self.author, self.seeds, self.settings)
            source = self.settings.model
            if isinstance(source, str) and source != CURRENT:
                self.other_weights.enter_context(self.ctx.weights(source))
        return self.author

    def _read(
        self, name: str, few_shot: FewShot, answer: tuple[str, bool] | None
    ) -> list[Instruction]:
        """The instructions that the model wrote in a list, with a reason for each left out.

        answer: the text and whether it is finished; None if the examples left no room.
        """
        items: list[tuple[str, str | None]] = [("", "examples_too_long")]
        if answer is not None:
            items = _items(*answer, first_number=few_shot.first_number)
        instructions = []
        for place, (text, reason) in enumerate(items):
            reason = reason or self._problem(text)
            instructions.append(Instruction(f"{name}/{place}", text, few_shot.parents, reason))
            self._take(instructions[-1])
        return instructions

    def _problem(self, text: str) -> str | None:
        """Why an instruction is left out, None if it is kept."""
        settings = self.settings
        problem = instruction_problem(
            text,
            min_words=settings.min_words,
            max_words=settings.max_words,
            keywords=DEFAULT_KEYWORDS if settings.keywords is None else settings.keywords,
        )
        problem = problem or self.pool.problem(text) or self._token_problem(text)
        return problem or ("surplus" if len(self.kept) >= settings.num_prompts else None)

    def _token_problem(self, text: str) -> str | None:
        """Why the trained model cannot answer an instruction, None if it can."""
        try:
            ids = self.ctx.tokens.prompt(from_data(text)).ids
        except (ValueError, LookupError):  # tokenizers raise these for unknown characters
            return "no_tokens"
        if self.limit is not None and len(ids) >= self.limit:
            return "no_room"
        return None if ids else "no_tokens"

    def _take(self, record: Instruction) -> None:
        """Count an instruction, and keep it if it has no reason to be left out."""
        self.counts.count(record.reason)
        if record.reason is None:
            self.kept.append(record)
            self.pool.add(record.text)


def _items(text: str, finished: bool, *, first_number: int) -> list[tuple[str, str | None]]:
    """The instructions in a list, each with a reason if its form leaves it out, else None."""
    complete = parse_instructions(text, first_number=first_number, finished=finished)
    all_items = parse_instructions(text[:PARSED_CHARACTERS], first_number=first_number)
    items: list[tuple[str, str | None]] = [(item, None) for item in complete]
    items += [(item, "unfinished") for item in all_items[len(complete) :]]
    return items or [(text, "unparsed")]


def _whole_lists(records: Sequence[Instruction]) -> dict[str, list[Instruction]]:
    """The lists that are on disk in full, by name. A list of which only a part is on disk is
    sampled again."""
    lists: dict[str, dict[int, Instruction]] = {}  # name -> place -> record
    for record in records:
        name, _, place = record.id.rpartition("/")
        if record.id.split("/")[1] == NEW:
            lists.setdefault(name, {})[int(place)] = record
    return {
        name: [by_place[place] for place in sorted(by_place)]
        for name, by_place in lists.items()
        if 0 in by_place
    }


def _few_shots(
    names: Sequence[str],
    seeds: Sequence[Example],
    generated: Sequence[Example],
    settings: SelfInstruct,
    seed: int,
) -> dict[str, FewShot]:
    """For each list its examples, drawn by a hash of `seed` and the list's name."""
    return {
        name: few_shot_prompt(
            seeds,
            generated,
            num_seed=settings.num_seed_examples,
            num_generated=settings.num_generated_examples,
            key=stable_hash(seed, name, "examples"),
        )
        for name in names
    }


def _author(ctx: Context, settings: SelfInstruct) -> Author:
    """The model that the settings name, with its tokenizer.

    Raises ConfigError if they name no model or tokenizer that can be used.
    """
    source, tokenizer = settings.model, settings.tokenizer
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise ConfigError(
            f"{ctx.stage}: SelfInstruct(tokenizer=...) needs the methods encode and decode; got "
            f"{type(tokenizer).__name__}."
        )
    # 1. weights of this run: "current", "initial", a stage's name or a folder
    if not isinstance(source, nn.Module):
        known = [CURRENT, INITIAL, *(ctx.run.stages if ctx.run is not None else ())]
        unknown = ctx.run is not None and source not in known and not Path(str(source)).exists()
        if not isinstance(source, str) or unknown:
            raise ConfigError(
                f"{ctx.stage}: SelfInstruct(model=...) must be 'current', 'initial', the name of "
                f"an earlier stage or a module; got {source!r:.100}."
            )
        return Author(ctx.model, ctx.tokens)
    # 2. another model, with its own tokenizer or the trained model's
    model, tokens = ctx.adapt(source), ctx.tokens
    if tokenizer is not None:
        tokens = Tokens(
            tokenizer,
            eos_id=None,
            vocab=model.vocab,
            end_ids=end_ids_of(source),
            rules=ctx.tokens.rules,
            date=ctx.tokens.date,
        )
    elif model.vocab != ctx.model.vocab:
        raise ConfigError(
            f"{ctx.stage}: the model that writes prompts has {model.vocab} tokens and the trained "
            f"one {ctx.model.vocab}; give SelfInstruct its own tokenizer=."
        )
    return Author(model, tokens)


def _check_room(
    ctx: Context, author: Author, seeds: Sequence[Example], settings: SelfInstruct
) -> None:
    """Raise DataError if none of the first lists of the first round leaves the model room."""
    names = [f"{ctx.stage}/{NEW}/0/{place}" for place in range(TRIED_LISTS)]
    lists = _few_shots(names, seeds, (), settings, ctx.seed)
    if any(author.prompt(name, few_shot) is not None for name, few_shot in lists.items()):
        return
    shortest = min(len(author.tokens.prompt(few_shot.text).ids) for few_shot in lists.values())
    raise DataError(
        f"{ctx.stage}: the model has no room for new prompts after "
        f"{amount(len(next(iter(lists.values())).parents), 'example')}: the shortest of "
        f"{TRIED_LISTS} lists has {shortest} tokens, and the model that writes takes "
        f"{author.model.max_len}, of which {ANSWER_TOKENS} must be left. Use shorter seeds, fewer "
        "num_seed_examples or another model=."
    )
