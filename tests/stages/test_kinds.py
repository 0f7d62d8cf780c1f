"""The rows of stages."""

import pkgutil
from importlib import import_module

from self_rewarding_lm import stages
from self_rewarding_lm.config import FinetuneConfig
from self_rewarding_lm.stages.kinds import STAGES


def test_every_stage_of_the_library_has_a_row_and_a_name_of_its_own_at_the_door():
    classes = set()
    for file in pkgutil.walk_packages(stages.__path__, f"{stages.__name__}."):
        for cls in vars(import_module(file.name)).values():
            if isinstance(cls, type) and issubclass(cls, FinetuneConfig):
                if "folder_name" in vars(cls) and cls is not FinetuneConfig:
                    classes.add(cls)
    assert set(STAGES) == classes
    assert len({stage.folder_name for stage in STAGES}) == len(STAGES)
    assert all(getattr(stages, stage.__name__) is stage for stage in STAGES)
