"""What the supervisor and the server part say to each other, over a pipe. Both are of one version and one user."""

from multiprocessing.connection import Connection
from typing import Any

import msgspec

from dualpath.cluster.config import ClusterConfig

# ── supervisor → server ──────────────────────────────────────────────────────────────────────────────────────────────


class Stop(msgspec.Struct, frozen=True):
    """The first: end, after running requests have had their time. The second: end at once."""


class Table(msgspec.Struct, frozen=True):
    """The parts that are not ready, for /health, and how often one was started again."""

    starting: list[dict[str, object]]
    restarts: int


class Ended(msgspec.Struct, frozen=True):
    """The engine's process has ended."""

    ticket: str


class Hopeless(msgspec.Struct, frozen=True):
    """An engine can't start."""

    why: str


class Retire(msgspec.Struct, frozen=True):
    """Give the engine nothing more to do, and dismiss it when it has nothing in hand; the answer is `Retired`."""

    ticket: str


class HandOver(msgspec.Struct, frozen=True):
    """A successor is ready: take no more connections, answer `HandedOver`, end when all requests have their answers."""


class MayListen(msgspec.Struct, frozen=True):
    """To a successor: the server before takes no more connections."""


class MayControl(msgspec.Struct, frozen=True):
    """To a successor: the server before has ended."""


# ── server → supervisor ──────────────────────────────────────────────────────────────────────────────────────────────


class Joined(msgspec.Struct, frozen=True):
    """An engine is a member of the cluster now."""

    ticket: str


class Retired(msgspec.Struct, frozen=True):
    """Answer to `Retire`. With an `error` the engine serves on."""

    ticket: str
    error: str = ""


class HandedOver(msgspec.Struct, frozen=True):
    """Answer to `HandOver`."""


class Loaded(msgspec.Struct, frozen=True):
    """A successor is ready to listen."""


class Serving(msgspec.Struct, frozen=True):
    """Requests are answered. Said again whenever `facts`, the ready file's content, have changed."""

    facts: dict[str, object]
    welcome: str
    weights: tuple[str, str]
    """What is served now: the checkpoint's path, and its version."""


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What the server part starts with."""

    config: ClusterConfig
    local_engines: bool
    parent: int
    comes_back: bool
    """Whether one has served before."""
    weights: tuple[str, str] | None
    """What that one has served at last."""
    succeeds: bool
    """Whether that one still runs, and hands over."""


class Pipes(msgspec.Struct, frozen=True):
    """The server part's ends: one for words, and one on which it names a ticket and waits until that child is dead."""

    words: Connection
    kills: Connection


def heard(pipe: Connection) -> list[Any]:
    """Returns what has come. Raises EOFError or OSError when the other end is gone and nothing has come."""
    words: list[Any] = []
    try:
        while pipe.poll():
            words.append(pipe.recv())
    except (EOFError, OSError):
        if not words:
            raise
    return words
