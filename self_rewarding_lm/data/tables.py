"""Tables of pandas and polars as rows. Knows them by what they offer and imports neither."""

from typing import Any


def is_table(dataset: Any) -> bool:
    """Whether this is a DataFrame of pandas or polars."""
    kinds = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(dataset).__mro__}
    return bool(kinds & {("pandas", "DataFrame"), ("polars", "DataFrame")})


def table_rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a table, each a dict by column; what is missing in it is None."""
    rows = table.to_dicts() if hasattr(table, "to_dicts") else table.to_dict("records")
    return [{str(name): _plain(value) for name, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    """A cell without numpy; NaN, NA and NaT, by which a cell without a value is marked, are "
    "None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    return None if isinstance(value, float) and value != value else value
