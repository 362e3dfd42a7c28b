"""The engine room: scoring and generating, the same code for what is evaluated and what is served."""

from fourscore.engine.answer import Generation
from fourscore.engine.decode import DecodeState
from fourscore.engine.engine import Engine
from fourscore.engine.loop import Stats
from fourscore.engine.sampling import Sampling, TokenLogprobs
from fourscore.engine.stream import Piece, Stream, Timing, Usage

__all__ = ["DecodeState", "Engine", "Generation", "Piece", "Sampling", "Stats", "Stream", "Timing", "TokenLogprobs", "Usage"]
