"""The model card: what it says of hand-made runs, its head as YAML, and what becomes of it on disk."""

import json
import re

import pytest
import yaml

from self_rewarding_lm import DPOConfig, Run, push_to_hub
from self_rewarding_lm.errors import StoreError
from self_rewarding_lm.report.card import card_text
from self_rewarding_lm.runs.atomic import ledger
from self_rewarding_lm.stages.kinds import STAGES
from tests.report.test_report import made_run, two_rounds
from tests.test_trainer import sft, trainer_of

PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4


def head_of(card: str) -> dict:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_a_card_tells_stages_data_numbers_and_limits(tmp_path):
    card = card_text(two_rounds(tmp_path / "run"), "one", tmp_path)
    assert head_of(card)["tags"] == ["self-rewarding-lm", "self-rewarding"]
    assert "| one | SelfRewardDPOConfig | sft |  | 2 |" in card
    assert "| two |" not in card  # it comes later
    assert "in 2 of 3 stages" in card
    assert "| Loss |  | 0.5 |" in card and "| Anchor: accuracy |  | 0.75 |" in card
    for words in ("## Limits", "load_weights(model, 'one')", "arXiv:2401.10020", "@software{"):
        assert words in card
    assert "2305.18290" not in card  # no settings say that there was a DPO loss


@pytest.mark.parametrize(
    ("settings", "cited"),
    [
        ({"dpo_beta": 0.1, "loss": "dpo"}, {"2305.18290"}),
        ({"dpo_beta": 0.1, "loss": "simpo", "nll_weight": 1.0}, {"2405.14734", "2404.19733"}),
        ({"dpo_beta": 0.1, "loss": [{"name": "ipo"}, "sppo"]}, {"2310.12036", "2405.00675"}),
        ({"dpo_beta": 0.1, "loss": "mine.loss"}, set()),
        ({"loss": "dpo"}, set()),
    ],
)
def test_what_was_used_is_cited(tmp_path, settings, cited):
    stage = {"config.json": {"stage": "DPOConfig", "settings": settings}}
    card = card_text(made_run(tmp_path / "run", {"dpo": stage}), "dpo", tmp_path)
    known = {"2305.18290", "2401.01335", "2404.19733", "2405.14734", "2310.12036", "2405.00675"}
    assert {paper for paper in known if paper in card} == cited


@pytest.mark.parametrize(
    ("files", "head"),
    [
        ({}, {"library_name": "pytorch"}),
        (
            {"config.json": {"_name_or_path": "owner/model-1"}},
            {"library_name": "transformers", "base_model": "owner/model-1"},
        ),
        ({"config.json": {"_name_or_path": "/home/me/model"}}, {"library_name": "transformers"}),
        ({"config.json": {"model_type": "llama"}}, {"library_name": "transformers"}),
        (
            {"adapter_config.json": {"base_model_name_or_path": "o/m"}, "config.json": {}},
            {"library_name": "peft", "base_model": "o/m"},
        ),
    ],
)
def test_the_head_names_library_and_base_model_where_they_are_known(tmp_path, files, head):
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    found = head_of(card_text(two_rounds(tmp_path / "run"), "sft", tmp_path))
    assert {k: v for k, v in found.items() if k in ("library_name", "base_model")} == head
    assert found.get("pipeline_tag") == (None if head["library_name"] == "pytorch" else "text-generation")  # fmt: skip


def test_names_cannot_break_the_card(tmp_path):
    hostile = "a|b\n# c <script>"
    settings = {"train_dataset": hostile, "init_from": hostile}
    stage = {"config.json": {"stage": hostile, "settings": settings}}
    card = card_text(made_run(tmp_path / "run", {"x": stage}), "x", tmp_path)
    assert "\n# c" not in card and "<script" not in card and "a\\|b # c &lt;script>" in card


def test_cards_stand_beside_weights_and_go_with_them_unless_they_were_changed(tmp_path):
    dpo = DPOConfig(train_dataset=PAIRS, dropout=0.0, num_train_steps=1)
    run = trainer_of(tmp_path, [sft(), dpo, sft(name="last")])()
    cards = [run.stage(i).path / "model" / "README.md" for i in range(3)]
    text = cards[1].read_text()
    assert "dpo" in head_of(text)["tags"] and "train_dataset: 4 rows given in place" in text
    assert "| Loss |" in text and "2305.18290" in text
    assert "model/README.md" in ledger(run.stage(1).path)
    cards[0].write_text("mine")
    trainer_of(tmp_path, [sft(), dpo, sft(name="last")], keep_stages=1)()
    assert cards[0].read_text() == "mine" and not cards[1].exists() and cards[2].exists()


def test_a_stage_is_uploaded_with_its_card_and_changed_weights_are_not(tmp_path):
    run = trainer_of(tmp_path, [sft()])()
    sent = []

    def upload(folder, repo_id, private):
        sent.append((sorted(p.name for p in folder.iterdir()), repo_id, private))
        return "https://hub/owner/name"

    assert push_to_hub(run, "sft", "owner/name", upload=upload) == "https://hub/owner/name"
    assert sent == [(["README.md", "model.safetensors"], "owner/name", True)]
    run.weights(0).write_bytes(b"damaged")
    with pytest.raises(StoreError, match="not the file that was written"):
        push_to_hub(Run.open(tmp_path), 0, "owner/name", upload=upload)
    assert len(sent) == 1


@pytest.mark.parametrize("kind", STAGES)
def test_a_card_follows_the_rows_of_stages(tmp_path, kind):
    """A stage's tag and the papers of its docstring, without a list of stages in the card."""
    stage = {"config.json": {"stage": kind.__name__, "settings": {}}}
    card = card_text(made_run(tmp_path / "run", {"x": stage}), "x", tmp_path)
    papers = re.findall(r"arXiv:(\d{4}\.\d{5})", kind.__doc__)
    assert all(f"arXiv:{paper}" in card for paper in papers)
    tags = [] if kind.hub_tag is None else [kind.hub_tag]
    assert head_of(card)["tags"] == ["self-rewarding-lm", *tags]
