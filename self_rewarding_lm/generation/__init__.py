"""Prompts become candidates: engines, the sampler and inference servers.

An `Engine` answers requests of token ids; the local one runs the model in training, the server one
asks a server. Knows nothing of judges, pairs, stages or training. Begin with `candidates.py` (a
prompt becomes requests), then `local.py` and `flight.py` (rows in flight) and `sampling.py` (logits
to a token).
"""

from self_rewarding_lm.generation.candidates import generate
from self_rewarding_lm.generation.engine import Completion, Decoding, Engine, Request
from self_rewarding_lm.generation.local import LocalEngine
from self_rewarding_lm.generation.server.engine import ServerEngine

__all__ = [
    "Completion",
    "Decoding",
    "Engine",
    "LocalEngine",
    "Request",
    "ServerEngine",
    "generate",
]
