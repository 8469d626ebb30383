"""Full Blocks in one SQLite file that all engines of a host share: ``dualpath serve --store sqlite:///var/kv.db``.

A block is a row, and a transaction makes it appear whole. Every thread has a connection of its own.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dualpath.kv import (
    BadFile,
    BlockError,
    BlockFault,
    BlockKey,
    BlockRecord,
    Namespace,
    NamespaceDescription,
    StoreError,
    StoreLocationError,
    StoreWriteError,
)
from dualpath.kv.stores.block_file import CHUNK_BYTES, Pace, unpaced
from dualpath.kv.stores.naming import describe, described
from dualpath.kv.stores.protocol import BlockBuffer, bytes_of_block, check_keys, room_for_block

TABLES = """
CREATE TABLE IF NOT EXISTS namespaces (root BLOB PRIMARY KEY, description BLOB);
CREATE TABLE IF NOT EXISTS blocks (root BLOB, key BLOB, parent BLOB, bytes INTEGER, mtime_ns INTEGER, digest BLOB,
  fault TEXT, payload BLOB, PRIMARY KEY (root, key));
"""
RECORD = "SELECT root, key, parent, bytes, bytes, mtime_ns FROM blocks WHERE fault IS NULL"
ROW = "root = ? AND key = ? AND fault IS NULL"
SOUND = "SELECT 1 FROM blocks WHERE root = ? AND fault IS NULL"
BUSY_S = 30.0


class SqliteStore:
    """A `Store` and `Inspectable`. `location` is ``sqlite:///path/to/file``."""

    def __init__(self, location: str, *, durable: bool) -> None:
        self.location = location
        self._path = Path(unquote(location.partition("://")[2]))
        self._synchronous = "FULL" if durable else "OFF"
        self._thread = threading.local()
        if not self._path.is_absolute():
            raise StoreLocationError(f"{location} names no file; write sqlite:///path/to/file")

    def prepare(self, space: Namespace) -> None:  # noqa: ARG002 (a namespace is described with its first block)
        with self._errors():
            self._db()

    def write(
        self, space: Namespace, key: BlockKey, parent: BlockKey, payload: BlockBuffer, pace: Pace = unpaced
    ) -> int:
        check_keys(key, parent)
        view = bytes_of_block(payload, space.layout)
        for start in range(0, len(view), CHUNK_BYTES):
            pace(min(CHUNK_BYTES, len(view) - start))
        row = (space.root, key, parent, len(view), time.time_ns(), blake2b(view).digest(), None, view)
        try:
            if not self._is_sound(space.root, key):
                self._db().execute("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
                self._db().execute("INSERT OR REPLACE INTO namespaces VALUES (?, ?)", (space.root, describe(space)))
                self.verify(space.root, key)
        except (sqlite3.Error, OSError, BlockError) as error:
            raise StoreWriteError(key, self.location, error) from error
        return len(view)

    def read(
        self,
        space: Namespace,
        key: BlockKey,
        into: BlockBuffer,
        pace: Pace = unpaced,
        layers: Collection[int] | None = None,  # noqa: ARG002 (a row is read as a whole, so all are filled)
    ) -> None:
        room = room_for_block(into, space.layout)
        payload = self._payload(space.root, key)
        if len(payload) != len(room):
            raise BlockError(key, BlockFault.HEADER, f"{len(payload)} bytes instead of {len(room)}")
        for start in range(0, len(room), CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, len(room))
            pace(stop - start)
            room[start:stop] = payload[start:stop]

    def find(self, root: BlockKey, keys: Sequence[BlockKey]) -> list[BlockRecord]:
        records: list[BlockRecord] = []
        for key in keys:
            row = self._one(f"{RECORD} AND root = ? AND key = ?", root, key)
            if row is None:
                break
            records.append(BlockRecord(*row))
        return records

    def delete(self, root: BlockKey, key: BlockKey) -> bool:
        with self._errors():
            deleted = self._db().execute(f"DELETE FROM blocks WHERE {ROW}", (root, key)).rowcount > 0
            for table in ("namespaces", "blocks"):  # the last block takes its namespace and its bad blocks with it
                self._db().execute(f"DELETE FROM {table} WHERE root = ? AND NOT EXISTS ({SOUND})", (root, root))
            return deleted

    def quarantine(self, root: BlockKey, key: BlockKey) -> BlockFault | None:
        try:
            self.verify(root, key)
        except BlockError as error:
            if error.cause is not BlockFault.MISSING:
                with self._errors():
                    self._db().execute(f"UPDATE blocks SET fault = ? WHERE {ROW}", (error.cause.value, root, key))
                return error.cause
        return None

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:  # noqa: ARG002
        with self._errors(), closing(self._db().execute(RECORD)) as rows:
            yield from (BlockRecord(*row) for row in rows)

    # What `dualpath store stat` and `fsck` ask; a store may do without.

    def descriptions(self) -> dict[BlockKey, NamespaceDescription | None]:
        with self._errors():
            return {root: described(text, root) for root, text in self._db().execute("SELECT * FROM namespaces")}

    def verify(self, root: BlockKey, key: BlockKey) -> None:
        self._payload(root, key)

    def set_aside(self, file: BadFile) -> None:
        """Every row has a key."""

    def quarantined(self, root: BlockKey) -> int:
        return int(self._one("SELECT count(*) FROM blocks WHERE root = ? AND fault IS NOT NULL", root)[0])

    def leftovers(self, *, remove: bool = False) -> list[str]:  # noqa: ARG002
        return []

    def _payload(self, root: BlockKey, key: BlockKey) -> bytes:
        """Raises BlockError."""
        row = self._one(f"SELECT payload, digest FROM blocks WHERE {ROW}", root, key)
        if row is None:
            raise BlockError(key, BlockFault.MISSING, f"{self.location} has no such row")
        if blake2b(row[0]).digest() != row[1]:
            raise BlockError(key, BlockFault.CHECKSUM, "the payload does not match its digest")
        return bytes(row[0])

    def _is_sound(self, root: BlockKey, key: BlockKey) -> bool:
        try:
            self.verify(root, key)
        except BlockError:
            return False
        return True

    def _one(self, query: str, *values: BlockKey) -> Any:
        with self._errors():
            return self._db().execute(query, values).fetchone()

    def _db(self) -> sqlite3.Connection:
        """This thread's connection; a new one where somebody has removed the file, which a connection would not see."""
        there = self._path.stat().st_ino if self._path.exists() else None
        if there is None or there != getattr(self._thread, "inode", None):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._thread.db = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)
            self._thread.db.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous={self._synchronous};{TABLES}")
            self._thread.inode = self._path.stat().st_ino
        db: sqlite3.Connection = self._thread.db
        return db

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.location}: {error}; check the file and the disk") from error
