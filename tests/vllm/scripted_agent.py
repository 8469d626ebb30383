"""A node agent that does what a test says: a real socket, real records, a real buffer; no cluster."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dualpath.cluster.attachment import (
    Admit,
    Attached,
    Beat,
    Begin,
    CopyOut,
    Fill,
    Leave,
    Owner,
    Release,
    Reply,
    Stop,
)
from dualpath.cluster.attachment_frames import Connection
from dualpath.cluster.vllm_attachment import (
    AttachWorker,
    Drop,
    Expect,
    Generated,
    LayerSaved,
    LayersReady,
    Quiet,
    StepSaved,
)
from dualpath.spec.sampling import SamplingParams
from dualpath.transfer.pool import BufferPool

BLOCK = 64
PATIENCE_S = 180.0
_decoder = msgspec.msgpack.Decoder(AttachWorker | Reply | Beat | Quiet | LayerSaved | StepSaved | Generated)


class ScriptedAgent:
    """Serves one engine of `workers` workers."""

    def __init__(self, path: Path, pages: int = 200, workers: int = 1, refusal: Leave | None = None) -> None:
        self.path, self._pages, self._workers, self._refusal = path, pages, workers, refusal
        self.changed = threading.Condition()
        self.hello: AttachWorker | None = None
        self.heard: list[tuple[int, Any]] = []
        """Rank and message, in order; without beats and replies."""
        self._replies: dict[int, list[Reply]] = {}
        self.beats = 0
        self._ready: set[Connection] = set()
        self.pool: BufferPool | None = None
        self._connections: dict[int, Connection] = {}
        self._numbers = itertools.count()
        self._listening: socket.socket | None = None

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> "ScriptedAgent":
        self.path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(self.path))
        self._listening.listen()
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()
        return self

    def stop(self) -> None:
        """As if the agent had been killed: connections end, the buffer's file is gone."""
        assert self._listening is not None
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self.changed:
            connections, self._connections = list(self._connections.values()), {}
            self.heard.clear()
            self.hello = None
        for connection in connections:
            connection.close()
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(Connection(accepted),), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        rank = -1
        with contextlib.suppress(ConnectionError, OSError):
            hello = connection.receive(_decoder)
            assert isinstance(hello, AttachWorker)
            rank = hello.rank
            if self._refusal is not None:
                connection.send(self._refusal)
                return
            with self.changed:
                if self.pool is None:
                    self.pool = BufferPool.create("scripted", hello.engine.layout.full_block_bytes, self._pages)
                connection.send(Attached("secret", str(self.pool.path)))
                self._connections[rank] = connection
                self.hello = hello
                self.changed.notify_all()
            while True:
                message = connection.receive(_decoder)
                with self.changed:
                    if isinstance(message, Beat):
                        self.beats += 1
                        if connection in self._ready:
                            continue
                        self._ready.add(connection)
                    elif isinstance(message, Reply):
                        self._replies.setdefault(message.call, []).append(message)
                    else:
                        self.heard.append((rank, message))
                    self.changed.notify_all()

    def wait_attached(self, timeout_s: float = PATIENCE_S) -> AttachWorker:
        """Wait until all workers have mapped the buffer: they beat only then."""

        def ready() -> bool:
            return len(self._connections) == self._workers and self._ready >= set(self._connections.values())

        self._wait(ready, "its workers attach", timeout_s)
        assert self.hello is not None
        return self.hello

    # ── talking ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def tell(self, message: msgspec.Struct) -> None:
        for connection in list(self._connections.values()):
            connection.send(message)

    def call(self, make: Callable[[int], Any], timeout_s: float = PATIENCE_S) -> str:
        """Returns the first error of the workers' answers, or an empty string."""
        return self.answer(self.begin_call(make), timeout_s)

    def begin_call(self, make: Callable[[int], Any]) -> int:
        number = next(self._numbers)
        self.tell(make(number))
        return number

    def answer(self, number: int, timeout_s: float = PATIENCE_S) -> str:
        replies = self._replies.setdefault(number, [])
        self._wait(lambda: len(replies) == self._workers, f"call {number} is answered", timeout_s)
        return next((reply.error for reply in replies if reply.error), "")

    def wait_for(self, predicate: Callable[[Any], bool], what: str, timeout_s: float = PATIENCE_S) -> Any:
        """Returns the first message that is so, once every worker has said one."""

        def found() -> dict[int, Any]:
            first: dict[int, Any] = {}
            for rank, message in self.heard:
                if predicate(message):
                    first.setdefault(rank, message)
            return first

        wanted = 1 if what == "generated" else self._workers
        self._wait(lambda: len(found()) >= wanted, what, timeout_s)
        return next(iter(found().values()))

    def messages(self, kind: type) -> list[Any]:
        with self.changed:
            return [message for _, message in self.heard if isinstance(message, kind)]

    def _wait(self, predicate: Callable[[], bool], what: str, timeout_s: float) -> None:
        with self.changed:
            if not self.changed.wait_for(predicate, timeout=timeout_s):
                raise AssertionError(f"after {timeout_s} s it is not so that {what}; heard: {self.heard[-8:]}")

    # ── a prompt's pages ────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, owner: Owner, tokens: int) -> list[int]:
        assert self.pool is not None
        return self.pool.allocate(owner, -(-tokens // BLOCK))

    def page(self, page: int) -> np.ndarray:
        assert self.pool is not None
        return self.pool.view(page)

    def expect(
        self, owner: Owner, pages: list[int], hit_tokens: int, prompt_tokens: int, *, ready: bool = True
    ) -> None:
        self.tell(Expect(owner, pages, hit_tokens, prompt_tokens))
        if ready and hit_tokens:
            assert self.hello is not None
            self.tell(LayersReady(owner, self.hello.engine.layout.layers))

    def wait_saved(self, owner: Owner, prompt_tokens: int) -> None:
        """Wait until all of a prompt's KV is in its pages."""
        self.wait_for(
            lambda each: isinstance(each, StepSaved) and (owner, prompt_tokens) in each.computed, f"{owner} is saved"
        )

    def drop(self, owner: Owner) -> None:
        self.tell(Drop(owner))
        self.wait_for(lambda each: isinstance(each, Quiet) and each.owner == owner, f"{owner} is quiet")

    def admit(self, sequence: int, owner: Owner, prompt_tokens: int) -> int:
        sampling = SamplingParams(max_tokens=1)
        return self.begin_call(lambda call: Admit(call, sequence, owner, prompt_tokens, 0, sampling, 0))

    def fill(self, sequence: int, pages: list[int], prompt_tokens: int) -> int:
        blocks = [(block, page, min(BLOCK, prompt_tokens - block * BLOCK)) for block, page in enumerate(pages)]
        return self.begin_call(lambda call: Fill(call, sequence, blocks))

    def begin(self, sequence: int) -> str:
        return self.call(lambda call: Begin(call, sequence))

    def copy_out(self, sequence: int, block: int, page: int) -> str:
        return self.call(lambda call: CopyOut(call, sequence, block, page))

    def stop_sequence(self, sequence: int) -> None:
        self.tell(Stop(sequence))

    def release(self, sequence: int) -> str:
        return self.call(lambda call: Release(call, sequence))

    def generated(self, sequence: int, timeout_s: float = PATIENCE_S) -> tuple[list[int], str]:
        """Returns all tokens of a sequence and why it ended, once it has."""

        def last(each: Any) -> bool:
            return isinstance(each, Generated) and each.sequence == sequence and each.finish_reason is not None

        reason = self.wait_for(last, "generated", timeout_s).finish_reason
        with self.changed:
            tokens = [
                token
                for _, each in self.heard
                if isinstance(each, Generated) and each.sequence == sequence
                for token in each.token_ids
            ]
        return tokens, reason


def wait_until(predicate: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"after {timeout_s} s it is not so that {what}")
        time.sleep(0.02)
