"""A worker's connection to its node's agent: attach, receive, beat; attach again when the agent is gone and back."""

import logging
import socket
import struct
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec

from dualpath.cluster.attachment import (
    Admit,
    Attached,
    Beat,
    Begin,
    CopyOut,
    Fill,
    Leave,
    Release,
    Stop,
)
from dualpath.cluster.attachment_frames import Connection, NotAPeerError
from dualpath.cluster.vllm_attachment import AttachWorker, Drop, Expect, LayersReady
from dualpath.thread_names import name_this_thread
from dualpath.transfer.pool import BufferPool, MappedPages

RETRY_S = 0.5
"""Pause between two tries to attach."""
REFUSED_S = 10.0
"""The pause after an agent has refused this engine."""
SEND_S = 10
"""How long an agent may leave its socket unread before it counts as gone."""
BEAT_S = 0.1

_decoder = msgspec.msgpack.Decoder(
    Attached | Expect | LayersReady | Drop | Admit | Fill | Begin | CopyOut | Stop | Release | Leave
)
_log = logging.getLogger("vllm.dualpath")


class Worker(Protocol):
    """What is told of the agent, on the link's thread. None of it raises."""

    def attached(self, pages: MappedPages) -> None: ...

    def detached(self) -> None: ...

    def handle(self, message: msgspec.Struct) -> None: ...


class AgentLink:
    """Two threads: one that attaches and receives, one that beats."""

    def __init__(self, path: str, hello: AttachWorker) -> None:
        self._path, self._hello = path, hello
        self._connection: Connection | None = None
        self._why = ""
        """Why this side has ended the connection."""
        self._closed = threading.Event()
        self._worker: Worker
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._run, "dp-link"), (self._beat, "dp-beats"))
        ]

    def start(self, worker: Worker) -> None:
        self._worker = worker
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Detach for good. Returns once nothing touches the agent's pages, or after a few seconds."""
        self._closed.set()
        connection = self._connection
        if connection is not None:
            connection.close()
        for thread in self._threads:
            thread.join(timeout=5.0)

    def say(self, message: msgspec.Struct) -> None:
        """Send from any thread; to an agent that is gone, nothing."""
        self._with_connection(lambda connection: connection.send(message))

    def _with_connection(self, send: Callable[[Connection], None]) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            send(connection)
        except BlockingIOError:
            self._why = f"it has read nothing for {SEND_S} s"
            connection.close()
        except OSError:  # the receiving thread sees the end
            connection.close()

    # ── threads ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        name_this_thread("dp-link")
        said = ""
        while not self._closed.is_set():
            pause_s, self._why = RETRY_S, ""
            try:
                self._serve()
            except _LeaveError as leaving:
                pause_s = REFUSED_S if leaving.refused else RETRY_S
                why = f"it {'refuses' if leaving.refused else 'says'}: {leaving}"
            except (OSError, NotAPeerError, ValueError) as error:
                why = self._why or str(error) or repr(error)
            if why != said and not self._closed.is_set():
                said = why
                _log.warning("the agent at %s is not there (%s); vLLM serves on without it", self._path, why)
            self._closed.wait(pause_s)

    def _serve(self) -> None:
        """Attach and receive until the agent is gone. Raises OSError, NotAPeerError, ValueError, _LeaveError."""
        connection, hello = _connect(self._path), self._hello
        try:
            connection.send(hello)
            first = connection.receive(_decoder)
            if isinstance(first, Leave):
                raise _LeaveError(first)
            if not isinstance(first, Attached):
                raise NotAPeerError(f"it said {type(first).__name__} first")
            pages = BufferPool.attach(first.pool_path)
            if pages.page_bytes != hello.engine.layout.full_block_bytes:
                raise ValueError(f"its buffer has pages of {pages.page_bytes} bytes, no Full Block of this model")
            self._worker.attached(pages)
            self._connection = connection
            _log.info("attached to the agent at %s", self._path)
            try:
                while True:
                    self._handle(connection.receive(_decoder))
            finally:
                self._connection = None
                self._worker.detached()
        finally:
            connection.close()

    def _handle(self, message: msgspec.Struct) -> None:
        if isinstance(message, Leave):
            raise _LeaveError(message)
        self._worker.handle(message)

    def _beat(self) -> None:
        name_this_thread("dp-beats")
        while not self._closed.wait(BEAT_S):
            self._with_connection(lambda connection: connection.send_beat(Beat({})))


class _LeaveError(Exception):
    def __init__(self, leave: Leave) -> None:
        super().__init__(leave.reason)
        self.refused = leave.refused


def _connect(path: str) -> Connection:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.connect(path)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
    except OSError:
        connected.close()
        raise
    return Connection(connected)
