"""The command: a whole run of a tiny Hugging Face model, what it shows and exports, its errors."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from self_rewarding_lm.cli import main, make_parser
from self_rewarding_lm.cli.recipe_flags import recipe_root
from self_rewarding_lm.models import inference
from self_rewarding_lm.recipes.reader import read_recipe
from self_rewarding_lm.records import (
    Demonstration,
    Judgement,
    PreferencePair,
    Prompt,
    TrainingRow,
    to_json,
)
from self_rewarding_lm.runs.run import Run
from tests.support.hf_models import tiny, word_tokenizer
from tests.support.ones import ones_as_several

OBJECTS = """\
from pathlib import Path
from self_rewarding_lm.judges.functions import FunctionJudge

STOP = Path(__file__).parent / "stop"


def length(prompts, completions):
    if STOP.exists() and prompts[0] == "tell 2":
        STOP.unlink()
        raise KeyboardInterrupt
    return [float(len(text)) for text in completions]


def ends(logits):
    '''The end of a turn is as likely as the likeliest token.'''
    more = logits.clone()
    more[:, 4] = logits.max(dim=-1).values
    return more


judge = FunctionJudge(length)
"""
RECIPE = """\
model: m0
out: run
chat_template: chatml
reward_prompts:
  default:
    prompt_template: "{{ prompt }} {{ response }}"
    reward_regex_template: "Score: {{ reward }}"
    score_range: [0, 5]
paper:
  ift: ift.jsonl
  ranked: ranked.jsonl
  prompts: prompts.jsonl
  iterations: 1
  num_generated_preference_pairs: [3]
  num_candidate_responses: 3
  max_new_tokens: 6
  batch_size: 4
  sft: {num_train_steps: 2, optim: {learning_rate: 1e-3}}
  eft: {method: ranks}
  self_reward:
    judge: my_judge:judge
    prompts_per_block: 2
    generation: {filter_fn: my_judge:ends}
"""


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m0"
    tokenizer = word_tokenizer()
    tiny("llama", vocab=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def made_folder(folder, model_folder):
    """A recipe with its data, its objects and its model."""
    write_lines(
        folder / "ift.jsonl", [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(6)]
    )
    write_lines(
        folder / "ranked.jsonl",
        [{"prompt": f"say {i}", "replies": [f"{i}", "no"]} for i in range(2)],
    )
    write_lines(folder / "prompts.jsonl", [{"prompt": f"tell {i}"} for i in range(8)])
    (folder / "my_judge.py").write_text(OBJECTS)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "m0").symlink_to(model_folder)
    return folder


@pytest.fixture
def folder(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # a recipe's folder is added to it
    monkeypatch.delitem(sys.modules, "my_judge", raising=False)
    return made_folder(tmp_path, model_folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory, model_folder):
    """The run of the recipe, for tests that read it."""
    folder = made_folder(tmp_path_factory.mktemp("done"), model_folder)
    before, path = sys.modules.pop("my_judge", None), [*sys.path]
    assert main(["run", str(folder / "recipe.yaml"), "--quiet"]) == 0
    sys.path[:] = path
    sys.modules.pop("my_judge")
    if before is not None:
        sys.modules["my_judge"] = before
    return folder / "run"


# -- run -------------------------------------------------------------------------------------------


def test_a_recipe_runs_from_m0_to_m2(done):
    run = Run.open(done)
    assert run.stages == ["sft_baseline", "eft", "m1", "m2"]
    assert all(run.is_done(stage) for stage in run.stages)
    assert len(run.pairs("m2")) == 3
    assert len(run.rows("m1")) == 6 + len(run.demonstrations("eft")) == 6 + 4
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(done / "04-m2" / "model")
    m0 = AutoModelForCausalLM.from_pretrained(done.parent / "m0")
    assert not torch.equal(model.lm_head.weight, m0.lm_head.weight)
    template = AutoTokenizer.from_pretrained(done / "04-m2" / "model").chat_template
    assert "im_start" in template


def test_a_run_that_was_interrupted_goes_on_with_the_same_command(folder, done, capsys):
    (folder / "stop").touch()
    command = ["run", str(folder / "recipe.yaml"), "--quiet"]
    assert main(command) == 130
    assert "stopped; the same command resumes this run." in capsys.readouterr().err
    half = Run.open(folder / "run")
    assert half.is_done("m1") and not half.is_done("m2")
    assert main(command) == 0
    straight, resumed = Run.open(done).pairs("m2"), half.pairs("m2")
    assert [pair.chosen_ids for pair in resumed] == [pair.chosen_ids for pair in straight]
    assert [pair.rejected_ids for pair in resumed] == [pair.rejected_ids for pair in straight]


def test_flags_alone_are_a_recipe(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    flags = ["--model", "m0", "--ift", "ift.jsonl", "--prompts", "{rounds: [prompts.jsonl]}"]
    more = ["--iterations", "1", "--out", "flags", "--seed", "3", "--judge-mode", "expected"]
    assert main(["run", *flags, *more, "--ranked", "ranked.jsonl", "--check"]) == 0
    told = capsys.readouterr().out
    assert "4 stages" in told and "sft_baseline, eft, m1, m2" in told
    assert str(folder / "flags") in told
    assert not (folder / "flags").exists()


def test_flags_stand_above_the_recipe(folder, capsys):
    recipe = str(folder / "recipe.yaml")
    assert main(["run", recipe, "--check", "--iterations", "3", "--set", "paper.ranked=null"]) == 0
    assert "4 stages" in capsys.readouterr().out  # m1, m2, m3, m4: no ranked replies, no EFT
    numbers = ["--pairs", "[5, 7]", "--max-new-tokens", "9", "--batch-size", "3"]
    options = make_parser().parse_args(["run", recipe, "--iterations", "2", *numbers])
    m2, m3 = read_recipe(recipe_root(options)).stages[-2:]
    assert [m2.num_generated_preference_pairs, m3.num_generated_preference_pairs] == [5, 7]
    assert (m2.generation.max_new_tokens, m2.optim.batch_size) == (9, 3)
    options = make_parser().parse_args(["run", recipe, "--pairs", "6"])
    assert read_recipe(recipe_root(options)).stages[-1].num_generated_preference_pairs == 6


def test_check_tries_every_stage_and_begins_nothing(folder, capsys):
    recipe = str(folder / "recipe.yaml")
    assert main(["check", recipe]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:4] == [
        "  sft_baseline: well",
        "  eft: well",
        "  m1: well; train_dataset: a stand-in",
        "  m2: well",
    ]
    assert told[4].startswith("The recipe is in order: 4 stages")
    assert told[5].startswith("generation: ") and told[6].startswith("training: ")
    assert not (folder / "run").exists()
    default = ["--set", "paper.num_generated_preference_pairs=null"]
    once = "8 prompts, each used once: too few for the 3,964 pairs of the"
    assert main(["check", recipe, *default]) == 0
    assert f"  m2: well; {once}" in capsys.readouterr().out
    assert main(["plan", recipe, "--no-times", *default]) == 0
    assert f"  note: {once}" in capsys.readouterr().out


def test_check_and_plan_say_that_products_in_bfloat16_are_not_used(folder, capsys, monkeypatch):
    monkeypatch.setattr(inference, "WORTH", 1000)
    monkeypatch.setattr(inference, "_has_products", lambda dtype: dtype == torch.bfloat16)
    words = "instructions for products in bfloat16 that are not used"
    for command in (["check"], ["plan", "--no-times"]):
        more = ["--set", "paper.ranked=null", "--set", "accelerate.cpu=true"]
        recipe = [command[0], str(folder / "recipe.yaml"), *command[1:], *more]
        assert main(recipe) == 0
        assert words in " ".join(capsys.readouterr().out.split())
        assert main([*recipe, "--set", "accelerate.mixed_precision=bf16"]) == 0
        assert words not in " ".join(capsys.readouterr().out.split())


def test_check_names_the_stage_whose_function_raises_and_run_does_not_begin(folder, capsys):
    judge = folder / "my_judge.py"
    judge.write_text(
        judge.read_text().replace("return [float", "return [1 / 0 for _ in prompts] or [float")
    )
    for command in ("check", "run"):
        assert main([command, str(folder / "recipe.yaml")]) == 1
        told = capsys.readouterr()
        assert told.out == ""
        assert "raised ZeroDivisionError: division by zero" in told.err
        assert "(Rehearsal of stage 'm2': nothing was started." in told.err
    assert not list((folder / "run").glob("*/*"))


def test_flags_train_an_adapter(folder):
    peft = pytest.importorskip("peft")
    recipe = str(folder / "recipe.yaml")
    small = ["--set", "paper.ranked=null", "--iterations", "0", "--quiet"]
    assert main(["run", recipe, "--lora-rank", "2", *small]) == 0
    saved = folder / "run" / "01-m1" / "model"
    assert peft.PeftConfig.from_pretrained(saved).r == 2
    assert (saved / "adapter_model.safetensors").exists()


def test_overwrite_starts_anew(folder, capsys):
    small = ["--set", "paper.ranked=null", "--iterations", "0", "--quiet"]
    command = ["run", str(folder / "recipe.yaml"), *small]
    assert main(command) == 0
    assert main([*command, "--set", "paper.batch_size=2"]) == 1
    assert "overwrite" in capsys.readouterr().err
    assert main([*command, "--set", "paper.batch_size=2", "--overwrite"]) == 0


def test_all_settings_are_printed_as_a_recipe(capsys):
    from self_rewarding_lm.recipes.settings_file import recipe_text

    assert main(["run", "--settings"]) == 0
    first, rest = capsys.readouterr().out.split("\n", 1)
    assert rest == recipe_text()
    schema = Path(first.removeprefix("# yaml-language-server: $schema="))
    assert schema.is_absolute() and main(["schema"]) == 0
    assert capsys.readouterr().out == schema.read_text()


def test_one_of_each_is_nowhere_spoken_of_as_several(folder, capsys, caplog):
    """One row, one prompt, one pair, one step: what commands print, log and write."""
    write_lines(folder / "ift.jsonl", [{"prompt": "say 1", "completion": "one"}])
    write_lines(folder / "ranked.jsonl", [{"prompt": "say 1", "replies": ["one", "no"]}])
    write_lines(folder / "prompts.jsonl", [{"prompt": "tell 1"}])
    recipe = str(folder / "recipe.yaml")
    caplog.set_level(logging.INFO, "self_rewarding_lm")
    few = ["--pairs", "[1]", "--set", "paper.sft.num_train_steps=1"]
    run = str(folder / "run")
    told, commands = (
        "",
        [
            ["preview", recipe, *few],
            ["plan", recipe, "--no-times", *few],
            ["check", recipe, *few],
            ["run", recipe, *few],
            ["run", recipe, *few],
            ["show", run],
            ["report", run],
            ["export", run, "--stage", "m2", "--to", str(folder / "pairs.jsonl")],
        ],
    )
    for command in commands:
        assert main(command) == 0
        told += "".join(capsys.readouterr())
    told += caplog.text
    for words in ("1 prompt,", "3 candidates", "1 pair;", "1 row, 1 step", "1 row of stage m2"):
        assert words in told
    told += repr(Run.open(run)) + (folder / "run" / "report.html").read_text()
    told += "".join(path.read_text() for path in (folder / "run").glob("*/*/README.md"))
    assert not ones_as_several(told)


# -- errors ----------------------------------------------------------------------------------------


def test_an_error_is_one_message_without_a_traceback(folder, capsys):
    recipe = str(folder / "recipe.yaml")
    assert main(["run", recipe, "--iterations", "many"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("self-rewarding-lm: error: the recipe cannot be run;")
    assert "--iterations: paper.iterations: Input should be a valid integer" in told.err
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["run", "nothing.yaml"], "nothing.yaml cannot be read"),
        (["run", "--set", "seed"], "--set takes KEY=VALUE, such as paper.batch_size=8; got 'seed'"),
        (["run", "--set", "seed=[1"], "--set seed: this is not valid YAML"),
        (["show", "nothing"], "nothing holds no run"),
        (["export", "nothing", "--stage", "m2", "--to", "x.jsonl"], "nothing holds no run"),
        (["plan", "nothing.yaml"], "nothing.yaml cannot be read"),
        (["check", "nothing.yaml"], "nothing.yaml cannot be read"),
        (["plan", "nothing.yaml", "--device-memory", "much"], "such as 24GB; got 'much'"),
    ],
)
def test_wrong_values_end_with_status_1(command, words, capsys):
    assert main(command) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["check"],
        ["runs"],
        ["run", "--iteratons", "2"],
        ["export", "run"],
        ["show"],
        ["plan"],
    ],
)
def test_wrong_usage_ends_with_status_2(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert "usage: self-rewarding-lm" in capsys.readouterr().err


def test_help_needs_no_torch_and_names_every_flag():
    code = (
        "import sys\n"
        "from self_rewarding_lm.cli import main\n"
        "try:\n    main(['run', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for flag in ("--model", "--ift", "--ranked", "--prompts", "--iterations", "--out", "--set"):
        assert flag in told.stdout


def test_show_needs_no_torch(done):
    code = (
        "import sys\n"
        "from self_rewarding_lm.cli import main\n"
        f"assert main(['show', {str(done)!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'safetensors', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_schema_needs_no_torch():
    code = (
        "import sys\n"
        "from self_rewarding_lm.cli import main\n"
        "assert main(['schema']) == 0\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(told.stdout)["properties"]["model"]["type"] == "string"


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "self_rewarding_lm", "show", "nothing"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert told.stderr.startswith("self-rewarding-lm: error: nothing holds no run")


# -- show ------------------------------------------------------------------------------------------


def test_show_prints_the_stages_their_numbers_and_a_prompt_with_what_became_of_it(done, capsys):
    assert main(["show", str(done), "--prompts", "1"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    run = Run.open(done)
    losses = [m["loss"] for m in run.metrics("m1") if "loss" in m]
    (m1,) = [line for line in lines if line.startswith("3 m1")]
    assert f"{losses[0]:.3f} -> {losses[-1]:.3f}" in m1 and "done" in m1
    (m2,) = [line for line in lines if line.startswith("4 m2")]
    assert m2.split()[4] == "3"  # pairs
    pair = run.pairs("m2")[0]
    shown = lines[lines.index(pair.id) :]
    assert shown[1] == f"prompt    {pair.prompt}"
    assert sum(line.startswith("chosen") for line in shown) == 1
    assert sum(line.startswith("rejected") for line in shown) == 1
    assert f"          score {pair.chosen_score:.4g} (length, given)" in shown


def test_show_prints_one_stage_by_name_or_number(done, capsys):
    assert main(["show", str(done), "--stage", "eft", "--prompts", "2"]) == 0
    by_name = capsys.readouterr().out
    assert main(["show", str(done), "--stage", "2", "--prompts", "2"]) == 0
    assert capsys.readouterr().out == by_name
    assert by_name.count("learnt    Score: 5") == 1 and by_name.count("learnt    Score: 0") == 1
    assert "3 m1" not in by_name
    assert main(["show", str(done), "--stage", "m7"]) == 1


def test_show_reads_a_run_that_is_not_done(folder, capsys):
    (folder / "stop").touch()
    assert main(["run", str(folder / "recipe.yaml"), "--quiet"]) == 130
    capsys.readouterr()
    assert main(["show", str(folder / "run")]) == 0
    text = capsys.readouterr().out
    (m2,) = [line for line in text.splitlines() if line.startswith("4 m2")]
    assert m2.split()[2] == "begun"
    assert "tell 0" in text  # a prompt that was answered and judged before


def test_show_steers_no_terminal(done, tmp_path, capsys):
    """A response may hold any character."""
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(done, copy)
    path = copy / "04-m2" / "candidates.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [{**row, "text": "a\x1b[31mb\nc"} for row in rows])
    path.with_name("files.json").unlink()  # nobody vouches for the files
    assert main(["show", str(copy)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "a�[31mb c" in text


# -- plan ------------------------------------------------------------------------------------------


def planned(folder, capsys, *more):
    """A plan of the recipe as JSON, its stages by name."""
    recipe = str(folder / "recipe.yaml")
    assert main(["plan", recipe, "--json", "--no-times", *more]) == 0
    plan = json.loads(capsys.readouterr().out)
    return plan, {stage["name"]: stage for stage in plan["stages"]}


def within(number, bounds):
    most = bounds["most"]
    return bounds["least"] <= number and (most is None or number <= most)


def test_plan_prints_a_table_a_stage_and_the_totals_last(folder, capsys):
    assert main(["plan", str(folder / "recipe.yaml")]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert max(map(len, lines)) <= 100
    model = tiny("llama", vocab=len(word_tokenizer()), max_position_embeddings=256)
    assert (
        f"LlamaForCausalLM: {sum(p.numel() for p in model.parameters()):,} parameters" in told.out
    )
    assert [line for line in lines if line.startswith("stage ")] == [
        "stage 1 of 4: sft_baseline (SFTConfig)",
        "stage 2 of 4: eft (BuildEFTConfig)",
        "stage 3 of 4: m1 (SFTConfig)",
        "stage 4 of 4: m2 (SelfRewardDPOConfig)",
    ]
    assert "GFLOP/s" in told.out and "not counted: its judge is an object" in told.out
    assert lines[-2].startswith("Peak memory: ") and lines[-1].startswith("Disk: ")
    assert "stage m" in lines[-2]
    assert not (folder / "run").exists()


def test_a_plan_holds_what_the_run_then_does(folder, done, capsys):
    plan, stages = planned(folder, capsys)
    run = Run.open(done)
    for name, stage in stages.items():
        work = stage["work"]
        if name != "eft":  # its candidates are people's replies
            assert within(len(run.candidates(name)), work["candidates"]["count"])
        if work["training"] is not None:
            rows = len(run.rows(name)) or len(run.pairs(name))
            assert within(rows, work["training"]["rows"])
            assert within(run.summary(name)["steps"], work["training"]["steps"])
        assert stage["disk"]["weights"] == pytest.approx(run.weights(name).stat().st_size, rel=0.1)
        files = run.stage(name).path.glob("*.jsonl")
        written = sum(file.stat().st_size for file in files)
        bounds = stage["disk"]["records"]
        assert bounds["least"] / 2 <= written
        assert bounds["most"] is None or written <= 2 * bounds["most"]
        assert (bounds["most"] is None) == (name == "m2")  # what its judge writes is not known
    drawn = run.candidates("m2")
    asked = stages["m2"]["work"]["candidates"]
    assert within(sum(len(c.ids) for c in drawn), asked["written"])
    assert all(within(len(c.ids), asked["new"]) for c in drawn)
    assert all(len(p.ids) <= asked["longest"] for p in run.prompts("m2"))
    assert plan["peak"]["bytes"] == max(
        stage["peak"] for stage in stages.values() if stage["phases"]
    )


def test_a_plan_needs_no_weights(folder, capsys):
    whole = planned(folder, capsys)[0]
    config = (folder / "m0" / "config.json").read_text()
    (folder / "shape").mkdir()
    (folder / "shape" / "config.json").write_text(config)
    bare, stages = planned(folder, capsys, "--model", str(folder / "shape"))
    assert bare["model"] == whole["model"]
    assert bare["texts"] is not None  # no tokenizer: rows are counted, their tokens bounded
    training = stages["sft_baseline"]["work"]["training"]
    assert training["rows"] == {"least": 6, "most": 6}
    assert training["row"]["tokens"] == {"least": 0, "most": 256}
    assert stages["m2"]["phases"][0]["cache"] is None and bare["peak"] is None


def test_a_plan_says_whether_a_device_has_room(folder, capsys):
    recipe = str(folder / "recipe.yaml")
    command = ["plan", recipe, "--no-times", "--set", "paper.ranked=null", "--device-memory"]
    assert main([*command, "24GB"]) == 0
    told = capsys.readouterr().out
    assert "planned for a GPU" in told and "fits into 24.0 GB; largest optim.micro_batch" in told
    peak = planned(folder, capsys, *command[3:-1], "--device-memory", "24GB")[1]["m1"]["peak"]
    assert main([*command, f"{peak - 1}"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "training does not fit into" in told and "; largest optim.micro_batch_tokens" in told
    assert main([*command, "300kB"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "no micro_batch_tokens would: fewer trained weights (peft)" in told


def test_a_plan_of_an_adapter(folder, capsys):
    pytest.importorskip("peft")
    plan, stages = planned(folder, capsys, "--lora-rank", "2", "--set", "keep_stages=1")
    assert plan["model"]["trainable"] < plan["model"]["parameters"] / 5
    training = next(p for p in stages["m1"]["phases"] if p["is_used"])
    assert (
        training["gradients"] == 4 * plan["model"]["trainable"] == stages["m1"]["disk"]["weights"]
    )
    assert plan["disk"]["weights"]["most"] == 2 * stages["m1"]["disk"]["weights"]


def test_flags_alone_are_planned(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    flags = ["--model", "m0", "--ift", "ift.jsonl", "--prompts", "prompts.jsonl"]
    assert main(["plan", *flags, "--iterations", "1", "--no-times"]) == 0
    assert "stage 2 of 2: m2" in capsys.readouterr().out


def test_a_recipe_that_cannot_be_run_cannot_be_planned(folder, capsys):
    recipe = str(folder / "recipe.yaml")
    assert main(["plan", recipe, "--set", "paper.batch_size=0"]) == 1
    told = capsys.readouterr()
    assert told.out == "" and "Traceback" not in told.err
    assert told.err.startswith("self-rewarding-lm: error: the recipe cannot be run;")
    (folder / "empty").mkdir()
    assert main(["plan", recipe, "--model", str(folder / "empty"), "--no-times"]) == 1
    assert "no configuration of a causal LM could be read" in capsys.readouterr().err


# -- export ----------------------------------------------------------------------------------------


def export(run, stage, path, *more):
    return main(["export", str(run), "--stage", stage, "--to", str(path), *more])


def test_pairs_are_exported_as_conversations(done, tmp_path):
    assert export(done, "m2", tmp_path / "pairs.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    pairs = Run.open(done).pairs("m2")
    assert rows == [
        {
            "prompt": [{"role": "user", "content": pair.prompt}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    ]


def test_parquet_holds_what_jsonl_holds(done, tmp_path):
    datasets = pytest.importorskip("datasets")
    for stage in ("sft_baseline", "eft", "m2"):
        assert export(done, stage, tmp_path / f"{stage}.jsonl") == 0
        assert export(done, stage, tmp_path / f"{stage}.parquet") == 0
        lines = (tmp_path / f"{stage}.jsonl").read_text().splitlines()
        read = datasets.Dataset.from_parquet(
            str(tmp_path / f"{stage}.parquet"), cache_dir=str(tmp_path / "cache")
        )
        assert read.to_list() == [json.loads(line) for line in lines]


def test_demonstrations_are_exported_with_their_prompts(done, tmp_path):
    assert export(done, "eft", tmp_path / "eft.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "eft.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [
        [{"role": "user", "content": text}]
        for text in ("say 0 0", "say 0 no", "say 1 1", "say 1 no")
    ]
    assert [row["completion"][0]["content"] for row in rows] == ["Score: 5", "Score: 0"] * 2


def test_supervised_rows_are_exported_as_the_ids_that_were_trained(done, tmp_path):
    assert export(done, "1", tmp_path / "sft.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    trained = Run.open(done).rows("sft_baseline")
    assert rows == [
        {"input_ids": list(r.ids), "completion_mask": list(map(int, r.targets))} for r in trained
    ]


def test_a_file_is_not_replaced_without_force(done, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("mine")
    assert export(done, "m2", path) == 1
    assert "exists" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert export(done, "m2", path, "--force") == 0
    assert len(path.read_text().splitlines()) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("stage", "name", "words"),
    [
        ("m9", "x.jsonl", "the run has no stage 'm9'; it has: sft_baseline, eft, m1, m2"),
        ("m2", "x.csv", "the file must end in .jsonl or .parquet; got"),
    ],
)
def test_what_cannot_be_exported_is_said(done, tmp_path, stage, name, words, capsys):
    assert export(done, stage, tmp_path / name) == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_has_not_begun_has_nothing_to_export(folder, capsys):
    (folder / "stop").touch()
    recipe = str(folder / "recipe.yaml")
    assert main(["run", recipe, "--iterations", "2", "--quiet"]) == 130
    assert export(folder / "run", "m3", folder / "x.jsonl") == 1
    assert (
        "has no pairs, demonstrations or supervised rows; it is not done" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_trl_reads_the_columns(done, tmp_path):
    """TRL knows the pairs as conversational preferences, and trains on them."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.data_utils import is_conversational

    source = done / "03-m1" / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    common = {
        "report_to": "none",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
    }
    for stage, trainer, config in (
        ("m2", trl.DPOTrainer, trl.DPOConfig),
        ("eft", trl.SFTTrainer, trl.SFTConfig),
        ("m1", trl.SFTTrainer, trl.SFTConfig),
    ):
        path = tmp_path / f"{stage}.parquet"
        assert export(done, stage, path) == 0
        rows = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        assert is_conversational(rows[0]) == (stage != "m1")
        trained = trainer(
            model=AutoModelForCausalLM.from_pretrained(source),
            args=config(output_dir=str(tmp_path / stage), **common),
            train_dataset=rows,
            processing_class=tokenizer,
        ).train()
        assert trained.global_step == 1


def test_records_of_ids_alone_are_exported_as_ids():
    """Without a tokenizer there are no texts."""
    from self_rewarding_lm.records import columns_of
    from self_rewarding_lm.report.export import _demonstration, _supervised

    pair = PreferencePair("a/0/0", (1, 2), (3,), (4,))
    assert columns_of(pair) == {"prompt": (1, 2), "chosen": (3,), "rejected": (4,)}
    made = Demonstration("a/0/0/1", (1, 2), (3,))
    assert _demonstration(made) == {"prompt": (1, 2), "completion": (3,)}
    row = TrainingRow("a/0", (1, 2, 3), (False, False, True))
    assert _supervised(row) == {"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}
    assert Prompt("a/0/0", 0, (1,)).messages is None


def test_show_gives_each_of_two_compared_candidates_its_own_share(done, tmp_path, capsys):
    copy = tmp_path / "compared"
    shutil.copytree(done, copy)
    run = Run.open(copy)
    prompt = run.prompts("m2")[0]
    one, other = [c for c in run.candidates("m2") if c.prompt_id == prompt.id][:2]
    lines = [
        Judgement(f"{a.id}/vs/{b.id[-1]}", (a.id, b.id), "self", score, source="compared")
        for a, b, score in ((one, other, 1.0), (other, one, 0.0))  # `one` wins in both orders
    ]
    path = run.stage("m2").path / "judgements.jsonl"
    path.write_text("".join(json.dumps(to_json(line)) + "\n" for line in lines))
    path.with_name("files.json").unlink()  # nobody vouches for the files
    assert main(["show", str(copy), "--stage", "m2", "--prompts", "99"]) == 0
    shown = capsys.readouterr().out
    assert "score 1 of 1, 1 (self, compared)" in shown
    assert "score 0 of 0, 0 (self, compared)" in shown
