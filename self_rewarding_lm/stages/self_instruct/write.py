"""Seed prompts to new prompts: a model writes them from examples (self-instruct), filters choose.

Knows nothing of what the prompts are for.
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
from self_rewarding_lm.errors import ConfigError, DataError
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

logger = logging.getLogger(__name__)


CURRENT = "current"


SAMPLES_PER_PROMPT = 4  # lists at most for each wanted prompt


ANSWER_TOKENS = 16  # room that the examples must leave


TRIED_LISTS = 32  # one of which must fit into the model


TRIED_SEEDS = 1000  # of the seeds, when a trainer is built


SEED, NEW = "seed", "new"
"""What the ids of seeds and of new prompts have behind the stage."""


@dataclass(frozen=True)
class Author:
    """The model that writes, and its tokens."""

    model: TokenModel
    tokens: Tokens

    def prompt(self, name: str, few_shot: FewShot) -> Prompt | None:
        """The list as this model reads it; None where that leaves no room to go on with it."""
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
    """`settings.num_prompts` new prompts, the same list on every process.

    limit: tokens of a new prompt and its response together. A new prompt's id is
    <stage>/new/<round>/<list>/<place in it>, its parents are the ids of the examples that its list
    was shown: seeds and new prompts of earlier rounds. All that was written is kept in
    instructions.jsonl, with the reason where it was left out; what is there already is used again.

    Reasons are those of `filters.py` and: `unparsed`, a list without any instruction;
    `examples_too_long`, a list whose examples leave the model no room; `no_tokens` and `no_room`,
    a prompt that the trained model's tokenizer cannot write or that fills `limit`; `surplus`, one
    that is good but not needed any more.

    Raises DataError where the model gives too few, or where no list leaves it room.
    """
    examples = [Example(seed.id, seed.text) for seed in seeds]
    writing = _Writing(ctx, out, settings, examples, limit)
    kept = writing.run()
    samples, metrics = writing.samples, writing.counts.metrics()
    out.log({"step": 0, **metrics})
    out.summary["new_prompts"] = metrics
    report = f"left out: {writing.counts.in_words()}"
    logger.info("%s: %d new prompts from %d lists; %s", ctx.stage, len(kept), samples, report)
    if len(kept) < settings.num_prompts:
        raise DataError(
            f"{ctx.stage}: the model gave {len(kept)} new prompts in {samples} lists, and "
            f"{settings.num_prompts} are wanted; {report}. All that it wrote is in "
            f"{out.path / 'instructions.jsonl'}. Try another model= (a larger or an instruction-"
            "tuned one), a higher sampling temperature or max_new_tokens, more seeds, a higher "
            "max_rouge_l or max_samples, or fewer num_prompts. A stage that has begun keeps its "
            f"settings: for others delete {out.path} or take another checkpoints_folder."
        )
    return kept


def seed_text(row: Any, where: str, tokens: Tokens) -> str:
    """The text of a seed, a row of any form with a prompt part (`rows.prompt_of`).

    Raises DataError where it has none, or nothing but white space.
    """
    found = prompt_of(row, where, tokens)
    text = tokens.decode(found.ids) if found.text is None else found.text
    if text is None or not text.strip():
        raise DataError(
            f"{where}: the prompt has no text; a seed is shown as an example. Leave it out."
        )
    return text


def check_self_instruct(ctx: Context, settings: SelfInstruct, on_bad_row: OnBadRow) -> None:
    """Raise where the model that shall write cannot, as far as that is known before the run.

    ConfigError for what is no model or tokenizer, DataError where no list of examples fits.
    """
    if ctx.tokens.tokenizer is None:
        raise ConfigError(f"{ctx.stage}: new prompts are texts; give the trainer a tokenizer.")
    author = _author(ctx, settings)
    rows, bad, seeds = ctx.rows["seed_dataset"], BadRows(on_bad_row), []
    for row in islice(rows.preview(), TRIED_SEEDS):
        with bad.tolerated(rows.where(row)):
            text = seed_text(rows.peek(row), rows.where(row), ctx.tokens)
            seeds.append(Example(f"{ctx.stage}/{SEED}/{row}", text))
    if seeds and len(seeds) + bad.count >= min(len(rows), TRIED_SEEDS):
        _check_room(ctx, author, seeds, settings)


@dataclass
class _Writing:
    """Rounds of lists; each is a function of the seed, the seeds and the rounds before it."""

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
        self.author: Author | None = None  # from the first list on that is not on disk
        self.other_weights = ExitStack()

    def run(self) -> list[Instruction]:
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
        names = [f"{self.ctx.stage}/{NEW}/{number}/{place}" for place in range(size)]
        generated = [Example(record.id, record.text) for record in self.kept]
        missing = [name for name in names if name not in self.stored]
        shown = _few_shots(missing, self.seeds, generated, self.settings, self.ctx.seed)
        texts = self._texts(shown)
        new: list[Instruction] = []
        for name in names:
            if name in self.stored:
                for record in self.stored[name]:
                    self._take(record)
            else:  # the first place comes last: with it the list is on disk in full
                new += reversed(self._read(name, shown[name], texts.get(name)))
        if self.ctx.runtime.is_main:
            self.out.append(new)

    def _texts(self, shown: Mapping[str, FewShot]) -> dict[str, tuple[str, bool]]:
        """What the model wrote behind each list that fits, and whether it came to an end."""
        if not shown:
            return {}
        author, runtime = self._writer(), self.ctx.runtime
        mine = [author.prompt(name, shown[name]) for name in runtime.share(list(shown))]
        found = sample_candidates(
            author.model,
            [prompt for prompt in mine if prompt is not None],
            self.settings.sampling,
            1,
            engine=self.ctx.engine,
            tokens=author.tokens,
            seed=self.ctx.seed,
            limit=author.model.max_len,
        )
        # where nothing is known that ends a text (None), only the limit does
        answers = [
            (candidate.prompt_id, candidate.text or "", candidate.finished is True)
            for candidate in runtime.autocasted(found)
        ]
        return {name: (text, finished) for name, text, finished in runtime.gather(answers)}

    def _writer(self) -> Author:
        """The model that writes, its weights in place until `other_weights` is closed."""
        if self.author is None:
            self.author = _author(self.ctx, self.settings)
            _check_room(self.ctx, self.author, self.seeds, self.settings)
            which = self.settings.model
            if isinstance(which, str) and which != CURRENT:
                self.other_weights.enter_context(self.ctx.weights(which))
        return self.author

    def _read(
        self, name: str, shown: FewShot, answer: tuple[str, bool] | None
    ) -> list[Instruction]:
        """The instructions of a list, each with the reason if it is left out."""
        items: list[tuple[str, str | None]] = [("", "examples_too_long")]
        if answer is not None:
            items = _items(*answer, first_number=shown.first_number)
        found = []
        for place, (text, reason) in enumerate(items):
            reason = reason or self._problem(text)
            found.append(Instruction(f"{name}/{place}", text, shown.parents, reason))
            self._take(found[-1])
        return found

    def _problem(self, text: str) -> str | None:
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
        try:
            ids = self.ctx.tokens.prompt(from_data(text)).ids
        except (ValueError, LookupError):  # whatever a tokenizer raises for unknown characters
            return "no_tokens"
        if self.limit is not None and len(ids) >= self.limit:
            return "no_room"
        return None if ids else "no_tokens"

    def _take(self, record: Instruction) -> None:
        self.counts.count(record.reason)
        if record.reason is None:
            self.kept.append(record)
            self.pool.add(record.text)


def _items(text: str, finished: bool, *, first_number: int) -> list[tuple[str, str | None]]:
    """What stands in a list, with the reason where it is left out whatever it says."""
    whole = parse_instructions(text, first_number=first_number, finished=finished)
    every = parse_instructions(text[:PARSED_CHARACTERS], first_number=first_number)
    items: list[tuple[str, str | None]] = [(item, None) for item in whole]
    items += [(item, "unfinished") for item in every[len(whole) :]]
    return items or [(text, "unparsed")]


def _whole_lists(records: Sequence[Instruction]) -> dict[str, list[Instruction]]:
    """The lists that are on disk in full, by name; the rest of a torn one is written again."""
    lists: dict[str, dict[int, Instruction]] = {}
    for record in records:
        name, _, place = record.id.rpartition("/")
        if record.id.split("/")[1] == NEW:
            lists.setdefault(name, {})[int(place)] = record
    return {name: [got[i] for i in sorted(got)] for name, got in lists.items() if 0 in got}


def _few_shots(
    names: Sequence[str],
    seeds: Sequence[Example],
    generated: Sequence[Example],
    settings: SelfInstruct,
    seed: int,
) -> dict[str, FewShot]:
    """The examples that each list is shown."""
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
    """Who writes. Raises ConfigError where that is nobody who can."""
    which, own = settings.model, settings.tokenizer
    if own is not None and not isinstance(own, Tokenizer):
        raise ConfigError(
            f"{ctx.stage}: SelfInstruct(tokenizer=...) needs the methods encode and decode; got "
            f"{type(own).__name__}."
        )
    if not isinstance(which, nn.Module):
        known = [CURRENT, INITIAL, *(ctx.run.stages if ctx.run is not None else ())]
        unknown = ctx.run is not None and which not in known and not Path(str(which)).exists()
        if not isinstance(which, str) or unknown:
            raise ConfigError(
                f"{ctx.stage}: SelfInstruct(model=...) is 'current', 'initial', the name of an "
                f"earlier stage or a module; got {which!r:.100}."
            )
        return Author(ctx.model, ctx.tokens)
    model, tokens = ctx.adapt(which), ctx.tokens
    if own is not None:
        tokens = Tokens(own, eos_id=None, vocab=model.vocab, end_ids=end_ids_of(which))
    elif model.vocab != ctx.model.vocab:
        raise ConfigError(
            f"{ctx.stage}: the model that writes prompts has {model.vocab} tokens and the trained "
            f"one {ctx.model.vocab}; give SelfInstruct its own tokenizer=."
        )
    return Author(model, tokens)


def _check_room(
    ctx: Context, author: Author, seeds: Sequence[Example], settings: SelfInstruct
) -> None:
    """Raise DataError where none of the first lists of seeds leaves the model room."""
    names = [f"{ctx.stage}/{NEW}/0/{place}" for place in range(TRIED_LISTS)]
    shown = _few_shots(names, seeds, (), settings, ctx.seed)
    if any(author.prompt(name, few_shot) is not None for name, few_shot in shown.items()):
        return
    shortest = min(len(author.tokens.prompt(few_shot.text).ids) for few_shot in shown.values())
    raise DataError(
        f"{ctx.stage}: {len(next(iter(shown.values())).parents)} examples leave no room for new "
        f"prompts: the shortest of {TRIED_LISTS} lists has {shortest} tokens, and the model that "
        f"writes takes {author.model.max_len}, of which {ANSWER_TOKENS} must be left. Use shorter "
        "seeds, fewer num_seed_examples or another model=."
    )
