"""An engine that asks an OpenAI-compatible server, and what it needs for that.

Knows nothing of the model's weights beyond the folder that a server is started with. Begin with
`engine.py`, then `completions.py` (one request and its answer) and `client.py` (HTTP, tries and
limits).
"""

from self_rewarding_lm.generation.server.engine import ServerEngine

__all__ = [
    "ServerEngine",
]
