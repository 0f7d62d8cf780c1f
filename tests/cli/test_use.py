"""What is done with a stage of a run: merged, uploaded, talked to."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from self_rewarding_lm import Run, SelfRewardingTrainer, SFTConfig
from self_rewarding_lm.cli import main
from self_rewarding_lm.cli.chat import columns
from self_rewarding_lm.config import OptimConfig
from self_rewarding_lm.models.loading import lora_config
from self_rewarding_lm.text import printable
from tests.support.hf_models import tiny, word_tokenizer

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("peft")

ROWS = [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "m0"
    tokenizer = word_tokenizer()
    tiny("llama", vocab=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sft(name, rate):
    return SFTConfig(
        name=name,
        train_dataset=ROWS,
        num_train_steps=2,
        dropout=0.0,
        optim=OptimConfig(learning_rate=rate),
    )


@pytest.fixture(scope="module")
def adapted(base):
    """A run of two stages that train an adapter, with a chat template of its own."""
    config = lora_config(r=2, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    SelfRewardingTrainer(
        base,
        finetune_configs=[sft("first", 1e-2), sft("second", 5e-2)],
        peft_config=config,
        chat_template="chatml",
        checkpoints_folder=base.parent / "adapted",
        quiet=True,
    )(rehearse=False)
    return base.parent / "adapted"


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


# -- merge -----------------------------------------------------------------------------------------


def test_a_merged_stage_gives_the_adapters_logits_without_peft(adapted, tmp_path, capsys):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    ids = torch.arange(40, 60)[None]
    logits = {}
    for named, stage in (("", "second"), (":first", "first"), (":1", "first")):
        folder = tmp_path / f"merged{named.replace(':', '-')}"
        assert main(["merge", f"{adapted}{named}", str(folder)]) == 0
        assert f"the model of stage {stage}" in capsys.readouterr().out
        source = Run.open(adapted).weights(stage).parent
        with torch.no_grad():
            wanted = AutoPeftModelForCausalLM.from_pretrained(source)(ids).logits
            logits[named] = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(logits[named], wanted, rtol=1e-4, atol=1e-4)
        names = {file.name for file in folder.iterdir()}
        assert not {name for name in names if name.startswith("adapter")}
        template = AutoTokenizer.from_pretrained(folder).chat_template
        assert template == AutoTokenizer.from_pretrained(source).chat_template
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        assert ends == GenerationConfig.from_pretrained(source).eos_token_id is not None
        card = (folder / "README.md").read_text()
        assert f"# Stage {stage}" in card and "library_name: transformers" in card
    assert (logits[""] - logits[":first"]).abs().max() > 0.1
    assert torch.equal(logits[":1"], logits[":first"])


def test_a_merged_folder_has_the_type_that_is_asked_for(adapted, tmp_path):
    from transformers import AutoModelForCausalLM

    assert main(["merge", str(adapted), str(tmp_path / "m"), "--torch-dtype", "bf16"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_what_cannot_be_merged_is_said_and_nothing_is_written(adapted, base, tmp_path, capsys):
    whole = base.parent / "whole"
    SelfRewardingTrainer(
        base, finetune_configs=[sft("all", 1e-3)], checkpoints_folder=whole, quiet=True
    )(rehearse=False)
    told = refused(capsys, "merge", whole, tmp_path / "m")
    assert "stage 'all'" in told and "has no adapter to merge" in told
    assert str(whole / "01-all" / "model") in told
    assert "the run has no stage 'm9'" in refused(capsys, "merge", f"{adapted}:m9", tmp_path / "m")
    assert "holds no run" in refused(capsys, "merge", base, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert "mine exists and holds something" in refused(capsys, "merge", adapted, tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["file"]


def test_a_run_without_a_finished_stage_has_none_to_use(adapted, tmp_path, capsys):
    (tmp_path / "run.json").write_text((adapted / "run.json").read_text())
    told = refused(capsys, "merge", tmp_path, tmp_path / "m")
    assert "no stage of" in told and "is done yet" in told


# -- push ------------------------------------------------------------------------------------------


class StandIn:
    """The hub's client, which writes down what it is asked."""

    def __init__(self):
        self.asked = []

    def whoami(self):
        self.asked.append("whoami")

    def create_repo(self, name, *, private, exist_ok):
        self.asked.append((name, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path):
        from pathlib import Path

        self.asked.append((repo_id, sorted(file.name for file in Path(folder_path).iterdir())))
        return f"https://hub/{repo_id}"


@pytest.fixture
def client(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_token")
    return stand_in


def test_a_stage_is_pushed_with_its_card_privately_unless_it_is_public(adapted, client, capsys):
    assert main(["push", f"{adapted}:first", "owner/name"]) == 0
    assert capsys.readouterr().out == "https://hub/owner/name\n"
    who, made, (name, files) = client.asked
    assert (who, made, name) == ("whoami", ("owner/name", True, True), "owner/name")
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json"} <= set(files)
    assert main(["push", str(adapted), "owner/name", "--public"]) == 0
    assert client.asked[4] == ("owner/name", False, True)


def test_what_is_in_the_way_of_an_upload_is_told_before_it(adapted, client, capsys, monkeypatch):
    assert "is named OWNER/NAME; got 'name'" in refused(capsys, "push", adapted, "name")
    monkeypatch.setattr(Run, "weights", lambda *_: pytest.fail("the weights were read"))

    def out_of_reach():
        raise ConnectionError("no route")

    client.whoami = out_of_reach
    told = refused(capsys, "push", adapted, "owner/name")
    assert "the Hugging Face hub is not reached (ConnectionError: no route)" in told
    monkeypatch.setattr(hub, "get_token", lambda: None)
    told = refused(capsys, "push", adapted, "owner/name")
    assert "no token" in told and "`hf auth login`" in told and "HF_TOKEN" in told
    assert client.asked == []


def test_a_hub_that_refuses_is_told_in_its_own_words(adapted, client, capsys):
    class Refusal(hub.errors.HfHubHTTPError):
        def __init__(self):
            Exception.__init__(self, "403 Forbidden: no rights.")

    def refusing(*_, **__):
        raise Refusal

    client.create_repo = refusing
    told = refused(capsys, "push", adapted, "owner/name")
    assert "the Hugging Face hub refused: 403 Forbidden: no rights." in told
    assert "may write to 'owner/name'" in told


def test_no_hub_package_is_an_error_that_says_how_to_get_it(adapted, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "needs the package huggingface_hub" in refused(capsys, "push", adapted, "owner/name")


# -- chat ------------------------------------------------------------------------------------------


GREEDY = ["--sampling", "{temperature: 0, max_new_tokens: 5}"]


@pytest.fixture
def talk(monkeypatch, capsys):
    """Run `chat` with lines from a pipe; gives what it printed."""

    def talked(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return talked


def greedy(folder, *messages):
    """The text of five tokens that transformers gives after a conversation."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    asked = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt")
    ids = asked["input_ids"]
    new = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=ends)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def printed(text):
    return printable(text.strip())


def answers(told):
    """The answers of one model, without the words about what was cut off."""
    return [text.partition(" (cut off at 5 tokens)")[0] for text in told.rstrip("\n").split("\n\n")]


def test_chat_keeps_the_conversation_and_begins_another(adapted, talk):
    folder = Run.open(adapted).weights("second").parent
    first = greedy(folder, "say 3")
    told = answers(talk(["say 3", "", "say 1", "/new", "say 1"], adapted, *GREEDY))
    wanted = [first, greedy(folder, "say 3", first, "say 1"), greedy(folder, "say 1")]
    assert told == [printed(text) for text in wanted]
    assert told[1] != told[2]


def test_two_stages_are_asked_the_same(adapted, talk):
    told = talk(["say 3", "/quit", "say 1"], f"{adapted}:1", f"{adapted}:second", *GREEDY)
    run = Run.open(adapted)
    one, other = (printed(greedy(run.weights(s).parent, "say 3")) for s in ("first", "second"))
    assert one != other
    assert answers(told) == [f"{adapted}:1:\n{one}", f"{adapted}:second:\n{other}"]


def test_chat_without_a_template_says_that_questions_stand_alone(
    adapted, talk, monkeypatch, capsys
):
    told = answers(talk(["say 3", "say 3"], adapted, *GREEDY, "--chat-template", "raw"))
    assert told[0] == told[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("say 3\n"))
    assert main(["chat", str(adapted), *GREEDY, "--chat-template", "raw"]) == 0
    assert "earlier turns are not kept" in capsys.readouterr().err


def test_a_conversation_without_room_is_not_kept(adapted, talk):
    told = talk(["say " + "3" * 300, "say 3"], adapted, *GREEDY)
    first, second = told.rstrip("\n").split("\n", 1)
    assert "leaves no room for an answer in the 256" in first and "/new begins another" in first
    assert answers(second) == [printed(greedy(Run.open(adapted).weights("second").parent, "say 3"))]


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
def test_chat_at_a_terminal_ends_cleanly(adapted, monkeypatch, capsys, end):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    lines = iter(["say 3"])

    def typed(prompt):
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise end from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", str(adapted), *GREEDY]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("/quit or Ctrl-D ends") and told.out.endswith("\n\n\n")
    assert "Traceback" not in told.err


def test_two_answers_stand_in_columns_of_a_terminal():
    text = columns(["a:m1", "a:m2"], ["one two three four", "five\nsix"], 23)
    assert text.splitlines() == [
        "a:m1       | a:m2",
        "           |",
        "one two    | five",
        "three four | six",
    ]


def test_chat_asks_one_or_two_models(adapted, capsys):
    with pytest.raises(SystemExit):
        main(["chat", "a", "b", "c"])
    assert "one or two models are asked; got 3" in capsys.readouterr().err
    assert "the run has no stage 'm9'" in refused(capsys, "chat", f"{adapted}:m9")


# -- judge, compare --------------------------------------------------------------------------------

REWARD = """\
from self_rewarding_lm import RewardConfig

reward = RewardConfig(prompt_template="{{ prompt }} {{ response }}", parse_reward=len)
"""


@pytest.mark.parametrize(("stage", "number"), [(":first", "01-first"), ("", "02-second")])
def test_a_stage_judges_under_the_name_that_the_other_commands_take(
    adapted, stage, number, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("ranked.jsonl").write_text('{"prompt": "one", "replies": ["a b", "a"]}\n')
    Path("prompts.jsonl").write_text('{"prompt": "one"}\n')
    Path(f"reward_of_{number[:2]}.py").write_text(REWARD)
    judged = ["--reward", f"reward_of_{number[:2]}:reward", "--json", "--quiet"]
    judged += ["--judging", "{max_new_tokens: 12}"]
    weights = str(adapted / number / "model")
    compare = ["compare", weights, weights, "--prompts", "prompts.jsonl", *judged]
    compare += ["--sampling", "{max_new_tokens: 3}", "--judge-model"]
    for asked in (["judge", "--ranked", "ranked.jsonl", *judged, "--model"], compare):
        told = []
        for name in (weights, f"{adapted}{stage}"):
            assert main([*asked, name]) == 0
            told.append(json.loads(capsys.readouterr().out))
        assert told[0] == told[1]
