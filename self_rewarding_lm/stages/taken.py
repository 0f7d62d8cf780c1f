"""The prompts and candidates of another stage, which a stage judges in place of new ones.

Knows folders of stages and their records; nothing of judging.
"""

from collections.abc import Mapping, Sequence

from self_rewarding_lm.context import Context
from self_rewarding_lm.data.datasets import read_prompt
from self_rewarding_lm.errors import ConfigError, DataError, SelfRewardingError, StoreError
from self_rewarding_lm.records import THEN, Candidate, Prompt
from self_rewarding_lm.runs.run import Run, of_another_run
from self_rewarding_lm.runs.stage_files import StageFiles
from self_rewarding_lm.runs.stored import Groups
from self_rewarding_lm.stages.ranges import UNKNOWN, Range
from self_rewarding_lm.stages.work import Asking, Work
from self_rewarding_lm.text import amount


def source_of(stage: str, which: str, run: Run | None = None) -> StageFiles:
    """The folder of the stage whose candidates `stage` takes.

    which: its name, or FOLDER:STAGE. run: of `stage`. Raises ConfigError if it is not there, has
    not finished or has no candidates.
    """
    folder, _, name = which.rpartition(":")
    words = f"{stage}: candidates_from {which!r}"
    try:
        found = Run.open(folder) if of_another_run(which) else run
        assert found is not None
        files = found.stage(name)
        if not files.is_done:
            raise ConfigError(
                f"{words}: that stage has not finished, so not all of its candidates may be there. "
                "Let its run go on to the end of it first."
            )
        if not files.stored(Candidate):
            raise ConfigError(
                f"{words}: that stage has no candidates. Name one that samples: a stage of "
                "self-reward, of an external reward, or of a kind made of these."
            )
        if any(name.endswith(f"/{THEN}") for name in files.stored(Prompt).ids()):
            raise ConfigError(
                f"{words}: that stage's candidates are steps of answers, and no responses to its "
                "prompts. Name a stage that samples whole responses."
            )
    except StoreError as error:
        raise ConfigError(f"{words}: {error}") from error
    return files


def taken_work(which: str | None, works: Mapping[str, Work]) -> Work | None:
    """The prompts and candidates that are taken, of a stage's work or as they are on disk.

    works: of the stages before, by name. None if none are taken. Raises as `source_of`.
    """
    if which is None:
        return None
    if not of_another_run(which):
        planned = works.get(which)
        known = planned is not None and planned.candidates.count.most
        return planned if known else Work(UNKNOWN, candidates=Asking(UNKNOWN, UNKNOWN, UNKNOWN))
    candidates = source_of("a stage", which).stored(Candidate)
    prompts, lengths = len({c.prompt_id for c in candidates}), [len(c.ids) for c in candidates]
    new = Range(min(lengths), max(lengths))
    return Work(Range.of(prompts), candidates=Asking(Range.of(len(lengths)), new))


def taken_prompts(
    ctx: Context, which: str, prompts: Groups[Prompt], sampled: Groups[Candidate]
) -> list[str]:
    """Ids of the prompts that have candidates, in the order in which they were worked.

    prompts, sampled: of the source, by their ids and by the ids of their prompts. Raises
    ConfigError on every process if the stage's own dataset has other prompts in these rows.
    """
    ids = [name for name in prompts.records.ids() if name.count("/") == 2 and name in sampled]
    if "prompt_dataset" in ctx.rows:
        failure = None
        try:
            for name in ctx.runtime.share(ids):
                own_prompt(ctx, which, prompts[name][0])
        except SelfRewardingError as error:
            failure = error
        failures = [error for error in ctx.runtime.gather([failure]) if error is not None]
        if failures:
            raise failure or failures[0]
    return sorted(ids, key=_place)


def own_prompt(ctx: Context, which: str, prompt: Prompt) -> Prompt:
    """A prompt of the source with the columns of the same row in the stage's own dataset.

    Raises ConfigError if that row has another prompt.
    """
    rows = ctx.rows["prompt_dataset"]
    words = (
        f"{ctx.stage}: candidates_from {which!r} has candidates for {_shown(prompt)} in row "
        f"{prompt.row}, and prompt_dataset"
    )
    advice = "Give the prompt_dataset that the candidates were sampled for."
    if prompt.row >= len(rows):
        raise ConfigError(f"{words} has {amount(len(rows), 'row')}. {advice}")
    try:
        own = read_prompt(rows, prompt.row, prompt.id, ctx.tokens, None)
    except DataError as error:
        raise ConfigError(f"{words} has no prompt there: {error} {advice}") from error
    if own.ids != prompt.ids:
        raise ConfigError(f"{words} has {_shown(own)} there. {advice}")
    return own


def next_place(ids: Sequence[str], rows: int) -> int:
    """The place after the last of these prompts, counted over all passes of a dataset."""
    return max((pass_number * rows + row + 1 for pass_number, row in map(_place, ids)), default=0)


def _place(prompt_id: str) -> tuple[int, int]:
    """The pass and the row of a prompt, <stage>/<row>/<pass>."""
    _, row, pass_number = prompt_id.split("/")
    return int(pass_number), int(row)


def _shown(prompt: Prompt) -> str:
    return f"{prompt.text[:80]!r}" if prompt.text is not None else f"the ids {prompt.ids[:20]}"
