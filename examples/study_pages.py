"""The words of the study's pages, a page a task. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """What a task's page says beside its figures, and where it stands.

    Words in braces are filled: seeds, settings, m1, and what all results share. base: the setting
    with which others are compared. place: after which of a setting's rounds it is measured.
    columns: of the table, each with its key in a result and the form of its mean.
    """

    head: str
    tail: str
    limits: str
    base: str
    place: int
    columns: tuple[tuple[str, str, str], ...]
    by_seed: bool
    """Whether each seed's accuracy has a column; the page's own are then a table of their own."""
    folder: str
    results: str
    target: str


QUICKSTART = Page(
    head="""# A study of methods at toy size

`python examples/study.py` repeats it: {settings} settings on the quickstart's task
([quickstart.md](quickstart.md)), {seeds} seeds, {prompts} prompts a round. M1 is trained once a
seed ({sft_steps} steps) and shared. Accuracy is the share of 1,000 held-out prompts that the
greedy answer solves; the loop never sees the checker. This page is written by
`examples/study_report.py` from the result files; nothing in it is written by hand.

M1: {m1}.
""",
    tail="""
Accuracy and what stands beside it: mean of the seeds after the first round; ± is half of the 95
% interval (Student's t), which is wide with {seeds} seeds. "Against plain" is the mean of the
differences seed by seed, with its interval. "Pairs right": the share of pairs in which the
checker rates the chosen answer above the rejected one (ties count half). Seconds are of a whole
run with its measurements, beside others on the machine. Of so many comparisons at 95 % one in
twenty is expected to look like more than chance where there is nothing.
""",
    limits="""
## What this does not show

One task, a model of half a million weights, constraints that a program can check, and one set of
sizes and learning rates that was chosen for the plain loop. A method that needs what this task
lacks (a language, long answers, a judge that drifts) cannot gain here. An answer is one word and
has no steps to compare, so `StepwiseDPOConfig` has no row. The order of the rows is no ranking of
methods for large models.
""",
    base="plain",
    place=0,
    columns=(
        ("length", "length", ".2f"),
        ("judge exact", "judge_exact", ".1f"),
        ("pairs", "pairs", ".0f"),
        ("pairs right", "pairs_right", ".1f"),
    ),
    by_seed=False,
    folder="study",
    results="docs/results/study_quickstart.json",
    target="docs/study.md",
)


def of_demands(task: str, demands: str) -> Page:
    """The page of a task of sentences.py. demands: what its requests ask for, in words."""
    return Page(
        head=f"""# A study of the loop on a pretrained model: {demands}

`python examples/study.py --task {task}` repeats it: {{settings}} settings on {{model}}, {{seeds}}
seeds, {{prompts}} prompts a round. M1 is trained once a seed ({{sft_steps}} steps) and shared, and
so are the answers and reviews of a round where a setting needs no others, so that settings differ
in what they name and not in luck. Accuracy is the share of {{held_out}} held-out requests that the
greedy answer meets in all demands; the loop never sees the checker. Sizes are smaller than those of
`examples/sentences.py`. This page is written by `examples/study_report.py` from
`docs/results/study_{task}.json`; nothing in it is written by hand.

M1: {{m1}}.
""",
        tail="""
The first table: accuracy after a setting's last round is the mean of the seeds; ± is half of the
95 % interval (Student's t), which is wide with {seeds} seeds. "Against base" is the mean of the
differences seed by seed, with its interval. Of so many comparisons at 95 % one in twenty is
expected to look like more than chance where there is nothing.

The second table has means, too. "Judge exact": the share of fixed answers whose points the model's
own marks count rightly. "Distinct words" are those of all held-out answers together, "log-loss" is
how unlikely the model before all training finds them, in nats a token. "Pairs right": the share of
pairs in which the checker rates the chosen answer above the rejected one (ties count half). Seconds
are of a run with its measurements, beside others on the machine, without what it took from other
runs.
""",
        limits="""
## What this does not show

One small model, demands that a program can check, few prompts, and rates and sizes that were chosen
for `base`. What needs long answers, a judge that drifts or many rounds cannot show here. Answers
are short and are not made of steps, so `StepwiseDPOConfig` has no row. The order of the rows is no
ranking of methods for large models.
""",
        base="base",
        place=-1,
        columns=(
            ("judge exact", "judge_exact", ".1f"),
            ("words", "words", ".1f"),
            ("distinct words", "distinct_words", ".0f"),
            ("log-loss", "log_loss", ".2f"),
            ("pairs", "pairs", ".0f"),
            ("pairs right", "pairs_right", ".1f"),
        ),
        by_seed=True,
        folder=f"study-{task}",
        results=f"docs/results/study_{task}.json",
        target=f"docs/study_{task}.md",
    )


PAGES = {
    "quickstart": QUICKSTART,
    "sentences": of_demands("sentences", "sentences with wanted words"),
    "json": of_demands("json", "JSON of a wanted form"),
}
"""The page of each task."""
