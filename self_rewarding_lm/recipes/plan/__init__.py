"""Estimates what a recipe needs: parameters, memory, work, time and disk, without loading weights.

Computes from the settings, the data and the model's configuration. Knows nothing of runs on disk.
Begin with `plan.py`, then `stages/work.py` (what each stage samples and trains on) and `memory.py`.
"""
