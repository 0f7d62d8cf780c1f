"""What a stage trained on, as a file in TRL's columns.

Pairs: `prompt, chosen, rejected`. Demonstrations: `prompt, completion`. Both are message lists
if a chat template rendered the prompts (TRL renders them again), else texts. Supervised rows are
token ids as they were trained, in the columns of a dataset that is tokenised already: `input_ids`
and `completion_mask`, 1 where a token is learnt.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from self_rewarding_lm.errors import ConfigError, StoreError
from self_rewarding_lm.records import Demonstration, TrainingRow, is_trained, prompt_columns
from self_rewarding_lm.runs.atomic import OTHER_PLACE, system_errors, writing
from self_rewarding_lm.runs.installed import install
from self_rewarding_lm.runs.lines import Picked
from self_rewarding_lm.runs.run import Run

WRITTEN = (".jsonl", ".parquet")


ROWS_WRITTEN = 16_384  # of a parquet file in one piece


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a .jsonl or .parquet file, by rename.

    Raises ConfigError for other files, and for parquet without pyarrow; StoreError if the file
    cannot be written.
    """
    if path.suffix not in WRITTEN:
        raise ConfigError(f"the file must end in {' or '.join(WRITTEN)}; got {str(path)!r}.")
    with system_errors(path, OTHER_PLACE):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, advice=OTHER_PLACE) as draft:
        if path.suffix == ".parquet":
            _write_parquet(draft, rows)
        else:
            with draft.open("w", encoding="utf-8", errors="replace") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write pieces of one schema, which all of them fit."""
    try:
        from pyarrow import Table, parquet, unify_schemas
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the package pyarrow: {install('data')}, or write .jsonl."
        ) from error

    columns = {name: None for row in rows for name in row}  # some have tools, and others none

    def pieces() -> Iterator[list[Mapping[str, Any]]]:
        for start in range(0, max(1, len(rows)), ROWS_WRITTEN):
            yield [{**columns, **row} for row in rows[start : start + ROWS_WRITTEN]]

    schemas = [Table.from_pylist(piece).schema for piece in pieces()]
    schema = unify_schemas(schemas, promote_options="permissive")
    with parquet.ParquetWriter(path, schema) as writer:
        for piece in pieces():
            writer.write_table(Table.from_pylist(piece, schema=schema))


def export_stage(run: Run, stage: str | int, path: Path, *, force: bool = False) -> int:
    """Write a stage's rows to a .parquet or .jsonl file. Returns how many there are.

    Raises StoreError if the file exists (unless `force`) or the stage has no rows; ConfigError
    for other files, and for parquet without pyarrow.
    """
    if path.exists() and not force:
        raise StoreError(f"{path} exists; give another name, or replace it with --force.")
    rows = trained_rows(run, stage)
    write_rows(path, rows)
    return len(rows)


def trained_rows(run: Run, stage: str | int) -> Sequence[dict[str, Any]]:
    """The rows that a stage trained on, or made for another one.

    Raises StoreError if there are none, or prompts of several kinds.
    """
    rows = run.preference_rows(stage)
    rows = rows or Picked(run.demonstrations(stage), change=_demonstration)
    if not rows:
        trained = run.stage(stage).stored(TrainingRow, is_trained)
        rows = Picked(trained, change=_supervised)
    if not rows:
        state = "done" if run.is_done(stage) else "not done"
        raise StoreError(
            f"stage {stage!r} of {run.folder} has no pairs, demonstrations or supervised rows; it "
            f"is {state}."
        )
    kinds = {type(row["prompt"]).__name__ for row in rows if "prompt" in row}
    if len(kinds) > 1:
        raise StoreError(
            f"stage {stage!r} of {run.folder} has prompts of several kinds ({', '.join(kinds)}): "
            "texts or messages, and token ids. A file has one kind in a column."
        )
    return rows


def _demonstration(row: Demonstration) -> dict[str, Any]:
    if row.completion is None:
        return {"prompt": row.prompt_ids, "completion": row.completion_ids}
    if row.messages is None:
        return {"prompt": row.prompt, "completion": row.completion}
    answer = [{"role": "assistant", "content": row.completion}]
    return {**prompt_columns(row.messages), "completion": answer}


def _supervised(row: TrainingRow) -> dict[str, Any]:
    return {"input_ids": list(row.ids), "completion_mask": [int(flag) for flag in row.targets]}
