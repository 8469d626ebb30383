"""The server part's row of the table, as the supervisor has it: how it is started, and its pipes."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from dualpath.cluster.children import Child, started
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.parts import ReplaceError
from dualpath.serving import words as w

SERVER = "server"
LOOK_S = 0.02
Word = TypeVar("Word")


def run_server(
    orders: w.Orders, listener: socket.socket, control: socket.socket | None, pipes: w.Pipes, telling: Connection
) -> None:
    """The server part's process. Its imports are its own."""
    from dualpath.serving import server_process

    server_process.run_server(orders, listener, control, pipes, telling)


class ServerPart:
    """The pipes to every server that runs: one, none, or two while one succeeds the other.

    `on_word(child, word)` is called for what a server says of itself, `kill(ticket)` when it wants an engine dead.
    """

    def __init__(
        self,
        config: ClusterConfig,
        local_engines: bool,
        listener: socket.socket,
        control: socket.socket | None,
        *,
        on_word: Callable[[Child, object], None],
        kill: Callable[[str], None],
    ) -> None:
        self._config = config
        self._local_engines = local_engines
        self._sockets = listener, control
        self._on_word = on_word
        self._kill = kill
        self._loop = asyncio.get_running_loop()
        self._pipes: dict[str, Connection] = {}
        """Ticket → the pipe for words."""
        self._answers: dict[tuple[str, type[Any]], Any] = {}
        self.has_served = False
        self.weights: tuple[str, str] | None = None
        """What has been served at last; None before."""
        self.greeting: list[object] = []
        """What each new server is told first."""

    def start(self, child: Child) -> BaseProcess:
        """On a starter's thread."""
        words, its_words = Pipe()
        kills, its_kills = Pipe()
        orders = w.Orders(
            config=self._config,
            local_engines=self._local_engines,
            parent=os.getpid(),
            comes_back=self.has_served,
            weights=self.weights,
            succeeds=bool(self._pipes),
        )
        try:
            arguments = (orders, *self._sockets, w.Pipes(its_words, its_kills), child.telling)
            process = started("spawn", run_server, arguments, child.name)
        finally:
            its_words.close()
            its_kills.close()
        self._pipes[child.ticket] = words
        self._loop.call_soon_threadsafe(self._attach, child, words, kills)
        return process

    def _attach(self, child: Child, words: Connection, kills: Connection) -> None:
        self._loop.add_reader(words, self._hear, child, words)
        self._loop.add_reader(kills, self._kill_for, kills)
        for word in self.greeting:
            self.say(child, word)

    def _hear(self, child: Child, words: Connection) -> None:
        try:
            heard = w.heard(words)
        except (EOFError, OSError):
            self._loop.remove_reader(words)
            words.close()
            return
        for word in heard:
            about = word.ticket if isinstance(word, w.Retired) else child.ticket
            self._answers[about, type(word)] = word
            self._on_word(child, word)

    def _kill_for(self, kills: Connection) -> None:
        try:
            self._kill(str(kills.recv()))
            kills.send(True)
        except (EOFError, OSError):
            self._loop.remove_reader(kills)
            kills.close()

    def say(self, child: Child | None, word: object) -> None:
        """Say it to one server; nothing happens when that is gone."""
        words = self._pipes.get(child.ticket) if child is not None else None
        if words is not None:
            with contextlib.suppress(OSError):
                words.send(word)

    def say_to_all(self, word: object) -> None:
        for words in list(self._pipes.values()):
            with contextlib.suppress(OSError):
                words.send(word)

    @property
    def runs(self) -> bool:
        return bool(self._pipes)

    def ended(self, child: Child) -> None:
        """That server's process has ended."""
        self._pipes.pop(child.ticket, None)
        self._answers = {key: word for key, word in self._answers.items() if key[0] != child.ticket}

    async def answer(self, child: Child, kind: type[Word], timeout_s: float) -> Word:
        """Wait for a word of, or about, a child. Raises ReplaceError when no server is left to say it, or none does."""
        give_up_s = self._loop.time() + timeout_s
        while (word := self._answers.pop((child.ticket, kind), None)) is None:
            if self._loop.time() > give_up_s or not self._pipes or not child.is_alive:
                raise ReplaceError(f"there was no {kind.__name__} of {child.name}; see the log")
            await asyncio.sleep(LOOK_S)
        return word  # type: ignore[no-any-return]

    async def gone(self, child: Child, timeout_s: float) -> None:
        """Wait until a server has ended. Raises ReplaceError when that takes longer."""
        give_up_s = self._loop.time() + timeout_s
        while child.ticket in self._pipes:
            if self._loop.time() > give_up_s:
                raise ReplaceError(f"the old {child.name} has not ended its requests within {timeout_s:.0f} s")
            await asyncio.sleep(LOOK_S)
