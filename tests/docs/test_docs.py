"""Every code block of the README and of docs/*.md is run, or checked as far as it can be.

Rules for a page:

- `python` blocks of a page are run in their order, with one set of names, in a folder of their own. A page
  imports what it uses. It finds there, without making them: the names that getting_started.md makes, of which it says
  which ones it uses; the files
  `ift.jsonl`, `rows.jsonl`, `prompts.jsonl`, `pairs.jsonl`, `ranked.jsonl`, `trees.jsonl`; and the tiny model
  under the hub's name `HuggingFaceTB/SmolLM2-135M-Instruct`, so that nothing is downloaded.
- `<!-- slow: why -->` on the line before a block: it is run by `pytest -m slow` alone (over about 5 seconds).
- `<!-- no-run: why -->` there: it is not run. It must compile, its imports must work, and the keyword names of
  its calls must be those of the functions called. `...` may stand in the place of arguments.
- `bash` blocks are not run: the command's own parser must take each line of `self-rewarding-lm` and
  `accelerate launch`; targets of `make`, files of `python` and `pytest` and extras of `pip` must exist.
- `yaml` blocks: with `model` a recipe, which is read in full (its files are those above) and then lies in the
  folder as recipe.yaml; else settings that a recipe knows.
- `json` blocks are read; `text` and `bibtex` blocks are not. Other words after the fence are an error.

The README's python blocks are checked here as if marked no-run; test_readme.py and test_readme_examples.py run
them with smaller numbers.
"""

import ast
import gzip
import inspect
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from self_rewarding_lm.cli import make_parser
from self_rewarding_lm.config import Config
from self_rewarding_lm.recipes.reader import read_recipe
from self_rewarding_lm.recipes.settings import STAGE_KINDS, RecipeSettings
from self_rewarding_lm.recipes.yaml_nodes import read_yaml
from tests.recipes.test_reader import tree, write_lines
from tests.support.hf_models import VOCAB, word_tokenizer

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>slow|no-run): [^\n]+ -->\n)?(?P<ticks>```+)(?P<word>[^\n]*)\n(?P<text>.*?)^(?P=ticks)$",
    re.DOTALL | re.MULTILINE,
)
LANGUAGES = {"python", "bash", "yaml", "json", "text", "bibtex", ""}
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STARTED = ROOT / "docs" / "getting_started.md"
GIVEN = ("model", "tokenizer", "rows", "prompts", "pairs", "ranked", "stages")
ROWS = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(8)]
PROMPTS = [f"Tell me something about the number {i}." for i in range(8)]
PAIRS = [{"prompt": p, "chosen": "Yes, it is.", "rejected": "No."} for p in PROMPTS]
RANKED = [{"prompt": p, "replies": ["Good answer.", "Bad."], "ranks": [0, 1]} for p in PROMPTS]


@dataclass(frozen=True)
class Block:
    word: str
    text: str
    mark: str | None
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(it["word"].strip(), it["text"], it["mark"], text.count("\n", 0, it.start("text")))
        for it in FENCE.finditer(text)
        if not it["word"].startswith("{")  # a directive of the site
    ]


def having(word: str, *pages: Path) -> list[Path]:
    return [page for page in pages if any(block.word == word for block in blocks_of(page))]


def names_of(pages: list[Path]) -> dict:
    return {"argvalues": pages, "ids": [page.stem for page in pages]}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with the tiny model and the files that pages may use."""
    folder = tmp_path_factory.mktemp("docs")
    tokenizer = word_tokenizer(CHATML)
    tokenizer.save_pretrained(folder / HUB_NAME)
    numbers = tokenizer.encode("0123456789", add_special_tokens=False)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    fond_of([*numbers, *ends]).save_pretrained(folder / HUB_NAME)
    for name, lines in {
        "ift": ROWS,
        "rows": ROWS,
        "prompts": PROMPTS,
        "pairs": PAIRS,
        "ranked": RANKED,
        "trees": [tree(i) for i in range(30)],
    }.items():
        write_lines(folder / f"{name}.jsonl", lines)
    with gzip.open(folder / "trees.jsonl.gz", "wb") as file:
        file.write((folder / "trees.jsonl").read_bytes())
    return folder


def fond_of(ids: list[int]):
    """A tiny GPT-2 of random weights that writes mostly these tokens: so it gives scores, and ends."""
    from transformers import GPT2Config, GPT2LMHeadModel

    width = 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_embd=width,
                n_layer=1,
                n_head=2,
                n_positions=4096,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1)  # what is normed sums to 0 before, to the width behind
        model.lm_head.weight[ids] += 5 / width
    return model


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    """A copy of that folder, which is the current one."""
    monkeypatch.setenv("SELF_REWARDING_LM_QUIET", "1")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given() -> dict:
    """What a page need not make, made as getting_started.md says."""
    [block] = [b for b in blocks_of(STARTED) if "ranked = [" in b.text]
    names: dict = {}
    exec(compile(block.text, str(STARTED), "exec"), names)
    return {name: names[name] for name in GIVEN}


def run(page: Path, *, slow: bool) -> None:
    names = given()
    for block in blocks_of(page):
        if block.word == "yaml":
            check_yaml(block)
        elif block.word == "python" and (
            block.mark == "no-run" or (block.mark == "slow" and not slow)
        ):
            check_names(block.text, names)
        elif block.word == "python":
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, names)


@pytest.mark.parametrize("page", **names_of(having("python", *PAGES)))
def test_the_python_blocks_of_a_page_run(page, folder):
    run(page, slow=False)


@pytest.mark.parametrize("page", **names_of(having("python", *PAGES)))
def test_a_page_says_where_the_names_come_from_that_it_does_not_make(page):
    made, missing = set(), set()
    for block in blocks_of(page):
        if block.word != "python" or block.mark == "no-run":
            continue
        tree = ast.parse(block.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made.add(node.id)
            elif isinstance(node, ast.arg):
                made.add(node.arg)
        read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        missing |= {name for name in GIVEN if name in read - made}
    said = re.search(
        r"^In the code (.+) are those of \[getting started\]\(\S+\)\.$", page.read_text(), re.M
    )
    assert missing == set(re.findall(r"`(\w+)`", said[1]) if said else ())


SLOW = [page for page in PAGES if any(block.mark == "slow" for block in blocks_of(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", **names_of(SLOW))
def test_the_slow_python_blocks_of_a_page_run(page, folder):
    run(page, slow=True)


def test_the_readmes_python_blocks_call_what_there_is(folder):
    names = given()
    for block in blocks_of(README):
        if block.word == "python":
            check_names(block.text, names)


@pytest.mark.parametrize("page", **names_of([README, *PAGES]))
def test_blocks_have_a_known_language_and_are_closed(page):
    blocks = blocks_of(page)
    assert {block.word for block in blocks} <= LANGUAGES
    rest = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert "```" not in rest  # a fence that nothing closes, or one that is not at a line's start
    assert [
        m for m in re.findall(r"^<!-- (\S+?):", rest, re.MULTILINE) if m in ("slow", "no-run")
    ] == []
    for block in blocks:
        if block.word == "json":
            json.loads(block.text)


@pytest.mark.parametrize("page", **names_of(having("bash", README, *PAGES)))
def test_the_commands_of_a_page_are_known(page):
    for block in blocks_of(page):
        if block.word == "bash" and block.mark != "no-run":
            for line in re.sub(r"\\\n", " ", block.text).splitlines():
                check_command(shlex.split(line, comments=True))


def check_names(code: str, names: dict) -> None:
    """Names that are imported exist; keywords of calls are known. Imports stay in `names`."""
    tree_of = ast.parse(re.sub(r"\.\.\.[ ]*,\s*|,?\s*\.\.\.\s*(?=\))", "", code))
    for node in ast.walk(tree_of):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), names)
    for node in ast.walk(tree_of):
        if isinstance(node, ast.Call):
            known = keywords_of(found(node.func, names))
            for keyword in node.keywords if known is not None else ():
                assert keyword.arg is None or keyword.arg in known, (
                    f"{ast.unparse(node.func)} has no {keyword.arg}"
                )


def found(node: ast.expr, names: dict):
    """The object that a dotted name stands for, None where it cannot be known."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    return (
        getattr(found(node.value, names), node.attr, None)
        if isinstance(node, ast.Attribute)
        else None
    )


def keywords_of(called) -> set[str] | None:
    """The keyword names that an object takes; None: any."""
    if isinstance(called, type) and issubclass(called, Config):
        fields = called.model_fields
        return {*fields, *(field.alias for field in fields.values() if field.alias)}
    if not callable(called):
        return None
    try:
        parameters = inspect.signature(called).parameters.values()
    except ValueError:
        return None
    if any(it.kind is it.VAR_KEYWORD for it in parameters):
        return None
    return {it.name for it in parameters}


def check_yaml(block: Block) -> None:
    settings = yaml.safe_load(block.text)
    if "model" in settings:
        Path("recipe.yaml").write_text(block.text, encoding="utf-8")
        read_recipe(read_yaml(Path("recipe.yaml")))
        return
    known = {*RecipeSettings.model_fields}.union(
        *(kind.model_fields for kind in STAGE_KINDS.values())
    )
    assert set(settings) <= known


def check_command(words: list[str]) -> None:
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    match words:
        case []:
            pass
        case ["self-rewarding-lm", *rest] | ["python", "-m", "self_rewarding_lm", *rest]:
            make_parser().parse_args(rest)
        case ["accelerate", "config"]:
            pass
        case ["accelerate", "launch", *rest]:
            from accelerate.commands.launch import launch_command_parser

            launched = launch_command_parser().parse_args(rest)
            if launched.training_script == "self_rewarding_lm":
                assert launched.module
                make_parser().parse_args(launched.training_script_args)
            else:
                assert launched.training_script == "script.py"
        case ["python", file, *rest]:
            code = (ROOT / file).read_text(encoding="utf-8")
            assert [it for it in rest if it.startswith("--") and f'"{it}"' not in code] == []
        case ["pytest", *rest]:
            assert [it for it in rest if it.endswith(".py") and not (ROOT / it).exists()] == []
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for target in targets:
                assert "=" in target or re.search(rf"^{target}:", makefile, re.MULTILINE), target
        case ["pip", "install", *rest]:
            check_install(rest)
        case _:
            raise AssertionError(
                f"{shlex.join(words)}: mark the block no-run, or add its check here"
            )


def check_install(words: list[str]) -> None:
    """Files, extras and names of a line of pip, against setup.py and constraints.txt."""
    setup, pinned = (ROOT / "setup.py").read_text(), (ROOT / "constraints.txt").read_text()
    named = [it for it in words if not it.startswith("-") and it != "constraints.txt"]
    assert named
    for name in named:
        if it := re.fullmatch(r"(?:\.|self-rewarding-lm)(?:\[(.+)\])?", name):
            for extra in (it[1] or "").split(",") if it[1] else ():
                assert f'"{extra}": ' in setup, extra
        else:
            assert re.search(rf"^{re.escape(name)}==", pinned, re.MULTILINE), name


def test_a_wrong_keyword_and_a_wrong_command_are_found():
    with pytest.raises(AssertionError, match="SFTConfig has no train_data"):
        check_names("from self_rewarding_lm import SFTConfig\nSFTConfig(..., train_data=1)", {})
    with pytest.raises(ImportError):
        check_names("from self_rewarding_lm import NoSuchStage", {})
    with pytest.raises(SystemExit):
        check_command(["self-rewarding-lm", "run", "--no-such-flag"])
    with pytest.raises(AssertionError, match="no_such_target"):
        check_command(["make", "no_such_target"])
    with pytest.raises(AssertionError):
        check_command(["pip", "install", ".[nothing]"])
