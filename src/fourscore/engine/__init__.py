"""The engine room: scoring and generating, the same code for what is evaluated and what is served."""

from fourscore.engine.decode import DecodeState, Generation
from fourscore.engine.engine import Engine

__all__ = ["DecodeState", "Engine", "Generation"]
