"""A recipe in a file, or in flags: what the trainer is given, checked in full before any work.

Where a value is wrong, its key and line are named together with what is allowed; all wrong values
are told at once. A relative path starts at the folder of the recipe file (of a flag: at the current
folder). Objects (functions, modules, classes) are named `package.module:attribute`; modules are
looked for in that folder too.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from self_rewarding_lm.adapters.named import load_tokenizer, lora_config
from self_rewarding_lm.config import FinetuneConfig, RewardConfig
from self_rewarding_lm.errors import ConfigError, SelfRewardingError
from self_rewarding_lm.recipe_reader import OBJECT_NAME, WRONG, Keys, Reader, any_wrong, shape
from self_rewarding_lm.recipe_settings import (
    RUBRICS,
    STAGE_KINDS,
    LoraSettings,
    RecipeSettings,
    RubricSettings,
)
from self_rewarding_lm.recipe_yaml import Node
from self_rewarding_lm.recipes import paper_recipe
from self_rewarding_lm.settings import model_of
from self_rewarding_lm.stages.preference import OWN
from self_rewarding_lm.trainer import SelfRewardingTrainer, stage_names

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
NESTED = ("paper", "stages", "reward_prompts")


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

    def trainer(self, *, quiet: bool = False) -> SelfRewardingTrainer:
        """The trainer of the recipe; this loads the model."""
        model, tokenizer = self.model, self.tokenizer
        if not isinstance(model, str | nn.Module):
            model = model()
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        peft = None if self.peft is None else lora_config(**dict(self.peft))
        return SelfRewardingTrainer(
            model, tokenizer=tokenizer, peft_config=peft, quiet=quiet, **self.arguments
        )


def read_recipe(root: Node) -> Recipe:
    """The recipe of the mapping at the top of a file.

    Raises ConfigError that names every wrong value. Reads the data and imports the modules that
    the recipe names; loads no model.
    """
    reader = RecipeReader()
    recipe = reader.recipe(root)
    if reader.problems:
        count = len(reader.problems)
        words = "one value is" if count == 1 else f"{count} values are"
        lines = "\n".join(f"  {problem}" for problem in reader.problems)
        raise ConfigError(f"the recipe cannot be run; {words} wrong:\n{lines}")
    return recipe


class RecipeReader(Reader):
    """A reader that knows what stands at the top of a recipe."""

    def recipe(self, root: Node) -> Any:
        items = self.mapping(root, ())
        nested = {name: child for name, child in items.items() if name in NESTED}
        rest = {name: child for name, child in items.items() if name not in NESTED}
        top = self.settings(RecipeSettings, Node(rest, root.place, root.folder), ())
        stages: Any = WRONG
        if ("paper" in nested) == ("stages" in nested):
            words = "give paper (settings of the paper's stages) or stages (a list), one of them."
            self.refuse(root, (), words)
        if "paper" in nested:
            stages = self._paper(nested["paper"], ("paper",))
        elif "stages" in nested:
            stages = self._stages(nested["stages"], ("stages",))
        rewards = self._rewards(nested.get("reward_prompts"), ("reward_prompts",))
        if stages is not WRONG and rewards is not WRONG:
            self._check_names(stages, root, rewards)
        model = self.model(items["model"], ("model",)) if "model" in items else WRONG
        tokenizer = self.tokenizer(items.get("tokenizer"), ("tokenizer",))
        if top is WRONG or self.problems:
            return WRONG
        out = items["out"].folder if "out" in items else root.folder
        taken = ("chat_template", "torch_dtype", "device_map", "load_in_4bit", "merge_adapter")
        taken = (*taken, "keep_stages", "report", "eos_id", "seed")
        arguments = {
            **{name: getattr(top, name) for name in taken},
            "finetune_configs": stages,
            "self_reward_prompt_config": rewards,
            "checkpoints_folder": out / Path(top.out).expanduser(),
            "accelerate_kwargs": top.accelerate,
        }
        return Recipe(model, tokenizer, top.peft, arguments)

    def _paper(self, node: Node, keys: Keys) -> Any:
        """The stages of paper_recipe."""
        items = dict(self.mapping(node, keys))
        positive = "positive_only" in items and items["positive_only"].value is True
        parts = {
            "sft": STAGE_KINDS["sft"],
            "eft": STAGE_KINDS["eft"],
            "self_reward": STAGE_KINDS["self_reward_sft" if positive else "self_reward"],
        }
        given = {}
        for name, kind in parts.items():
            if name in items:
                given[name] = self.part(kind, items.pop(name), (*keys, name))
        rounds = items.get("prompts")
        if rounds is not None and isinstance(rounds.value, dict) and "rounds" in rounds.value:
            given["prompts"] = self._a_dataset_a_round(items.pop("prompts"), (*keys, "prompts"))
        rest = Node(items, node.place, node.folder)
        made = self.settings(model_of(paper_recipe), rest, keys, filled=given)
        if made is WRONG:
            return WRONG
        try:
            return paper_recipe(**{name: getattr(made, name) for name in made.model_fields_set})
        except SelfRewardingError as error:
            return self.refuse(node, keys, str(error))

    def _a_dataset_a_round(self, node: Node, keys: Keys) -> Any:
        rounds = node.value["rounds"]
        if len(node.value) > 1 or not isinstance(rounds.value, list):
            words = f"datasets by round are {{rounds: [first, second]}}; got {shape(node)}."
            return self.refuse(node, keys, words)
        found = [self.dataset(n, (*keys, "rounds", i)) for i, n in enumerate(rounds.value)]
        return WRONG if any_wrong(found) else tuple(found)

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
        return self.settings(cls, Node(items, node.place, node.folder), keys)

    def _rewards(self, node: Node | None, keys: Keys) -> Any:
        """Reward prompts by name; what a rubric's settings leave out is the library's own."""
        found: dict[str, Any] = {"default": RUBRICS["paper"]}
        for name, child in (self.mapping(node, keys) if node is not None else {}).items():
            found[name] = self.reward(child, (*keys, name))
        return WRONG if any_wrong(found.values()) else found

    def reward(self, node: Node, keys: Keys) -> Any:
        """One reward prompt."""
        items = self.mapping(node, keys)
        if "prompt_template" in items:
            return self.settings(RewardConfig, node, keys)
        rubric = items["rubric"].value if "rubric" in items else "paper"
        base = RUBRICS.get(rubric if isinstance(rubric, str) else "", RUBRICS["paper"])
        filled = {name: getattr(base, name) for name in base.model_fields_set}
        made = self.settings(RubricSettings, node, keys, filled=filled)
        if made is WRONG:
            return WRONG
        return RewardConfig(
            **{name: getattr(made, name) for name in {*filled, *items} - {"rubric"}}
        )

    def _check_names(
        self, stages: Sequence[FinetuneConfig], root: Node, rewards: Mapping[str, Any]
    ) -> None:
        """Stages, weights and reward prompts that other settings name must be there."""
        try:
            names = stage_names(stages)
        except ConfigError as error:
            self.refuse(root.at(("stages",)), ("stages",), str(error))
            return
        for place, stage in enumerate(stages):
            keys = ("stages", place)
            earlier = ", ".join(names[:place]) or "none"
            for source, node, where in self.sources:
                used = any(_holds(data, source) for data in stage.datasets().values())
                if used and source.stage not in names[:place]:
                    words = f"must name an earlier stage (there is: {earlier}); got {shape(node)}."
                    self.refuse(node, where, words)
            named = {"init_from": ("previous",), "fit_from": ("current",), "reference": OWN}
            for name, own in {**named, "rejected_from": ("null",)}.items():
                start = getattr(stage, name, own[0])
                if start in (*own, "initial", *names[:place]) or not isinstance(start, str | Path):
                    continue
                if Path(start).exists():
                    continue
                words = f"must be {', '.join(own)}, initial, an earlier stage ({earlier}) or a path"
                where = (*keys, name)
                self.refuse(root.at(where), where, f"{words}; got {str(start)!r}.")
            asked = getattr(stage, "self_reward_config_keyname", ())
            for reward in (asked,) if isinstance(asked, str) else asked:
                if reward not in rewards:
                    where = (*keys, "self_reward_config_keyname")
                    words = f"must be one of reward_prompts ({', '.join(rewards)}); got {reward!r}."
                    self.refuse(root.at(where), where, words)

    def model(self, node: Node, keys: Keys) -> Any:
        """A folder, a file, a name on the hub, or an object."""
        name = node.value
        if not isinstance(name, str):
            return WRONG  # said already
        path = node.folder / Path(name).expanduser()
        if path.exists():
            return str(path)
        if OBJECT_NAME.fullmatch(name):
            found = self.object(node, keys)
            if found is not WRONG and not callable(found):
                words = f"must be a torch module or a function; got {type(found).__name__}."
                return self.refuse(node, keys, words)
            return found
        if not HUB_NAME.fullmatch(name) or name.startswith(".") or name.endswith(".gguf"):
            return self.refuse(node, keys, f"there is no file or folder {str(path)!r}.")
        return name

    def tokenizer(self, node: Node | None, keys: Keys) -> Any:
        """A folder, a name on the hub, or an object; None where nothing is said."""
        if node is None or not isinstance(node.value, str):
            return None
        path = node.folder / Path(node.value).expanduser()
        if not path.exists() and OBJECT_NAME.fullmatch(node.value):
            return self.object(node, keys)
        return str(path) if path.exists() else node.value


def _holds(dataset: Any, source: Any) -> bool:
    """Whether a dataset is `source`, or has it among its parts or as the seeds of new prompts."""
    parts = [*dataset] if isinstance(dataset, list) else [dataset]
    parts += [getattr(part, "seed_dataset", None) for part in parts]
    return any(part is source for part in parts)
