"""A message as a row of parts, for APIs that answer with lists of blocks or items: each opens, grows and closes."""

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from dualpath.server.chat.deltas import Delta


class Part(msgspec.Struct):
    """One part of a message: reasoning, text, or a tool call, whose `text` is its arguments as JSON."""

    kind: Literal["reasoning", "content", "call"]
    index: int
    text: str = ""
    name: str = ""
    call_id: str = ""


class Step(msgspec.Struct, frozen=True):
    """What happens to a part; `text` is what it grows by."""

    kind: Literal["open", "grow", "close"]
    part: Part
    text: str = ""


class Parts:
    """The parts of one message, in the order in which the model writes them. Only the last may be open."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self._open = False

    def take(self, deltas: Iterable[Delta]) -> Iterator[Step]:
        for delta in deltas:
            if delta.kind == "call":
                yield from self._begin("call", delta.text, delta.call_id)
                continue
            if not delta.text:
                continue
            if delta.kind != "arguments" and not (self._open and self.all[-1].kind == delta.kind):
                yield from self._begin(delta.kind)
            part = self.all[-1]
            part.text += delta.text
            yield Step("grow", part, delta.text)

    def close(self) -> Iterator[Step]:
        if self._open:
            self._open = False
            yield Step("close", self.all[-1])

    def _begin(
        self, kind: Literal["reasoning", "content", "call"], name: str = "", call_id: str = ""
    ) -> Iterator[Step]:
        yield from self.close()
        part = Part(kind, len(self.all), name=name, call_id=call_id)
        self.all.append(part)
        self._open = True
        yield Step("open", part)
