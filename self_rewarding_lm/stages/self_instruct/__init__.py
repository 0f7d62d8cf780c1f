"""New instructions from a model: the few-shot prompt, reading what it wrote, filters.

Self-Instruct (arXiv:2212.10560) as arXiv:2401.10020 uses it (sections 2 and 3.1.3, appendix A.5): a
model is shown a numbered list of instructions and goes on with it. What is left out of what it
writes has a reason, which is counted. Knows nothing of pairs and training; only `write.py` knows of
models and runs. Begin with `write.py`, then `few_shot.py`, `reading.py` and `filters.py`.
"""
