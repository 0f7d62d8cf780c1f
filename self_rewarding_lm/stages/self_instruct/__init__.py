"""Gets new instructions from a model: shows it examples, reads what it writes, filters.

Self-Instruct (arXiv:2212.10560) as arXiv:2401.10020 uses it (sections 2 and 3.1.3, appendix A.5):
a model continues a numbered list of instructions. Each instruction that is left out has a reason,
and the reasons are counted. Knows nothing of pairs and training; only `write.py` uses models and
runs. Begin with `write.py`, then `few_shot.py`, `reading.py` and `filters.py`.
"""
