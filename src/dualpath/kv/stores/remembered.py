"""What a process remembers of tenants is bounded: there may be millions."""

from contextlib import suppress
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def remember(known: dict[K, V], name: K, value: V, most: int) -> None:
    """Keep `value`, and forget the oldest of more than `most`. Threads may share `known`."""
    known.pop(name, None)
    known[name] = value
    while len(known) > most:
        with suppress(KeyError, StopIteration, RuntimeError):  # another thread forgets at the same time
            del known[next(iter(known))]
