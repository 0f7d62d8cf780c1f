"""A prompt is encoded once, for the check, the rehearsal and the run; and as of the run's date."""

from collections import Counter
from datetime import datetime

import pytest
import torch

from self_rewarding_lm import Run
from self_rewarding_lm.data.datasets import Rows
from self_rewarding_lm.data.rows import PromptRow
from tests.support.models import encode
from tests.test_trainer import PROMPTS, decode, external, self_reward, trainer_of


@pytest.mark.parametrize("kind", [external, self_reward])
@pytest.mark.parametrize("source", ["list", "file"])
def test_a_prompt_is_encoded_once_for_check_rehearsal_and_run(tmp_path, kind, source):
    encoded = Counter[str]()

    def counted(text):
        encoded[text] += 1
        return encode(text)

    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in PROMPTS))
    stage = kind(
        num_generated_preference_pairs=None, prompt_dataset=PROMPTS if source == "list" else path
    )
    run = trainer_of(tmp_path / "run", [stage], tokenizer_encode=counted)()
    assert len(run.prompts(0)) == len(PROMPTS)
    assert {text: encoded[text] for text in PROMPTS} == dict.fromkeys(PROMPTS, 1)
    assert [p.ids for p in run.prompts(0)] == [tuple(encode(text).tolist()) for text in PROMPTS]


def test_a_prompt_that_tells_the_date_is_that_of_the_day_when_the_run_began(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "begun", datetime(2001, 2, 3))
    dated = "{{ strftime_now('%Y') }}:{% for m in messages %}{{ m.content }}{% endfor %}"
    run = trainer_of(tmp_path, [external()], chat_template=dated)()
    assert {decode(torch.tensor(p.ids))[:5] for p in run.prompts(0)} == {"2001:"}


def test_a_kept_prompt_is_what_was_kept_until_it_is_forgotten():
    rows, prompt = Rows(["a", "b"], "rows"), PromptRow((1, 2**31), "a", None, {"n": 1})
    rows.keep_prompt(1, prompt)
    assert (rows.kept_prompt(0), rows.kept_prompt(1)) == (None, prompt)
    rows.forget_prompt(0)
    assert rows.kept_prompt(1) == prompt
    rows.forget_prompt(1)
    assert rows.kept_prompt(1) is None
