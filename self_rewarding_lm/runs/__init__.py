"""A run on disk: written by its stages, resumed where it was stopped, read back by `Run`.

Storage alone: every file of a run is written, checked and read here. Knows nothing of tokens,
models' forwards, sampling, judges or losses. Begin with `run.py` (what a run looks like from
outside), then `stage_files.py` (what is read of a stage), `stage_folder.py` (what a stage writes)
and `resume.py` (may this run go on).
"""
