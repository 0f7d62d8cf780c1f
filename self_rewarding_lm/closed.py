"""What all settings share. Knows no setting; importing this needs no torch."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from self_rewarding_lm.errors import ConfigError


class Config(BaseModel):
    """What all settings share: frozen, closed, identity comparison, messages that help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, populate_by_name=True
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_in_words(type(self), error)) from None

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def _in_words(cls: type[Config], error: ValidationError) -> str:
    lines = []
    names = list(cls.model_fields)
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            lines.append(f"{where!r} is no setting; {hint}It has: {', '.join(names)}.")
        elif item["type"] == "missing":
            lines.append(f"{where!r} is required.")
        else:
            came = f"; got {item['input']!r:.200}" if where else ""
            lines.append(f"{where + ': ' if where else ''}{item['msg']}{came}.")
    return f"{cls.__name__}: " + " ".join(lines).replace("Value error, ", "")
