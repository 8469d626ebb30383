"""`AttachedEngine`: an engine process as its agent sees it. The agent calls it; its connection's end is its end.

A worker of a vLLM server is one, too (`vllm_engine`), with other records.
"""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import msgspec

from dualpath.cluster import attachment as a
from dualpath.cluster.attachment_frames import HEADER_BYTES, NotAPeerError, body_bytes, frame, record
from dualpath.spec.metrics import Figures

_decoder = msgspec.msgpack.Decoder(a.FromEngineProcess)


class EngineGoneError(ConnectionError):
    """The engine process has ended, or its connection has."""


class AttachedEngine:
    """Used from the agent's asyncio thread."""

    def __init__(
        self,
        facts: a.Attach,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: "msgspec.msgpack.Decoder[Any]" = _decoder,
    ) -> None:
        self.facts = facts
        self._decoder = decoder
        self.gauges: Figures = {}
        """What the engine said with its last beat."""
        self.heard_s = asyncio.get_running_loop().time()
        self._reader, self._writer = reader, writer
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[a.Reply | a.BatchDone]] = {}
        self._gone: EngineGoneError | None = None

    async def listen(self, hear: Callable[[Any], None]) -> str:
        """Pass on what the engine says unasked until it is gone. Returns why; every open call has ended then."""
        why = "it has closed its connection"
        try:
            while True:
                n_bytes = body_bytes(await self._reader.readexactly(HEADER_BYTES))
                message = record(self._decoder, await self._reader.readexactly(n_bytes))
                self.heard_s = asyncio.get_running_loop().time()
                match message:
                    case a.Beat():
                        self.gauges = message.gauges
                    case a.Reply() | a.BatchDone():
                        waiting = self._calls.pop(message.call, None)
                        if waiting is not None and not waiting.done():
                            waiting.set_result(message)
                    case _:
                        hear(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except NotAPeerError as error:
            why = f"it said what is no record of ours: {error}"
        finally:
            self.close(why)
        return why

    def tell(self, message: msgspec.Struct) -> None:
        """Send a message that has no answer. Nothing happens when the engine is gone."""
        if self._gone is None:
            self._writer.write(frame(message))

    def call(self, make: Callable[[int], a.Call]) -> "asyncio.Future[a.Reply]":
        """Send a call. The future gets the reply, or EngineGoneError."""
        return self._call(make)  # type: ignore[return-value]

    async def run_batch(self, items: list[a.ChunkItem]) -> a.BatchDone:
        """Raises EngineGoneError."""
        done = await self._call(lambda number: a.RunBatch(number, items))
        assert isinstance(done, a.BatchDone)
        return done

    def _call(self, make: Callable[[int], a.Call]) -> "asyncio.Future[a.Reply | a.BatchDone]":
        answer: asyncio.Future[a.Reply | a.BatchDone] = asyncio.get_running_loop().create_future()
        if self._gone is not None:
            answer.set_exception(self._gone)
            return answer
        number = next(self._numbers)
        self._calls[number] = answer
        self._writer.write(frame(make(number)))
        return answer

    def close(self, why: str) -> None:
        """End the connection and every open call. A second call does nothing."""
        if self._gone is not None:
            return
        self._gone = EngineGoneError(why)
        self._writer.close()
        calls, self._calls = self._calls, {}
        for answer in calls.values():
            if not answer.done():
                answer.set_exception(self._gone)
                answer.exception()  # the caller may have been cancelled
