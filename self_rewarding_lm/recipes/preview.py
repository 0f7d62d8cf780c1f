"""A recipe's rows as the model will read them, its judge prompts, and what a judge must write.

A tokenizer is loaded and no weights. Rows that only an earlier stage will make are not there yet.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from self_rewarding_lm.config import (
    ComparisonConfig,
    FinetuneConfig,
    RewardConfig,
    SamplingConfig,
    SelfInstruct,
)
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.rows import prompt_of
from self_rewarding_lm.data.tokens import Tokens
from self_rewarding_lm.errors import ConfigError, give_tokenizer
from self_rewarding_lm.judges.self_judge import PairwiseJudge, SelfJudge
from self_rewarding_lm.recipes.plan.plan import recipe_tokens
from self_rewarding_lm.recipes.reader import Recipe
from self_rewarding_lm.scores import number_text
from self_rewarding_lm.stages.base import stage_names
from self_rewarding_lm.text import amount, printable

A_RESPONSE, ANOTHER = "(a response)", "(another response)"
"""Stand in a judge prompt where the run puts what was sampled."""


def preview(recipe: Recipe, *, rows: int, mark: Callable[[str], str]) -> Iterator[str]:
    """Lines that show `rows` rows of each dataset of a recipe, and what its judges are asked.

    mark: puts a mark on a text that is learnt. Raises ConfigError if the recipe has no tokenizer,
    DataError for a row that cannot be used.
    """
    tokens, reason = recipe_tokens(recipe)
    if tokens is None:
        raise ConfigError(f"a preview needs the tokenizer: {reason}. {give_tokenizer()}")
    rewards = recipe.arguments["self_reward_prompt_config"]
    names, told = stage_names(recipe.stages), set[int]()
    for place, (stage, name) in enumerate(zip(recipe.stages, names, strict=True), 1):
        yield f"stage {place} of {len(names)}: {name} ({type(stage).__name__})"
        first = None
        for field, dataset in stage.datasets().items():
            opened = _opened(field, dataset)
            yield from _rows(stage, field, opened, tokens, rows, mark)
            if first is None and opened.known_length():
                first = prompt_of(opened.peek(0), opened.where(0), tokens).text
        for asks, what in _asked(stage, rewards):
            if id(asks) in told:
                yield f"  judged as above: {what}"
                continue
            told.add(id(asks))
            yield f"  judged by: {what}"
            yield from _indented(_judge_prompt(asks, first or "(a prompt)", tokens))
            yield from (f"  {printable(line)}" for line in must_write(asks))
        yield ""


def must_write(asks: RewardConfig | ComparisonConfig) -> Iterator[str]:
    """What a judge's text must hold for a score to be read in it, and what counts without it."""
    at_once = asks.forced_ending == "at_once"
    if isinstance(asks, ComparisonConfig):
        labels = [label for label in (*asks.labels, asks.tie_label) if label is not None]
        stated, choice = asks.verdict_prefix, " or ".join(map(repr, labels))
    elif asks.marks is not None:
        marks = asks.marks
        yield (
            f"it must mark each of {amount(len(marks.worth), 'item')} with {marks.yes!r} or "
            f"{marks.no!r}; the score is the sum of the points, 0 to "
            f"{number_text(marks.score_range[1])}."
        )
        return
    elif asks.parse_reward is not None:
        name = getattr(asks.parse_reward, "__qualname__", type(asks.parse_reward).__name__)
        yield f"its text is given to {name}, which gives a number, or None if there is none."
        return
    else:
        stated = (asks.reward_regex_template or "").strip()
        choice = _numbers(asks)
    words = f"{stated.partition('{{')[0]!r} and then {choice}"
    if at_once:
        yield f"it writes nothing: after its prompt stands {words}, each with its probability."
        return
    yield f"it must write {words}; the last such statement counts."
    if asks.score_mode == "expected":
        yield "the score is the mean of what may stand there, weighed by its probabilities."
    if asks.forced_ending:
        yield "where it states none, these words are put after its text and that mean is taken."


def _numbers(reward: RewardConfig) -> str:
    if reward.allowed_scores is not None:
        return f"one of {', '.join(map(number_text, reward.allowed_scores))}"
    if reward.score_range is None:
        return "a number"
    return "a number from {} to {}".format(*map(number_text, reward.score_range))


def _opened(field: str, dataset: Any) -> Rows:
    if isinstance(dataset, SelfInstruct):
        return Rows(dataset.seed_dataset, f"{field}, seeds of prompts that will be written")
    return Rows(dataset, field)


def _rows(
    stage: FinetuneConfig,
    field: str,
    rows: Rows,
    tokens: Tokens,
    count: int,
    mark: Callable[[str], str],
) -> Iterator[str]:
    """The first rows of a dataset, each text with its learnt tokens marked."""
    length = rows.known_length()
    if length is None:
        yield f"  {rows.name}: rows that an earlier stage will make"
        return
    yield f"  {rows.name}: {amount(length, 'row')}"
    limit = getattr(stage, "max_seq_len", None)
    for place in islice(rows.preview(), count):
        where = rows.where(place)
        for what, ids, learnt in stage.shown(field, rows.peek(place), where, tokens):
            cut = "" if limit is None or len(ids) <= limit else f", cut at {limit} (max_seq_len)"
            ids, learnt = ids[:limit], learnt[:limit]
            numbers = f"{amount(len(ids), 'token')}, {sum(learnt)} learnt{cut}"
            yield printable(f"  {where}: {what}, {numbers}")
            yield from _indented(_marked(ids, learnt, tokens, mark))


def _marked(
    ids: Sequence[int], learnt: Sequence[bool], tokens: Tokens, mark: Callable[[str], str]
) -> str:
    parts = groupby(zip(ids, learnt, strict=True), key=lambda pair: pair[1])
    texts = ((is_learnt, _text([i for i, _ in pairs], tokens)) for is_learnt, pairs in parts)
    return "".join(mark(text) if is_learnt else text for is_learnt, text in texts)


def _text(ids: Sequence[int], tokens: Tokens) -> str:
    """The text of ids with all special tokens, without what would steer a terminal."""
    if hasattr(tokens.source, "apply_chat_template"):
        return printable(tokens.source.decode(list(ids), skip_special_tokens=False))
    return printable(tokens.tokenizer.decode(list(ids)))


def _indented(text: str) -> Iterator[str]:
    yield from (f"    | {line}" for line in text.split("\n"))


def _asked(stage: FinetuneConfig, rewards: Any) -> Iterator[tuple[Any, str]]:
    """The stage's judge prompts, each with words for it."""
    if getattr(stage, "judge", None) is not None:
        return  # an object, which may ask anything
    comparison = getattr(stage, "comparison", None)
    if comparison is not None:
        yield comparison, "a comparison of two responses"
        return
    for name in stage.reward_names():
        yield rewards[name], f"the reward prompt {name!r}"


def _judge_prompt(asks: RewardConfig | ComparisonConfig, prompt: str, tokens: Tokens) -> str:
    if isinstance(asks, ComparisonConfig):
        text = PairwiseJudge(asks).render(prompt, A_RESPONSE, ANOTHER)
    else:
        text = SelfJudge(asks, SamplingConfig(), 1).render(prompt, A_RESPONSE)
    return _text(tokens.prompt(text).ids, tokens)
