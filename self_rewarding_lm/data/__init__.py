"""Rows and text come in: files of rows, forms of rows, chat templates and token ids.

Everything that a user hands over as data becomes prompts, demonstrations or preference pairs with
token ids here. Knows nothing of models, judges, stages or training. Begin with `rows.py` (a row
becomes ids), then `tokens.py` (text to ids and back) and `datasets.py` (what counts as a dataset).
"""

from self_rewarding_lm.data.oasst import open_assistant
from self_rewarding_lm.data.ranked import ranked_row
from self_rewarding_lm.data.rows import preference_row, prompt_of, training_row
from self_rewarding_lm.data.tokenizers import CallableTokenizer, Tokenizer
from self_rewarding_lm.data.tokens import Tokens

__all__ = [
    "CallableTokenizer",
    "Tokenizer",
    "Tokens",
    "open_assistant",
    "preference_row",
    "prompt_of",
    "ranked_row",
    "training_row",
]
