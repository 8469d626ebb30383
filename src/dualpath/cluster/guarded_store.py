"""`guarded`: a store whose every failure is one that a store may have, whatever its code raises.

A store may be another package's. An exception that `kv.stores.errors` does not know, a panic in native code among them,
or a result of a wrong kind, is a mistake in the store; it must not end the engine or the coordinator that has called.
So it counts as `StoreError`: prompts are computed meanwhile. Its traceback is logged, once for each kind.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from dualpath.cluster.deadline_threads import AbandonedError
from dualpath.kv import (
    BadFile,
    BlockError,
    BlockFault,
    BlockKey,
    BlockRecord,
    Inspectable,
    Namespace,
    NamespaceDescription,
    Store,
    StoreError,
)
from dualpath.kv.stores.block_file import Pace, unpaced
from dualpath.kv.stores.protocol import BlockBuffer
from dualpath.spec.log import ROOT

logger = logging.getLogger(f"{ROOT}.store")

T = TypeVar("T")
_KNOWN = (StoreError, OSError, MemoryError, AbandonedError)
"""What callers expect; AbandonedError is their own, and comes through `pace`."""
MAX_TOLD = 100
"""Most kinds of mistakes that are logged."""


def guarded(store: Store) -> Store:
    return _GuardedInspectable(store) if isinstance(store, Inspectable) else _Guarded(store)


class _Guarded:
    def __init__(self, genuine: Store) -> None:
        self.location = genuine.location
        self._genuine = genuine
        self._told: set[tuple[str, str]] = set()

    def prepare(self, space: Namespace) -> None:
        self._ask("prepare", lambda: self._genuine.prepare(space))

    def write(
        self, space: Namespace, key: BlockKey, parent: BlockKey, payload: BlockBuffer, pace: Pace = unpaced
    ) -> int:
        return self._ask("write", lambda: _made(self._genuine.write(space, key, parent, payload, pace), int))

    def read(
        self,
        space: Namespace,
        key: BlockKey,
        into: BlockBuffer,
        pace: Pace = unpaced,
        layers: Collection[int] | None = None,
    ) -> None:
        self._ask("read", lambda: self._genuine.read(space, key, into, pace, layers))

    def find(self, root: BlockKey, keys: Sequence[BlockKey]) -> list[BlockRecord]:
        return self._ask("find", lambda: [_made(found, BlockRecord) for found in self._genuine.find(root, keys)])

    def delete(self, root: BlockKey, key: BlockKey) -> bool:
        return self._ask("delete", lambda: bool(self._genuine.delete(root, key)))

    def quarantine(self, root: BlockKey, key: BlockKey) -> BlockFault | None:
        return self._ask("quarantine", lambda: self._genuine.quarantine(root, key))

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:
        records = self._ask("scan", lambda: iter(self._genuine.scan(on_bad)))
        while (record := self._ask("scan", partial(next, records, None))) is not None:
            yield self._ask("scan", partial(_made, record, BlockRecord))

    def _ask(self, name: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except _KNOWN:
            raise
        except BlockError as error:
            if isinstance(error.cause, BlockFault):
                raise
            raise self._mistake(name, error) from error
        except BaseException as error:  # native code's panics are no Exception; no signal arrives on these threads
            raise self._mistake(name, error) from error

    def _mistake(self, name: str, error: BaseException) -> StoreError:
        what = f"{self.location}: its {name} raised {type(error).__name__}: {error}"
        kind = name, type(error).__name__
        if kind not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(kind)
            logger.error("the store makes a mistake, which counts as its failure: %s", what, exc_info=error)
        return StoreError(what)


class _GuardedInspectable(_Guarded):
    def __init__(self, genuine: Inspectable) -> None:
        super().__init__(genuine)
        self._genuine: Inspectable = genuine

    def descriptions(self) -> dict[BlockKey, NamespaceDescription | None]:
        return self._ask("descriptions", lambda: self._genuine.descriptions())

    def verify(self, root: BlockKey, key: BlockKey) -> None:
        self._ask("verify", lambda: self._genuine.verify(root, key))

    def set_aside(self, file: BadFile) -> None:
        self._ask("set_aside", lambda: self._genuine.set_aside(file))

    def quarantined(self, root: BlockKey) -> int:
        return self._ask("quarantined", lambda: self._genuine.quarantined(root))

    def leftovers(self, *, remove: bool = False) -> list[str]:
        return self._ask("leftovers", lambda: self._genuine.leftovers(remove=remove))


def _made(result: Any, kind: type[T]) -> T:
    """Raises TypeError for a result of another kind."""
    if not isinstance(result, kind):
        raise TypeError(f"it returned {type(result).__name__}, where {kind.__name__} was due")
    return result
