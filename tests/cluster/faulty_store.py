"""A store that hangs or refuses when told to: in this process, or by a file that other processes read, too.

Faults go by call, or by call and block: ``{"find": "hang", "read 0a1b…": "unavailable"}``. A call that hangs goes on
when its fault has gone, as one on a hard-mounted file system does.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from dualpath.kv import (
    BadFile,
    BlockFault,
    BlockKey,
    BlockRecord,
    BlockUnavailableError,
    Namespace,
    PosixStore,
    Store,
    StoreError,
    StoreWriteError,
)
from dualpath.kv.stores.block_file import Pace, unpaced
from dualpath.kv.stores.protocol import BlockBuffer

SCHEME = "tests.cluster.faulty_store:opened"
Faults = dict[str, str]


def opened(location: str, *, durable: bool) -> "FaultyStore":
    """Opens ``tests.cluster.faulty_store:opened://DIRECTORY``; its faults are in the file ``DIRECTORY.faults``."""
    folder = Path(location.partition("://")[2])

    def faults() -> Faults:
        try:
            found: Faults = json.loads(folder.with_suffix(".faults").read_text())
        except FileNotFoundError:
            return {}
        return found

    return FaultyStore(PosixStore(folder, durable=durable), faults)


def let(folder: Path, faults: Faults) -> None:
    """Give the store of `folder` these faults, and no other."""
    draft = folder.with_suffix(".draft")
    draft.write_text(json.dumps(faults))
    draft.rename(folder.with_suffix(".faults"))


class FaultyStore:
    """`calls` are those that have begun, in order."""

    def __init__(self, genuine: Store, faults: Callable[[], Faults]) -> None:
        self.location = genuine.location
        self.calls: list[str] = []
        self._genuine = genuine
        self._faults = faults

    def _suffer(self, call: str, key: BlockKey = b"") -> None:
        self.calls.append(call)

        def fault() -> str | None:
            faults = self._faults()
            return faults.get(call, faults.get(f"{call} {key.hex()}"))

        while fault() == "hang":
            time.sleep(0.005)
        match fault():
            case "refuse" if call == "write":
                raise StoreWriteError(key, self.location, OSError(28, "No space left on device"))
            case "refuse":
                raise StoreError(f"{self.location}: no route to host")
            case "odd":
                raise RuntimeError("a mistake in the store's code")
            case "unavailable":
                raise BlockUnavailableError(key, "403 Forbidden")

    def prepare(self, space: Namespace) -> None:
        self._suffer("prepare")
        self._genuine.prepare(space)

    def write(
        self, space: Namespace, key: BlockKey, parent: BlockKey, payload: BlockBuffer, pace: Pace = unpaced
    ) -> int:
        self._suffer("write", key)
        return self._genuine.write(space, key, parent, payload, pace)

    def read(
        self,
        space: Namespace,
        key: BlockKey,
        into: BlockBuffer,
        pace: Pace = unpaced,
        layers: Collection[int] | None = None,
    ) -> None:
        self._suffer("read", key)
        self._genuine.read(space, key, into, pace, layers)
        self._suffer("end read", key)

    def find(self, root: BlockKey, keys: Sequence[BlockKey]) -> list[BlockRecord]:
        self._suffer("find", keys[0])
        return self._genuine.find(root, keys)

    def delete(self, root: BlockKey, key: BlockKey) -> bool:
        self._suffer("delete", key)
        return self._genuine.delete(root, key)

    def quarantine(self, root: BlockKey, key: BlockKey) -> BlockFault | None:
        self._suffer("quarantine", key)
        return self._genuine.quarantine(root, key)

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:
        self._suffer("scan")
        return self._genuine.scan(on_bad)
