"""What a recipe will take: parameters, memory, work, time and disk, without loading weights.

Knows nothing of runs on disk; it computes from settings, from data and from the shape of the model.
Begin with `plan.py`, then `work.py` (candidates, judgements and tokens of a stage) and `memory.py`.
"""
