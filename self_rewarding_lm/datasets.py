"""Rows in: what counts as a dataset, and what its rows may look like.

A dataset is a torch Dataset (or anything with `len` and `[i]`), a list, an iterable, a .jsonl or
.json file, `from_stage(...)`, or a list of those, which stands for them one after the other.
Every row is checked as it is read; a DataError names the dataset, the row and what is wrong.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import Dataset

from self_rewarding_lm.errors import DataError
from self_rewarding_lm.records import PreferencePair, Prompt
from self_rewarding_lm.tokens import Tokens

logger = logging.getLogger(__name__)

Ids = tuple[int, ...]
PREVIEWED_ROWS = 10_000  # of lists and files, checked before the first stage begins


@dataclass(frozen=True)
class FromStage:
    """The pairs of an earlier stage as a dataset."""

    stage: str


def from_stage(stage: str) -> FromStage:
    """The preference pairs that the stage of that name made, as a dataset for a later stage.

    A DPO stage trains on them again; an SFT stage on the chosen responses alone.
    """
    return FromStage(stage)


def create_mock_dataset(length: int, output: Any) -> Dataset:
    """A dataset of `length` rows: each is `output()` where that is a function, else `output`."""

    class MockDataset(Dataset):
        def __len__(self) -> int:
            return length

        def __getitem__(self, index: int) -> Any:
            if not 0 <= index < length:
                raise IndexError(index)
            return output() if callable(output) else output

    return MockDataset()


@runtime_checkable
class Indexed(Protocol):
    """Rows that are read by their place."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Rows:
    """A dataset opened for one stage: each row is read once."""

    def __init__(self, dataset: Any, name: str, resolve: Callable[[FromStage], Sequence]) -> None:
        self.name = name
        self._resolve = resolve
        self._parts: list[Indexed] | None = None
        self._first: list[Any] = []
        self._datasets = dataset if _is_concatenation(dataset) else [dataset]
        for part in self._datasets:
            _check_dataset(part, name)

    def __len__(self) -> int:
        return sum(map(len, self._opened()))

    def read(self, index: int) -> Any:
        """The row at `index`, as the dataset gives it."""
        if index == 0 and self._first:
            return self._first.pop()
        for part in self._opened():
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)

    def preview(self) -> Iterator[tuple[int, Any]]:
        """Rows that can be looked at before the run, with their places.

        Of lists and files all (up to PREVIEWED_ROWS); of other datasets, whose rows may be read
        once only, the first, which is kept for `read`; none that an earlier stage will make.
        """
        if any(isinstance(part, FromStage) for part in self._datasets):
            return
        if len(self) == 0:
            raise DataError(f"{self.name} is empty; it needs at least one row.")
        if all(isinstance(part, list) for part in self._opened()):
            yield from ((i, self.read(i)) for i in range(min(len(self), PREVIEWED_ROWS)))
            return
        if not self._first:
            self._first.append(self.read(0))
        yield 0, self._first[0]

    def forget_stages(self) -> None:
        """Read the rows of earlier stages anew: those stages may have run again."""
        if any(isinstance(part, FromStage) for part in self._datasets):
            self._parts = None

    def where(self, index: int) -> str:
        """Words that name a row in an error."""
        single = self._datasets[0]
        if len(self._datasets) == 1 and isinstance(single, str | Path):
            suffix = Path(single).suffix
            return f"{single}, {'line' if suffix == '.jsonl' else 'row'} {index + 1}"
        return f"{self.name}, row {index}"

    def _opened(self) -> list[Indexed]:
        if self._parts is None:
            self._parts = [self._open(part) for part in self._datasets]
        return self._parts

    def _open(self, dataset: Any) -> Indexed:
        if isinstance(dataset, FromStage):
            return self._resolve(dataset)
        if isinstance(dataset, str | Path):
            return _read_file(Path(dataset), self.name)
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            return dataset
        return list(dataset)


def prompt_of(row: Any, where: str, tokens: Tokens) -> tuple[str | None, Ids, dict | None]:
    """Text, ids and other columns of a prompt row: a text, `{"prompt": ...}`, or ids."""
    columns = None
    if isinstance(row, Mapping):
        _require(row, ("prompt",), where)
        columns = {k: v for k, v in row.items() if k != "prompt" and _is_plain(v)} or None
        row = row["prompt"]
    text = row if isinstance(row, str) else None
    ids = _ids(row, f"{where}: the prompt", tokens)
    if not ids:
        raise DataError(f"{where}: the prompt is empty; it must have at least one token.")
    return text if text is not None else tokens.decode(ids), ids, columns


def training_row(row: Any, where: str, tokens: Tokens) -> tuple[Ids, tuple[bool, ...]]:
    """Ids and targets of a supervised row.

    `(ids, prompt_len)`, `(ids, prompt_mask)` (True on the prompt), `{"prompt", "completion"}` or
    `{"text"}`. Texts get the end token behind them; ids are taken as they are.
    """
    if isinstance(row, PreferencePair):
        ids, prompt = (*row.prompt_ids, *row.chosen_ids), len(row.prompt_ids)
    elif isinstance(row, Mapping) and "text" in row and "completion" not in row:
        ids, prompt = tokens.ended(_ids(row["text"], f"{where}: the text", tokens)), 0
    elif isinstance(row, Mapping):
        _require(row, ("prompt", "completion"), where)
        prompt_ids = _ids(row["prompt"], f"{where}: the prompt", tokens)
        ids = (*prompt_ids, *_response(row["completion"], f"{where}: the completion", tokens))
        prompt = len(prompt_ids)
    elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2:
        ids = _ids(row[0], f"{where}: the ids", tokens)
        prompt = _prompt_part(row[1], ids, where)
    else:
        raise DataError(
            f"{where}: a supervised row is (ids, prompt_len), (ids, prompt_mask), "
            f'{{"prompt", "completion"}} or {{"text"}}; got {_shape(row)}.'
        )
    is_prompt = prompt if isinstance(prompt, tuple) else tuple(i < prompt for i in range(len(ids)))
    targets = tuple(i > 0 and not p for i, p in enumerate(is_prompt))
    if not any(targets):
        raise DataError(
            f"{where}: nothing to learn: the prompt takes all {len(ids)} tokens of the row."
        )
    return ids, targets


def preference_row(row: Any, where: str, tokens: Tokens) -> PreferencePair:
    """A pair from `{"prompt", "chosen", "rejected"}` (texts or ids), without an id."""
    if isinstance(row, PreferencePair):
        return row
    if not isinstance(row, Mapping):
        raise DataError(
            f'{where}: a preference row is {{"prompt", "chosen", "rejected"}}; got {_shape(row)}.'
        )
    _require(row, ("prompt", "chosen", "rejected"), where)
    texts = {
        k: row[k] if isinstance(row[k], str) else None for k in ("prompt", "chosen", "rejected")
    }
    pair = PreferencePair(
        id="",
        prompt_ids=_ids(row["prompt"], f"{where}: the prompt", tokens),
        chosen_ids=_response(row["chosen"], f"{where}: chosen", tokens),
        rejected_ids=_response(row["rejected"], f"{where}: rejected", tokens),
        **texts,
    )
    if pair.chosen_ids == pair.rejected_ids:
        raise DataError(f"{where}: chosen and rejected are the same; nothing is preferred.")
    return pair


def prompt_and_completion(row: Any, where: str, tokens: Tokens) -> tuple[Ids, Ids]:
    """The two parts of a supervised row whose prompt stands before its completion."""
    ids, targets = training_row(row, where, tokens)
    length = targets.index(True)
    if not all(targets[length:]) or (length == 1 and _is_unprompted(row)):
        raise DataError(
            f"{where}: a prompt followed by a completion is needed here, to sample an answer to "
            f"the same prompt; got {_shape(row)}."
        )
    return ids[:length], ids[length:]


def truncated(ids: Ids, prompt_len: int, limit: int | None, where: str) -> tuple[Ids, bool]:
    """Ids cut at the end to `limit` tokens, and whether they were; a prompt must leave room."""
    if limit is None or len(ids) <= limit:
        return ids, False
    if prompt_len >= limit:
        raise DataError(
            f"{where}: the prompt alone has {prompt_len} tokens, and max_seq_len is {limit}: no "
            "room for a response. Shorten the prompt or raise max_seq_len."
        )
    return ids[:limit], True


def read_prompt(
    rows: Rows, index: int, prompt_id: str, tokens: Tokens, limit: int | None
) -> Prompt:
    """The prompt at a row; DataError where it leaves no room for a response in `limit` tokens."""
    where = rows.where(index)
    text, ids, columns = prompt_of(rows.read(index), where, tokens)
    check_prompt(ids, where, limit)
    return Prompt(prompt_id, index, ids, text, columns)


def check_prompt(ids: Ids, where: str, limit: int | None) -> None:
    """Raise DataError where a prompt leaves no room for a response in `limit` tokens."""
    if limit is not None and len(ids) >= limit:
        raise DataError(
            f"{where}: the prompt has {len(ids)} tokens, and prompt and response together may "
            f"have {limit}. Shorten it or raise max_seq_len."
        )


def _check_dataset(dataset: Any, name: str) -> None:
    if isinstance(dataset, str | Path):
        if Path(dataset).suffix not in (".jsonl", ".json"):
            raise DataError(f"{name}: a file must be .jsonl or .json; got {str(dataset)!r}.")
        if not Path(dataset).is_file():
            raise DataError(f"{name}: there is no file {str(dataset)!r}.")
    elif not isinstance(dataset, FromStage | Iterable) and not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name} must be a torch Dataset, a list, an iterable, a .jsonl or .json file or "
            f"from_stage(...); got {type(dataset).__name__}."
        )


def _is_concatenation(dataset: Any) -> bool:
    return isinstance(dataset, list) and bool(dataset) and all(map(_is_dataset, dataset))


def _is_dataset(item: Any) -> bool:
    """Whether an item of a list is a dataset itself: rows are texts, dicts, tuples and ids."""
    if isinstance(item, str):
        return item.endswith((".jsonl", ".json")) and not set(item) & set(" \n")
    if isinstance(item, list):
        return bool(item) and isinstance(item[0], str | Mapping | tuple)
    return isinstance(item, FromStage | Dataset | Path)


def _read_file(path: Path, name: str) -> list[Any]:
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix == ".json":
            try:
                rows = json.load(file)
            except ValueError as error:
                raise DataError(f"{name}: {path} is no JSON: {error}") from error
            if not isinstance(rows, list):
                raise DataError(
                    f"{name}: {path} must hold a list of rows; it holds {_shape(rows)}."
                )
            return rows
        rows = []
        lines = file.read().rstrip()
        for number, line in enumerate(lines.split("\n") if lines else [], 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{name}: {path}, line {number}, is no JSON: {error}") from error
        return rows


def _ids(value: Any, whose: str, tokens: Tokens) -> Ids:
    return tokens.encode(value) if isinstance(value, str) else tokens.checked(value, f"({whose})")


def _response(value: Any, whose: str, tokens: Tokens) -> Ids:
    ids = _ids(value, whose, tokens)
    ids = tokens.ended(ids) if isinstance(value, str) else ids
    if not ids:
        raise DataError(f"{whose} is empty; it must have at least one token.")
    return ids


def _prompt_part(value: Any, ids: Ids, where: str) -> int | tuple[bool, ...]:
    value = value.tolist() if hasattr(value, "tolist") else value  # a tensor, an array, a scalar
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value <= len(ids):
            return value
    elif isinstance(value, Sequence) and all(isinstance(flag, bool) for flag in value):
        if len(value) == len(ids):
            return tuple(value)
    raise DataError(
        f"{where}: beside {len(ids)} ids there must be prompt_len, an int from 0 to {len(ids)}, "
        f"or prompt_mask, {len(ids)} booleans; got {str(value)[:80]}."
    )


def _is_unprompted(row: Any) -> bool:
    """Whether a row has no prompt: nothing predicts its first token, which is no target either."""
    if isinstance(row, Mapping):
        return "text" in row and "completion" not in row
    part = row[1].tolist() if hasattr(row[1], "tolist") else row[1]
    return part == 0 or (isinstance(part, Sequence) and not any(part))


def _require(row: Mapping, names: Sequence[str], where: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise DataError(
            f"{where}: the row has no {' and no '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, row)) or 'nothing'}."
        )


def _is_plain(value: Any) -> bool:
    """Whether a column's value can be kept in a record."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _shape(row: Any) -> str:
    if isinstance(row, Mapping):
        return f"a dict with {', '.join(map(repr, row))}"
    return f"{type(row).__name__} {str(row)[:60]!r}"
