"""What `from self_rewarding_lm import ...` finds, and what it says of what was moved."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

import self_rewarding_lm
from self_rewarding_lm.config import FinetuneConfig
from self_rewarding_lm.judges import kinds as judge_kinds
from self_rewarding_lm.moved import MODULES, NAMES, PACKAGE
from self_rewarding_lm.stages import kinds as stage_kinds
from tests.support import public_names

OF_VERSION_0_1_0 = """
    PAPER_REWARD_CONFIG TEN_POINT_REWARD_CONFIG BuildEFTConfig Candidate Check ChecksConfig
    Comparison ComparisonConfig ConsistencyConfig Contrast ContrastiveDPOConfig DPOConfig
    Demonstration EMAReference EnsembleJudge ExternalRewardDPOConfig FinetuneConfig FunctionJudge
    HeldOutReward ImplicitJudge Interrupted JudgeAnchor JudgeEvaluation Judgement LocalEngine
    LossConfig MetaJudgement MetaJudgingConfig MetaRewardDPOConfig MixedReference ModuleJudge
    OpenAssistant OptimConfig PairBatch PairingConfig PairwiseJudge PreferencePair Prompt
    RankedReplies RewardConfig RewardModelJudge Run SFTConfig SPINTrainer SamplingConfig
    SelfInstruct SelfJudge SelfPlayConfig SelfRewardDPOConfig SelfRewardSFTConfig
    SelfRewardingError SelfRewardingTrainer ServerEngine ServerJudge TemporalDPOConfig
    VerifierAccuracy VoteJudge WinRateOverLast compare create_default_paper_config
    create_mock_dataset evaluate_judge from_stage generate import_checkpoint load_causal_lm
    measure_responses open_assistant paper_recipe push_to_hub reads reasoning_task write_report
"""
SINCE = """
    Advantage Callback CallableTokenizer CertaintyJudge Judge JudgeError MarkedRubric PairingError
    SelfRewardGRPOConfig ShuffledJudge StepComparisonConfig StepwiseDPOConfig from_hub read_recipe
    read_yaml wilson_interval
"""


def test_all_names_of_version_0_1_0_are_there_and_those_that_docs_imported_deeply():
    assert sorted(self_rewarding_lm.__all__) == sorted(f"{OF_VERSION_0_1_0} {SINCE}".split())
    assert dir(self_rewarding_lm) == sorted([*self_rewarding_lm.__all__, "__version__"])
    for name in self_rewarding_lm.__all__:
        found = getattr(self_rewarding_lm, name)
        assert getattr(found, "__name__", name) == name
    everything = {}
    exec("from self_rewarding_lm import *", everything)
    assert everything.keys() >= set(self_rewarding_lm.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = self_rewarding_lm.nothing


def test_importing_the_package_imports_neither_torch_nor_a_room():
    code = (
        "import sys, self_rewarding_lm\n"
        "from self_rewarding_lm import cli\n"
        "assert not hasattr(self_rewarding_lm, 'nothing')\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert 'self_rewarding_lm.stages' not in sys.modules, 'stages'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_row_is_enough_for_a_stage_to_be_public(monkeypatch):
    class NewStage(FinetuneConfig):
        """A stage that was added."""

        folder_name: ClassVar[str] = "new"

    monkeypatch.setattr(stage_kinds, "STAGES", (*stage_kinds.STAGES, NewStage))
    assert self_rewarding_lm.NewStage is NewStage
    assert "NewStage" in self_rewarding_lm.__all__ and "NewStage" in dir(self_rewarding_lm)
    assert f"from {__name__} import NewStage\n" in public_names.stub()


def test_a_row_is_enough_for_a_judge_to_be_public(monkeypatch):
    class NewJudge(self_rewarding_lm.Judge):
        """A judge that was added."""

    monkeypatch.setattr(judge_kinds, "JUDGES", (*judge_kinds.JUDGES, NewJudge))
    assert self_rewarding_lm.NewJudge is NewJudge
    assert "NewJudge" in self_rewarding_lm.__all__ and "NewJudge" in dir(self_rewarding_lm)
    assert f"from {__name__} import NewJudge\n" in public_names.stub()


def test_the_names_that_editors_read_are_those_of_the_rows():
    assert public_names.PATH.read_text() == public_names.stub(), (
        "run python -m tests.support.public_names"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("votes", "Import from self_rewarding_lm.judges.votes."),
        ("adapters.key_values", "self_rewarding_lm.models.attention (adapters.key_values)"),
        ("stages.positive", "Import from self_rewarding_lm.stages.self_reward_sft."),
        ("rehearsal", "self_rewarding_lm.stages.rehearsal; self_rewarding_lm.training.fit (Trial)"),
    ],
)
def test_an_old_module_is_an_error_that_names_the_new_place(old, new):
    with pytest.raises(ImportError) as error:
        importlib.import_module(f"self_rewarding_lm.{old}")
    assert new in str(error.value)


@pytest.mark.parametrize(
    ("statement", "file"),
    [
        (
            "from self_rewarding_lm.judging import mean_score",
            "self_rewarding_lm.scores (ParsedScore",
        ),
        ("from self_rewarding_lm.judging import parse_score", "self_rewarding_lm.judges.parsing"),
        ("from self_rewarding_lm import votes", "self_rewarding_lm.judges.votes"),
        (
            "from self_rewarding_lm.judges import reward_scores",
            "self_rewarding_lm.judges.functions",
        ),
        ("from self_rewarding_lm.judges import form_of", "self_rewarding_lm.judges.self_judge"),
        (
            "from self_rewarding_lm.recipes import paper_config_of",
            "self_rewarding_lm.recipes.paper",
        ),
        ("from self_rewarding_lm.report import report_at_end", "self_rewarding_lm.report.page"),
    ],
)
def test_a_name_of_an_old_module_is_an_error_that_names_its_file(statement, file):
    with pytest.raises(ImportError, match="was moved") as error:
        exec(statement)
    assert file in str(error.value)


def test_a_module_that_never_was_is_the_error_of_python():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'self_rewarding_lm\.nothing'"):
        importlib.import_module("self_rewarding_lm.nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from self_rewarding_lm.judges import nothing")


def test_the_new_places_are_there():
    package = Path(self_rewarding_lm.__file__).parent
    files = {*MODULES.values(), *(file for names in NAMES.values() for file in names)}
    for file in files:
        path = package / file.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), file
    assert package.name == PACKAGE


def test_package_setup_citation_and_changelog_name_the_same_version():
    root = Path(self_rewarding_lm.__file__).parents[1]
    version = self_rewarding_lm.__version__
    for file, line in (
        ("setup.py", f'    version="{version}",'),
        ("CITATION.cff", f"version: {version}"),
    ):
        assert line in (root / file).read_text().splitlines(), file
    titles = [s for s in (root / "CHANGELOG.md").read_text().splitlines() if s.startswith("## ")]
    assert titles[0] == f"## {version}"
