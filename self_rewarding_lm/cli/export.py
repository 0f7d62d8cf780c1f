"""`self-rewarding-lm export`: what a stage trained on, as a file."""

import argparse
from pathlib import Path

from self_rewarding_lm.text import amount

SUMMARY = "write what a stage trained on in TRL's columns"


DESCRIPTION = "Write what a stage trained on in TRL's columns."


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="the run's folder")
    parser.add_argument("--stage", required=True, metavar="S", help="name or number (from 1)")
    parser.add_argument("--to", required=True, metavar="FILE", help="a .parquet or .jsonl file")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def run(options: argparse.Namespace) -> int:
    from self_rewarding_lm.report.export import export_stage
    from self_rewarding_lm.report.terminal import stage_name
    from self_rewarding_lm.runs.run import Run

    opened = Run.open(options.folder)
    stage = stage_name(opened, options.stage)
    count = export_stage(opened, stage, Path(options.to), force=options.force)
    print(f"{options.to}: {amount(count, 'row')} of stage {stage}")
    return 0
