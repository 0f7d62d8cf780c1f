"""An engine that speaks to an OpenAI-compatible server, and what it needs for that."""

from self_rewarding_lm.server.engine import ServerEngine

__all__ = ["ServerEngine"]
