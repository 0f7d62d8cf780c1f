"""The model card beside saved weights, and the way of both to the Hugging Face hub.

The card says what the run's folder says: settings, metrics, what kind of weights these are. It does
not guess what nobody wrote down (licences, languages, who may use the weights).
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from self_rewarding_lm.config import FinetuneConfig
from self_rewarding_lm.errors import AdapterError, ConfigError, typed
from self_rewarding_lm.report.figures import StageFigures, stage_figures
from self_rewarding_lm.report.words import CURVES, ROUNDS, in_order, words_of
from self_rewarding_lm.runs.installed import install
from self_rewarding_lm.runs.run import Run
from self_rewarding_lm.runs.stage_files import read_json
from self_rewarding_lm.runs.weights import CARD
from self_rewarding_lm.stages.kinds import STAGES
from self_rewarding_lm.text import amount, markdown_table, number
from self_rewarding_lm.training.losses import PAIR_LOSSES

logger = logging.getLogger(__name__)


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


LONGEST = 120  # characters of a setting in the table


CITATIONS = {
    "2401.10020": ("yuan2024self", "Self-Rewarding Language Models", "Yuan, Weizhe and others"),
    "2305.18290": (
        "rafailov2023direct",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafailov, Rafael and others",
    ),
    "2401.01335": (
        "chen2024spin",
        "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models",
        "Chen, Zixiang and others",
    ),
    "2404.19733": (
        "pang2024iterative",
        "Iterative Reasoning Preference Optimization",
        "Pang, Richard Yuanzhe and others",
    ),
}
"""BibTeX key, title and authors by arXiv number."""


LIBRARY_ENTRY = """\
@software{self_rewarding_lm,
  title = {self_rewarding_lm},
  author = {{The self_rewarding_lm authors}},
  license = {MIT}
}"""


LIMITS = """\
- Numbers of training and scores that a model gives to its own answers do not show that it answers
  better: compare it with an earlier stage on prompts that were not trained on.
- A judge may prefer long answers, or those of its own kind; look at the lengths above.
- Nothing here was checked for safety, for facts or for bias.
- The licences of the first model and of the data hold for these weights. They are not recorded.
"""


def with_card(run: Run, stage: str, save: Callable[[Path], None]) -> Callable[[Path], None]:
    """What writes beside a stage's weights: what `save` writes, and the card."""

    def write(folder: Path) -> None:
        save(folder)
        try:
            text = card_text(run, stage, folder)
        except Exception as error:  # weights without a card are better than none
            logger.warning("%s: no model card (%s: %s)", stage, type(error).__name__, error)
        else:
            (folder / CARD).write_text(text, encoding="utf-8", errors="replace")

    return write


def card_text(run: Run, stage: str, folder: Path) -> str:
    """The card of a stage's weights in Markdown, after the fields that the hub reads.

    folder: where the weights lie, whose config.json tells their kind. Two runs with equal results
    have the same card, whenever and wherever they were.
    """
    last = run.stages.index(stage) + 1
    stages = [stage_figures(run, name, records=False) for name in run.stages[:last]]
    model = run.info.get("model", {})
    kind, size = str(model.get("class", "unknown")).rpartition(".")[2], model.get("parameters")
    what = f"{kind} with {number(size)} parameters" if isinstance(size, int) else kind
    parts = [
        *(_head(folder, stages), f"# Stage {_plain(stage)}"),
        f"A {what}, trained with self_rewarding_lm in {last} of "
        f"{amount(len(run.stages), 'stage')}, seed {run.info.get('seed', 'unknown')}. "
        "`report.html` in the run's folder shows the run.",
        "## Stages so far",
        _table(["stage", "kind", "starts from", "data", "steps"], map(_row, stages)),
        "## Numbers of the run",
        _numbers(stages),
        "## Limits",
        LIMITS.strip(),
        "## Loading it",
        f"```python\n{_loading(folder, stage)}\n```",
        "## Citation",
        f"```bibtex\n{_citations(stages)}\n```",
        _sources(stages),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def reach_hub(repo_id: str) -> None:
    """Ask the hub who we are, so that what stands in the way of an upload is known before it.

    Raises ConfigError if the name is none, if no token is there or the hub refuses it, or if the
    hub is not reached.
    """
    if HUB_NAME.fullmatch(repo_id) is None:
        raise ConfigError(f"a repository of the hub is named OWNER/NAME; got {repo_id!r}.")
    api = _hub()
    if _token() is None:
        raise ConfigError(
            "no token of the Hugging Face hub is here. Make one that may write "
            "(https://huggingface.co/settings/tokens) and log in with `hf auth login`, or set the "
            "environment variable HF_TOKEN."
        )
    with _hub_errors(repo_id):
        api.whoami()


def upload_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a folder as a model, and make its repository if there is none. Returns the address.

    Logging in is huggingface_hub's business. Raises AdapterError if it is not installed, and
    ConfigError if the hub is not reached or refuses.
    """
    api = _hub()
    with _hub_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder)))


def _hub() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise AdapterError(
            f"uploading needs the package huggingface_hub: {install('hf')}"
        ) from error
    return HfApi()


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Within, what the hub or the way to it raises becomes a ConfigError that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise ConfigError(
            f"the Hugging Face hub refused: {str(error).strip()[:300]} The token must be valid and "
            f"may write to {repo_id!r} (`hf auth login`, or the environment variable HF_TOKEN)."
        ) from error
    except Exception as error:  # of the network: each version of the hub's package has its own
        raise ConfigError(
            f"the Hugging Face hub is not reached ({type(error).__name__}: {error!s:.200}). Look "
            "at the network, at HF_ENDPOINT and HF_HUB_OFFLINE; nothing was uploaded by this call "
            "that the same command does not upload again."
        ) from error


@typed
def push_to_hub(
    run: Run,
    stage: str | int,
    repo_id: str,
    *,
    private: bool = True,
    upload: Callable[[Path, str, bool], str] = upload_folder,
) -> str:
    """Upload a stage's weights with their card to the Hugging Face hub. Returns the address.

    repo_id: owner/name. upload: what does it, given the folder, the name and `private`. Raises
    StoreError if the weights are not there or were changed after they were written.
    """
    return upload(run.weights(stage).parent, repo_id, private)


def _head(folder: Path, stages: list[StageFigures]) -> str:
    """The YAML between dashes; JSON strings are YAML."""
    library, base = _library(folder)
    lines = [f"library_name: {library}"]
    if base is not None:
        lines.append(f"base_model: {json.dumps(base)}")
    if library != "pytorch":
        lines.append("pipeline_tag: text-generation")
    methods = [kind.hub_tag for stage in stages if (kind := _kind(stage)) and kind.hub_tag]
    methods += ["dpo" for stage in stages if "dpo_beta" in _settings(stage)]
    tags = ["self-rewarding-lm", *dict.fromkeys(methods)]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _library(folder: Path) -> tuple[str, str | None]:
    """Which library loads the folder, and the base model's name on the hub if it is known."""
    for file, library, key in (
        ("adapter_config.json", "peft", "base_model_name_or_path"),
        ("config.json", "transformers", "_name_or_path"),
    ):
        if (folder / file).exists():
            name = str(read_json(folder / file).get(key) or "")
            is_known = HUB_NAME.fullmatch(name) is not None and not Path(name).exists()
            return library, name if is_known else None
    return "pytorch", None


def _kind(stage: StageFigures) -> type[FinetuneConfig] | None:
    """The stage's class; None if it is the user's own."""
    return next((kind for kind in STAGES if kind.__name__ == stage.kind), None)


def _settings(stage: StageFigures) -> dict[str, Any]:
    return stage.settings.get("settings") or {}


def _row(stage: StageFigures) -> list[str]:
    data = [
        f"{name}: {_short(value)}"
        for name, value in _settings(stage).items()
        if name.endswith("_dataset") and value is not None
    ]
    steps = stage.counts.get("steps")
    return [stage.name, stage.kind, stage.start, "; ".join(data), number(steps) if steps else ""]


def _numbers(stages: list[StageFigures]) -> str:
    """The last value of each curve, and the numbers of the data, of each stage that has any."""
    known = {**ROUNDS, **CURVES}
    values = [{**{k: p[-1][1] for k, p in s.curves.items()}, **s.data} for s in stages]
    keys = {key for of_stage in values for key in of_stage}
    keys = {key for key in keys if key in known or key.startswith("anchor/")}
    rows = [
        [words_of(key), *(number(v[key]) if key in v else "" for v in values)]
        for key in in_order(keys, known, "anchor/")
    ]
    words = "Of training: the last step's. Of data: all of the stage's."
    head = ["number", *(stage.name for stage in stages)]
    return f"{words}\n\n{_table(head, rows)}" if rows else "None was recorded."


def _loading(folder: Path, stage: str) -> str:
    library, _ = _library(folder)
    if library == "transformers":
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            "model = AutoModelForCausalLM.from_pretrained(folder)\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)  # where it was saved with one"
        )
    if library == "peft":
        return _loading_adapter(folder)
    return (
        "from self_rewarding_lm import Run\n\n"
        f"Run.open(run_folder).load_weights(model, {stage!r})  # into a model of the same shape"
    )


def _loading_adapter(folder: Path) -> str:
    """Code that loads an adapter on its base, and where its responses end."""
    base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    if base.endswith(".gguf"):
        lines = [
            "from pathlib import Path",
            "",
            "from peft import PeftConfig, PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
            "",
            "file = Path(PeftConfig.from_pretrained(folder).base_model_name_or_path)",
            "base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)",
            "model = PeftModel.from_pretrained(base, folder)",
        ]
    elif base:
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer, GenerationConfig",
            "",
            "model = AutoPeftModelForCausalLM.from_pretrained(folder)",
        ]
    else:
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoTokenizer, GenerationConfig",
            "",
            "model = PeftModel.from_pretrained(base, folder)  # base: the model that was given",
        ]
    return "\n".join(
        [
            *lines,
            "model.generation_config = GenerationConfig.from_pretrained(folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)  # where it was saved with one",
        ]
    )


def _cited(stages: list[StageFigures]) -> Iterator[str]:
    """The arXiv numbers of what was used: stages, their losses, their NLL term."""
    yield "2401.10020"
    for stage in stages:
        kind, settings = _kind(stage), _settings(stage)
        if kind is not None:
            yield from _papers_of(kind)
        used = settings.keys() - set(getattr(kind, "unused", ()))
        if used & {"dpo_beta", "spin_lambda"}:
            losses = settings.get("loss", "dpo")
            for loss in losses if isinstance(losses, list) else [losses]:
                yield from _papers_of_loss(loss)
        if settings.get("nll_weight"):
            yield "2404.19733"


def _papers_of(it: Any) -> list[str]:
    """The papers that a class's or function's own docstring cites."""
    return re.findall(r"arXiv:(\d{4}\.\d{5})", it.__doc__ or "")


def _papers_of_loss(loss: Any) -> list[str]:
    name = loss.get("name") if isinstance(loss, dict) else loss
    if name == "dpo":
        return ["2305.18290"]
    function = PAIR_LOSSES.get(name) if isinstance(name, str) else None
    return [] if function is None else _papers_of(function)


def _citations(stages: list[StageFigures]) -> str:
    entries = [LIBRARY_ENTRY]
    for paper in dict.fromkeys(_cited(stages)):
        if paper in CITATIONS:
            key, title, authors = CITATIONS[paper]
            entries.append(
                f"@article{{{key},\n  title = {{{title}}},\n  author = {{{authors}}},\n"
                f"  journal = {{arXiv:{paper}}},\n  year = {{20{paper[:2]}}}\n}}"
            )
    return "\n\n".join(entries)


def _sources(stages: list[StageFigures]) -> str:
    others = [paper for paper in dict.fromkeys(_cited(stages)) if paper not in CITATIONS]
    return f"Methods from: {', '.join(f'arXiv:{paper}' for paper in others)}." if others else ""


def _table(head: list[str], rows: Any) -> str:
    plain_rows = [[_plain(cell) for cell in row] for row in rows]
    return markdown_table([_plain(cell) for cell in head], plain_rows)


def _short(value: Any) -> str:
    text = f"{amount(len(value), 'row')} given in place" if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _plain(text: str) -> str:
    """A text on one line in which Markdown sees neither a table's border nor HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
