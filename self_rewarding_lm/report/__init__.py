"""What a run looks like: the HTML page, the terminal, the model card, rows and weights for others.

Reads runs and changes none of their records. Knows nothing of how they were made: no model,
tokenizer or stage is needed to show a run. Begin with `page.py` (what the
report says) and `report.html` (how it looks), then `examples.py` and `figures.py` (what they show)
and `terminal.py`.
"""
