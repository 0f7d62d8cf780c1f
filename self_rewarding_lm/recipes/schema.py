"""The JSON schema of recipes, by which editors complete and underline as one writes.

It is made from the classes and functions whose settings it names, and says what stands in the
file's own text. What takes more to see (files that are there, names of stages) `check` tells.
"""

import json
from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from self_rewarding_lm.config import Config, SelfInstruct
from self_rewarding_lm.data.hub import from_hub
from self_rewarding_lm.data.oasst import open_assistant
from self_rewarding_lm.describe import model_of, settings_of
from self_rewarding_lm.generation.server.engine import ServerEngine
from self_rewarding_lm.recipes.paper import paper_recipe
from self_rewarding_lm.recipes.reader import DATASETS, OBJECT_NAME, PARTS
from self_rewarding_lm.recipes.settings import STAGE_KINDS, RecipeSettings, RubricSettings

Schema = dict[str, Any]


DATASET = {"$ref": "#/$defs/dataset"}


OBJECT = {
    "anyOf": [{"type": "string", "pattern": f"^{OBJECT_NAME.pattern}$"}, {"type": "null"}],
}


LINES = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
"""[first, end], as a recipe names lines of a file of trees."""


PLAIN = (str, int, float, list, type(None))
"""Types of defaults that are told."""


class _Generator(GenerateJsonSchema):
    """Leaves out defaults that are no JSON, such as functions, without a word."""

    ignored_warning_kinds = {"non-serializable-default", "skipped-choice"}  # noqa: RUF012


def recipe_schema() -> Schema:
    """The schema of a recipe file (draft 7, which editors read)."""
    owners: dict[str, Any] = {
        "recipe": RecipeSettings,
        "reward_prompt": RubricSettings,
        "paper": paper_recipe,
        "hub": from_hub,
        "open_assistant": open_assistant,
        "self_instruct": SelfInstruct,
        "engine": ServerEngine,
        **{f"stage_{kind}": cls for kind, cls in STAGE_KINDS.items()},
    }
    for owner in list(owners.values()):
        owners |= {cls.__name__: cls for cls in _nested(owner) if cls not in owners.values()}

    # 1. what pydantic says of each class, with the words of its settings
    models = {name: _model(owner) for name, owner in owners.items()}
    refs, made = models_json_schema(
        [(model, "validation") for model in models.values()],
        by_alias=False,
        schema_generator=_Generator,
    )
    names = {refs[model, "validation"]["$ref"]: name for name, model in models.items()}
    defs = {}
    for key, schema in made["$defs"].items():
        name = names.get(f"#/$defs/{key}", key)
        schema = _renamed(schema, names)
        defs[name] = _with_words(schema, owners[name]) if name in owners else schema

    # 2. what recipes have in the place of Python's objects
    for kind in STAGE_KINDS:
        defs[f"stage_{kind}"]["properties"] |= {"stage": {"const": kind}}
    needs = {kind: defs[f"stage_{kind}"].pop("required", []) for kind in STAGE_KINDS}
    del defs["reward_prompt"]["required"]  # what is not given comes from a rubric
    defs["dataset"] = _dataset(defs.pop("hub"), defs.pop("open_assistant"))
    rounds = _object({"rounds": {"type": "array", "items": DATASET}})
    self_reward = [_ref("stage_self_reward"), _ref("stage_self_reward_sft")]
    _put(
        defs["paper"],
        prompts={"anyOf": [DATASET, rounds]},
        sft=_ref("stage_sft"),
        eft=_ref("stage_eft"),
        self_reward={"anyOf": self_reward},
    )
    top = defs.pop("recipe")
    _put(
        top,
        paper=_ref("paper"),
        stages={"type": "array", "minItems": 1, "items": _stage(needs)},
        engine={"anyOf": [_ref("engine"), {"type": "null"}]},
        reward_prompts={"type": "object", "additionalProperties": _ref("reward_prompt")},
    )
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of self_rewarding_lm",
        **top,
        "oneOf": [{"required": ["paper"]}, {"required": ["stages"]}],
        "$defs": dict(sorted(defs.items())),
    }


def schema_text() -> str:
    """The schema as the library ships it (`runs.installed.SCHEMA`)."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


def _model(owner: Any) -> type[Config]:
    is_config = isinstance(owner, type) and issubclass(owner, Config)
    return owner if is_config else model_of(owner)


def _nested(owner: Any) -> Iterator[type[Config]]:
    """The Config classes of an owner's settings, and of theirs."""
    for setting in settings_of(owner):
        if setting.nested is not None:
            yield setting.nested
            yield from _nested(setting.nested)


def _with_words(schema: Schema, owner: Any) -> Schema:
    """A class's schema with the words of its settings; datasets and objects as recipes name them.

    Left out are titles (the names again) and defaults that are whole mappings of settings.
    """
    fields, properties = _model(owner).model_fields, {}
    for setting in settings_of(owner):
        name = setting.name
        told = {k: v for k, v in schema["properties"][name].items() if k != "title"}
        if not isinstance(told.get("default"), PLAIN):
            told.pop("default", None)
        if fields[name].annotation is Any:
            if name.endswith("_dataset") or name in DATASETS:
                told |= DATASET
            elif not isinstance(setting.default, str):
                told |= OBJECT
        if "$ref" in told:  # beside it draft 7 reads nothing
            told["allOf"] = [{"$ref": told.pop("$ref")}]
        properties[name] = told | ({"description": setting.words} if setting.words else {})
    required = schema.get("required")
    return _object(properties) | ({"required": required} if required else {})


def _renamed(schema: Any, names: dict[str, str]) -> Any:
    """A schema that refers to classes by our names, and says tuples as draft 7 does."""
    if isinstance(schema, list):
        return [_renamed(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = names.get(schema["$ref"])
        schema = schema if name is None else {**schema, **_ref(name)}
    return {
        "items" if key == "prefixItems" else key: _renamed(value, names)
        for key, value in schema.items()
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _object(properties: Schema) -> Schema:
    """A mapping with these keys and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _put(schema: Schema, **properties: Schema) -> None:
    """Give settings other schemas; their words stay."""
    for name, told in properties.items():
        words = {"description": schema["properties"][name]["description"]}
        inner = {"allOf": [told]} if "$ref" in told else told
        schema["properties"][name] = {**inner, **words}


def _dataset(hub: Schema, trees: Schema) -> Schema:
    """A dataset: a file or an object by name, a mapping with a key of its own, or several."""
    settings = {k: v for k, v in trees["properties"].items() if k != "path"}
    settings |= {
        "trees": LINES,
        "part": {"enum": list(PARTS)},
        "open_assistant": {"type": "string"},
    }
    sources = [
        _object({"from_stage": {"type": "string"}}) | {"required": ["from_stage"]},
        hub,
        _object(settings) | {"required": ["open_assistant", "part"]},
        _object({"self_instruct": _ref("self_instruct")}) | {"required": ["self_instruct"]},
    ]
    several = {"type": "array", "items": DATASET, "minItems": 1}
    return {"anyOf": [{"type": ["string", "null"]}, several, *sources]}


def _stage(needs: dict[str, list[str]]) -> Schema:
    """A stage of a list, by its kind; one of the user's own may have any settings."""
    kinds = [
        {
            "if": {"properties": {"stage": {"const": kind}}, "required": ["stage"]},
            "then": {"allOf": [_ref(f"stage_{kind}")], "required": required},
        }
        for kind, required in needs.items()
    ]
    own = {"type": "string", "pattern": f"^{OBJECT_NAME.pattern}$"}
    kind_or_own = {"anyOf": [{"enum": list(needs)}, own]}
    return {
        "type": "object",
        "properties": {"stage": kind_or_own},
        "required": ["stage"],
        "allOf": kinds,
    }
