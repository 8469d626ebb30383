"""How control messages are written and read. Whatever a peer sends, reading it raises `BadMessageError` or nothing."""

from typing import TypeVar

import msgspec

from dualpath.cluster.messages.commands import ToEngine
from dualpath.cluster.messages.reports import FromEngine

CONTROL_QUEUE_MESSAGES = 100_000
"""Bound of each control queue. An engine with this many unread messages is lost already."""


to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)
encoder = msgspec.msgpack.Encoder()


Message = TypeVar("Message")


class BadMessageError(ValueError):
    """What a peer sent is no message of its kind."""


def from_engine(frames: list[bytes]) -> FromEngine:
    """Returns an engine's message; raises BadMessageError for whatever else comes."""
    message: FromEngine = _decoded(from_engine_decoder, frames)
    return message


def to_engine(frames: list[bytes]) -> ToEngine:
    """As `from_engine`, of the coordinator's."""
    message: ToEngine = _decoded(to_engine_decoder, frames)
    return message


def _decoded(decoder: "msgspec.msgpack.Decoder[Message]", frames: list[bytes]) -> Message:
    if len(frames) != 1:
        raise BadMessageError(f"a message has one frame, not {len(frames)}")
    try:
        return decoder.decode(frames[0])
    except Exception as error:  # of types, of UTF-8, of nesting: what a peer sends raises nothing else than this
        raise BadMessageError(f"{type(error).__name__}: {error}") from None
