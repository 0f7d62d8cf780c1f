"""A recipe in a file or in flags becomes the trainer's arguments, checked in full before any work.

All wrong values are named in one error, each with its key, its line and what is allowed. A relative
path starts at the folder of the recipe file (of a flag: at the current folder). Objects (functions,
modules, classes) are named `package.module:attribute`; modules are searched for in that folder too.
"""

import importlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import nn

from self_rewarding_lm.config import (
    Config,
    FinetuneConfig,
    RewardConfig,
    SelfInstruct,
    from_stage,
)
from self_rewarding_lm.context import no_reward_prompt, wrong_names
from self_rewarding_lm.data.files import SUFFIXES_IN_WORDS, hub_hint, suffix_of
from self_rewarding_lm.data.hub import from_hub
from self_rewarding_lm.data.oasst import OpenAssistant, open_assistant
from self_rewarding_lm.describe import config_in, model_of
from self_rewarding_lm.errors import ConfigError, SelfRewardingError, did_you_mean, typed
from self_rewarding_lm.generation.server.engine import ServerEngine
from self_rewarding_lm.judges.templates import template_errors
from self_rewarding_lm.models.loading import load_tokenizer, lora_config
from self_rewarding_lm.recipes.paper import paper_recipe
from self_rewarding_lm.recipes.settings import (
    HUB_NAME,
    NESTED,
    NOT_AS_THEY_ARE,
    RUBRICS,
    STAGE_KINDS,
    LoraSettings,
    RecipeSettings,
    RubricSettings,
)
from self_rewarding_lm.recipes.yaml_nodes import Node, read_yaml
from self_rewarding_lm.stages.base import stage_names

if TYPE_CHECKING:
    from self_rewarding_lm.trainer import SelfRewardingTrainer


Keys = tuple[Any, ...]
"""Names and places that lead from the top of a recipe to a value."""


OBJECT_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")


PAPER_STAGES = ("sft", "eft", "self_reward")
"""Keys of a recipe's `paper` that hold settings of a stage, which have the stage's name."""


DATASETS = ("ift", "valid_ift", "ranked", "prompts", "seeds")
"""Arguments that are datasets, as are all whose name ends in _dataset."""


SOURCES = ("from_stage", "hub", "open_assistant", "self_instruct")
"""Keys of a mapping that is a dataset."""


DATASET_IN_WORDS = (
    f"a {SUFFIXES_IN_WORDS} file, package.module:attribute, {{from_stage: name}}, "
    "{hub: owner/name, split: train}, {open_assistant: file, part: ift}, {self_instruct: {...}}, "
    "or "
    "a list of those"
)


PARTS = tuple(f.name for f in fields(OpenAssistant) if f.name != "left_out")


WRONG: Any = object()
"""Stands for a value that was refused."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that was checked.

    model: a name, a module, or a function that makes one. arguments: of SelfRewardingTrainer.
    """

    model: Any
    tokenizer: Any
    peft: LoraSettings | None
    arguments: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.arguments["checkpoints_folder"])

    @property
    def stages(self) -> Sequence[FinetuneConfig]:
        return self.arguments["finetune_configs"]

    def trainer(self, *, quiet: bool = False) -> "SelfRewardingTrainer":
        """The trainer of the recipe; this loads the model."""
        from self_rewarding_lm.trainer import SelfRewardingTrainer

        model, tokenizer = self.model, self.tokenizer
        if not isinstance(model, str | nn.Module):
            model = model()
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        peft = None if self.peft is None else lora_config(**dict(self.peft))
        return SelfRewardingTrainer(
            model, tokenizer=tokenizer, peft_config=peft, quiet=quiet, **self.arguments
        )


@typed
def read_recipe(root: Node | str | Path) -> Recipe:
    """The recipe of a file, or of the mapping at the top of one (`read_yaml`).

    Reads the data and imports the modules that the recipe names; loads no model. Raises ConfigError
    that names every wrong value.
    """
    reader = Reader()
    recipe = reader.recipe(root if isinstance(root, Node) else read_yaml(root))
    if reader.problems:
        count = len(reader.problems)
        words = "one value is" if count == 1 else f"{count} values are"
        lines = "\n".join(f"  {problem}" for problem in reader.problems)
        raise ConfigError(f"the recipe cannot be run; {words} wrong:\n{lines}")
    return recipe


class Reader:
    """Makes values of nodes. Each method returns WRONG for a value that it refuses.

    keys: where a node stands in the recipe, for the error. problems: a line for each value that was
    refused. trees: Open Assistant's rows by file and settings, so that a file is read once.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.trees: dict[str, Any] = {}

    def refuse(self, node: Node, keys: Keys, words: str) -> Any:
        """Write down a problem; the value becomes WRONG."""
        name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
        self.problems.append(f"{node.place}: {name[1:] + ': ' if name else ''}{words}")
        return WRONG

    # -- the parts of a recipe ---------------------------------------------------------------------

    def recipe(self, root: Node) -> Any:
        """The Recipe of the mapping at the top of a file."""
        items = self.mapping(root, ())

        # 1. the settings that stand at the top themselves
        plain = {name: child for name, child in items.items() if name not in NESTED}
        top = self.settings(RecipeSettings, replace(root, value=plain), ())

        # 2. the stages: those of the paper, or a list
        stages: Any = WRONG
        if ("paper" in items) == ("stages" in items):
            words = "give paper (settings of the paper's stages) or stages (a list), one of them."
            self.refuse(root, (), words)
        if "paper" in items:
            stages = self._paper(items["paper"], ("paper",))
        elif "stages" in items:
            stages = self._stages(items["stages"], ("stages",))

        # 3. the judge's prompts, and the names by which stages ask for others' things
        rewards = self._rewards(items.get("reward_prompts"), ("reward_prompts",))
        if stages is not WRONG and rewards is not WRONG:
            self._check_names(stages, root, rewards)

        # 4. who generates, the model and its tokenizer
        engine = items["engine"] if "engine" in items else replace(root, value=None)
        if engine.value is not None:
            engine = replace(engine, value=self.call(ServerEngine, engine, ("engine",)))
        model = self.model(items["model"], ("model",)) if "model" in items else WRONG
        tokenizer = self.tokenizer(items.get("tokenizer"), ("tokenizer",))

        if top is WRONG or self.problems:
            return WRONG
        out = items["out"].folder if "out" in items else root.folder
        arguments = {
            **{name: value for name, value in top if name not in NOT_AS_THEY_ARE},
            "finetune_configs": stages,
            "self_reward_prompt_config": rewards,
            "checkpoints_folder": out / Path(top.out).expanduser(),
            "accelerate_kwargs": top.accelerate,
            "engine": engine.value,
        }
        return Recipe(model, tokenizer, top.peft, arguments)

    def _paper(self, node: Node, keys: Keys) -> Any:
        """The stages of paper_recipe."""
        items = dict(self.mapping(node, keys))
        positive = "positive_only" in items and items["positive_only"].value is True
        kinds = {name: STAGE_KINDS[name] for name in PAPER_STAGES}
        if positive:
            kinds["self_reward"] = STAGE_KINDS["self_reward_sft"]
        values = {}
        for name, kind in kinds.items():
            if name in items:
                values[name] = self._some_settings(kind, items.pop(name), (*keys, name))
        prompts = items.get("prompts")
        if prompts is not None and isinstance(prompts.value, dict) and "rounds" in prompts.value:
            values["prompts"] = self._datasets_by_round(items.pop("prompts"), (*keys, "prompts"))
        return self.call(paper_recipe, replace(node, value=items), keys, others=values)

    def _datasets_by_round(self, node: Node, keys: Keys) -> Any:
        rounds = node.value["rounds"]
        if len(node.value) > 1 or not isinstance(rounds.value, list):
            words = f"datasets by round are {{rounds: [first, second]}}; got {shape(node)}."
            return self.refuse(node, keys, words)
        datasets = [self.dataset(n, (*keys, "rounds", i)) for i, n in enumerate(rounds.value)]
        return WRONG if any_wrong(datasets) else tuple(datasets)

    def _stages(self, node: Node, keys: Keys) -> Any:
        """A list of stages, each a mapping with its kind under `stage`."""
        if not isinstance(node.value, list) or not node.value:
            return self.refuse(node, keys, f"stages are a list; got {shape(node)}.")
        stages = [self._stage(item, (*keys, place)) for place, item in enumerate(node.value)]
        return WRONG if any_wrong(stages) else stages

    def _stage(self, node: Node, keys: Keys) -> Any:
        items = dict(self.mapping(node, keys))
        kind = items.pop("stage", None)
        name = kind.value if kind is not None else None
        if kind is not None and isinstance(name, str) and OBJECT_NAME.fullmatch(name):
            cls = self.object(kind, (*keys, "stage"))
        else:
            cls = STAGE_KINDS.get(str(name))
        if not (isinstance(cls, type) and issubclass(cls, FinetuneConfig)):
            allowed = f"{', '.join(STAGE_KINDS)}, or package.module:Class of a FinetuneConfig"
            came = shape(kind) if kind is not None else "no `stage`"
            return self.refuse(kind or node, (*keys, "stage"), f"must be {allowed}; got {came}.")
        return self.settings(cls, replace(node, value=items), keys)

    def _rewards(self, node: Node | None, keys: Keys) -> Any:
        """The judge's prompts by name; `default` is the paper's if the recipe has none."""
        rewards: dict[str, Any] = {"default": RUBRICS["paper"]}
        for name, child in (self.mapping(node, keys) if node is not None else {}).items():
            rewards[name] = self.reward(child, (*keys, name))
        return WRONG if any_wrong(rewards.values()) else rewards

    def reward(self, node: Node, keys: Keys) -> Any:
        """A judge's prompt: whole, or settings over those of one of RUBRICS."""
        items = self.mapping(node, keys)
        if "prompt_template" in items:
            return self.settings(RewardConfig, node, keys)
        if "marks" in items and items["marks"].value is not None:
            words = (
                "marks need a prompt_template that asks for them; the library's own rubrics ask "
                "for a number."
            )
            return self.refuse(items["marks"], (*keys, "marks"), words)
        rubric = items["rubric"].value if "rubric" in items else "paper"
        base = RUBRICS.get(rubric if isinstance(rubric, str) else "", RUBRICS["paper"])
        base_values = {name: getattr(base, name) for name in base.model_fields_set}
        settings = self.settings(RubricSettings, node, keys, others=base_values)
        if settings is WRONG:
            return WRONG
        names = {*base_values, *items} - {"rubric"}
        return RewardConfig(**{name: getattr(settings, name) for name in names})

    def _check_names(
        self, stages: Sequence[FinetuneConfig], root: Node, rewards: Mapping[str, Any]
    ) -> None:
        """Refuse names of stages, weights and reward prompts that there are not."""
        try:
            names = stage_names(stages)
        except ConfigError as error:
            self.refuse(root.at(("stages",)), ("stages",), str(error))
            return
        for place, stage in enumerate(stages):
            errors = [*wrong_names(stage, names[place], names[:place])]
            missing = [name for name in stage.reward_names() if name not in rewards]
            errors += [no_reward_prompt(names[place], name, rewards) for name in missing]
            for error in errors:
                keys = ("stages", place, *error.path) if "stages" in root.value else ("paper",)
                self.refuse(root.at(keys), keys, str(error))

    def model(self, node: Node, keys: Keys) -> Any:
        """A folder, a file, a name on the hub, or an object."""
        name = node.value
        if not isinstance(name, str):
            return WRONG  # RecipeSettings refused it
        if node.path.exists():
            return str(node.path)
        if OBJECT_NAME.fullmatch(name):
            model = self.object(node, keys)
            if model is not WRONG and not callable(model):
                words = f"must be a torch module or a function; got {type(model).__name__}."
                return self.refuse(node, keys, words)
            return model
        if not HUB_NAME.fullmatch(name) or name.startswith(".") or name.endswith(".gguf"):
            return self.refuse(node, keys, f"there is no file or folder {str(node.path)!r}.")
        return name

    def tokenizer(self, node: Node | None, keys: Keys) -> Any:
        """A folder, a name on the hub, or an object; None if the recipe names none."""
        if node is None or not isinstance(node.value, str):
            return None
        if node.path.exists():
            return str(node.path)
        return self.object(node, keys) if OBJECT_NAME.fullmatch(node.value) else node.value

    # -- settings of a class or a function ---------------------------------------------------------

    def settings(
        self, cls: type[Config], node: Node, keys: Keys, *, others: Mapping[str, Any] = {}
    ) -> Any:
        """An instance of a Config class. others: values of settings that the node does not name."""
        values = self._values(cls, node, keys)
        return values if values is WRONG else self._build(cls, {**others, **values}, node, keys)

    def call(self, function: Any, node: Node, keys: Keys, *, others: Mapping[str, Any] = {}) -> Any:
        """The result of a function whose arguments are the node's settings and `others`."""
        before = len(self.problems)
        settings = self.settings(model_of(function), node, keys, others=others)
        if settings is WRONG or len(self.problems) > before:
            return WRONG
        try:
            return function(**{name: getattr(settings, name) for name in settings.model_fields_set})
        except SelfRewardingError as error:
            return self.refuse(node, keys, str(error))

    def mapping(self, node: Node, keys: Keys) -> dict[str, Node]:
        """The items of a mapping; none, and a problem, for anything else."""
        if isinstance(node.value, dict):
            return node.value
        self.refuse(node, keys, f"this must be a mapping of settings; got {shape(node)}.")
        return {}

    def _some_settings(self, cls: type[Config], node: Node, keys: Keys) -> Any:
        """The settings of a class that the node names, as a dict; required ones may be missing."""
        values = self._values(cls, node, keys)
        if values is WRONG:
            return WRONG
        required = [name for name, field in cls.model_fields.items() if field.is_required()]
        config = self._build(cls, {**dict.fromkeys(required), **values}, node, keys)
        return config if config is WRONG else {name: getattr(config, name) for name in values}

    def _values(self, cls: type[Config], node: Node, keys: Keys) -> Any:
        """Values by field, nested settings as instances of their class."""
        if not isinstance(node.value, dict):
            self.mapping(node, keys)
            return WRONG
        fields = cls.model_fields
        values = {}
        for key, child in node.value.items():
            if key in fields:
                values[key] = self._value(key, fields[key], child, (*keys, key))
            else:
                hint = did_you_mean(key, fields)
                if not keys and key in model_of(paper_recipe).model_fields:
                    hint = "; it stands below `paper`."
                of_stages = [f"`{s}`" for s in PAPER_STAGES if key in STAGE_KINDS[s].model_fields]
                if cls is model_of(paper_recipe) and of_stages:
                    hint = f"; it stands below a stage: {', '.join(of_stages)}."
                words = f"this is not a setting{hint} There are: {', '.join(fields)}."
                self.refuse(child, (*keys, key), words)
        return values

    def _value(self, name: str, field: Any, node: Node, keys: Keys) -> Any:
        if node.value is None:
            return None
        nested = config_in(field.annotation)
        if nested is not None:
            return self.settings(nested, node, keys)
        if name == "init_from" or (name == "reference" and isinstance(node.value, str)):
            path = node.path  # or a stage's name
            return path if path.exists() else node.plain()
        if name == "folder" or (name == "candidates_from" and ":" in str(node.value)):
            return str(node.path)  # a folder, or FOLDER:STAGE
        if field.annotation is not Any:
            return node.plain()
        if name.endswith("_dataset") or name in DATASETS:
            return self.dataset(node, keys)
        if isinstance(field.default, str) and not OBJECT_NAME.fullmatch(str(node.value)):
            return node.plain()
        return self.object(node, keys)

    def _build(self, cls: type[Config], values: dict[str, Any], node: Node, keys: Keys) -> Any:
        """An instance of a class; what pydantic finds wrong is refused at its own line."""
        refused = {name for name, value in values.items() if value is WRONG}
        try:
            config = cls(**{name: value for name, value in values.items() if name not in refused})
            errors = [] if refused else list(template_errors(config))
            for name, error in errors:
                self.refuse(node.at((name,)), (*keys, name), str(error))
            return WRONG if refused or errors else config
        except ConfigError as error:
            cause = error.__context__
            if not isinstance(cause, ValidationError):
                return self.refuse(node, keys, str(error))
        messages: dict[Keys, list[str]] = {}
        for item in cause.errors():
            place = item["loc"]
            if refused and (not place or place[0] in refused):
                continue  # follows from a value that was refused already
            if item["type"] == "missing":
                self.refuse(node, keys, f"{place[-1]!r} is required.")
                continue
            words = item["msg"].removeprefix("Value error, ")
            messages.setdefault(_known_part(node, place), []).append(words)
        for place, sentences in messages.items():
            at = node.at(place)
            came = f"; got {shape(at)}." if place else "."
            first, *others = dict.fromkeys(sentences)  # one for each type of a union
            allowed = [first, *(words.removeprefix("Input should be ") for words in others)]
            self.refuse(at, (*keys, *place), " or ".join(allowed).rstrip(".") + came)
        return WRONG

    # -- objects and datasets ----------------------------------------------------------------------

    def object(self, node: Node, keys: Keys) -> Any:
        """What `package.module:attribute` names."""
        name = node.value
        if not isinstance(name, str) or not OBJECT_NAME.fullmatch(name):
            words = "an object is named package.module:attribute"
            return self.refuse(node, keys, f"{words}; got {shape(node)}.")
        if str(node.folder) not in sys.path:
            sys.path.append(str(node.folder))
        module, attributes = name.split(":")
        try:
            value: Any = importlib.import_module(module)
            for attribute in attributes.split("."):
                value = getattr(value, attribute)
        except Exception as error:  # whatever the user's module raises
            words = f"{name} cannot be imported: {type(error).__name__}: {error}."
            return self.refuse(node, keys, words)
        return value

    def dataset(self, node: Node, keys: Keys) -> Any:
        """A file, an object, a mapping with a key of SOURCES; or a list of those."""
        value = node.value
        if isinstance(value, list) and value:
            parts = [self.dataset(item, (*keys, i)) for i, item in enumerate(value)]
            return WRONG if any_wrong(parts) else parts[0] if len(parts) == 1 else parts
        if isinstance(value, dict):
            return self._source(node, keys)
        if not isinstance(value, str):
            words = f"a dataset is {DATASET_IN_WORDS}; got {shape(node)}."
            return self.refuse(node, keys, words)
        if OBJECT_NAME.fullmatch(value) and not node.path.exists():
            return self.object(node, keys)
        if not node.path.is_file():
            words = f"there is no file {str(node.path)!r}.{hub_hint(value)}"
            return self.refuse(node, keys, words)
        if suffix_of(node.path) is None:
            words = f"a dataset's file must be {SUFFIXES_IN_WORDS}; got {value!r}."
            return self.refuse(node, keys, words)
        return str(node.path)

    def _source(self, node: Node, keys: Keys) -> Any:
        """A dataset that is a mapping with one of the keys of SOURCES."""
        kind = next((name for name in SOURCES if name in node.value), None)
        if kind is None:
            return self.refuse(node, keys, f"a dataset is {DATASET_IN_WORDS}; got {shape(node)}.")
        rest = {name: child for name, child in node.value.items() if name != kind}
        if kind == "open_assistant":
            return self._trees(node, rest, keys)
        if kind == "hub":
            return self.call(from_hub, node, keys)
        for name, child in rest.items():
            words = f"{name!r} does not go with {kind!r}; it stands alone."
            self.refuse(child, (*keys, name), words)
        inner = node.value[kind]
        if kind == "self_instruct":
            return self.settings(SelfInstruct, inner, (*keys, kind))
        if not isinstance(inner.value, str):
            words = f"this must be a stage's name; got {shape(inner)}."
            return self.refuse(inner, (*keys, kind), words)
        return from_stage(inner.value)

    def _trees(self, node: Node, rest: dict[str, Node], keys: Keys) -> Any:
        """A part of Open Assistant message trees; the file is read once for all parts of it."""
        part = rest.pop("part", None)
        if part is None or part.value not in PARTS:
            words = f"must be one of {', '.join(PARTS)}; got {shape(part) if part else 'none'}."
            return self.refuse(part or node, (*keys, "part"), words)
        file = node.value["open_assistant"]
        if not file.path.is_file():
            words = f"there is no file {str(file.path)!r}."
            return self.refuse(file, (*keys, "open_assistant"), words)
        rest["path"] = replace(file, value=str(file.path))
        if "trees" in rest:
            rest["trees"] = self._lines(rest["trees"], (*keys, "trees"))
        settings = repr({key: child.plain() for key, child in sorted(rest.items())})
        if settings not in self.trees:
            self.trees[settings] = self.call(open_assistant, replace(node, value=rest), keys)
        rows = self.trees[settings]
        return rows if rows is WRONG else getattr(rows, part.value)

    def _lines(self, node: Node, keys: Keys) -> Node:
        """[first, end] as a list of the lines from first to end - 1."""
        ends = node.plain()
        if not isinstance(ends, list) or len(ends) != 2 or not all(map(_is_line, ends)):
            words = "must be [first, end], lines counted from 0, such as [0, 70]"
            self.refuse(node, keys, f"{words}; got {shape(node)}.")
            return replace(node, value=None)
        return replace(node, value=[replace(node, value=line) for line in range(*ends)])


def _is_line(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def any_wrong(values: Iterable[Any]) -> bool:
    """Whether one of the values was refused."""
    return any(value is WRONG for value in values)


def shape(node: Node) -> str:
    """Words for a value in an error."""
    if isinstance(node.value, dict):
        return f"a mapping with {', '.join(map(repr, node.value)) or 'nothing in it'}"
    return f"{node.plain()!r:.100}"


def _known_part(node: Node, place: Keys) -> Keys:
    """The beginning of an error's place that the file has; the rest names a type of a union."""
    known: list[Any] = []
    for key in place:
        inner = node.at((key,))
        if inner is node:
            break
        node, known = inner, [*known, key]
    return tuple(known)
