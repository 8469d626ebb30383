"""`Bucket`: named objects behind S3, Google Cloud, Azure or plain HTTP (WebDAV), through obstore.

It uses only what every such server can do: whole PUTs, which appear at once or not at all, GET, HEAD, DELETE, and lists
of one folder. Requests are retried for `RETRY_S` and end after `REQUEST_S`. An object that does not exist is None. The
functions block, without the GIL.

A request that fails says nothing of the others: a server may refuse one object, or break off its body. So a failure is
followed by a question: for the first byte of an object that was read before, or of one that nobody has. If the server
answers, the failure is that object's: `ObjectError`. If it does not, the failure is the server's: `StoreError`. For
`COOL_S` after such a failure every call that it speaks of (of this object, or of all) fails at once, so that a prompt
of many blocks does not wait for each. Refused writes never speak against reads; two refused objects in a row speak
against all writes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, TypedDict
from urllib.parse import parse_qsl, urlsplit

import msgspec
import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from dualpath.kv.stores.errors import StoreError, StoreLocationError
from dualpath.kv.stores.remembered import remember

REQUEST_S = 60.0
"""Longest duration of one request, body included."""
CONNECT_S = 5.0
RETRY_S = 10.0
MAX_RETRIES = 4
COOL_S = 1.0
PROBE_S = 5.0
"""Longest duration of the question whether the server answers at all."""
MAX_REFUSED = 1024
"""Most objects that are remembered as refused."""
PROBE = "dualpath-probe"
"""A name that no object has: a server that says so answers."""
PIECE_BYTES = 256 * 1024
"""Approximate size of the pieces in which bodies arrive."""
_SECRETS = ("key", "secret", "token", "password")


class ObjectRecord(msgspec.Struct, frozen=True, gc=False):
    """An object as a list or a HEAD describes it."""

    name: str
    n_bytes: int
    mtime_ns: int


class ObjectError(StoreError):
    """One object can't be read, written or listed now, while the server answers other requests."""


class Body(msgspec.Struct, frozen=True):
    """An object being received: its length as the server says, and its bytes in pieces."""

    n_bytes: int
    pieces: Iterator[memoryview]


class _Meta(TypedDict):
    path: str
    size: int
    last_modified: datetime


class Bucket:
    """`objects` is an obstore store, `location` its name in messages; `Bucket.open` makes both from a URL.

    `folder` is a prefix of every name. `probes` is a store of the same objects that gives up sooner.
    """

    def __init__(
        self,
        objects: Any,
        location: str,
        folder: str = "",
        clock: Callable[[], float] = time.monotonic,
        probes: Any = None,
    ) -> None:
        self._objects = objects
        self._probes = objects if probes is None else probes
        self._folder = f"{folder}/" if folder else ""
        self._health = Health(clock, self._answers)
        self._known: str | None = None
        self.location = location

    @classmethod
    def open(cls, url: str) -> "Bucket":
        """Open ``s3://bucket/prefix?endpoint=http://host:port&region=…`` or ``http://host/prefix``; contacts no server.

        The query's names are obstore's configuration; credentials come from the environment (``AWS_ACCESS_KEY_ID``, …).
        Raises StoreLocationError when the URL can't be a store.
        """
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        secret = next((name for name in options if any(word in name for word in _SECRETS)), None)
        if secret is not None:
            raise StoreLocationError(
                f"--store: {secret} in a URL shows in process lists; set the environment variable instead"
            )
        plain = parts._replace(query="", fragment="").geturl().rstrip("/")
        # obstore 0.12 lists a WebDAV server's folders wrongly when its URL has a path, so the path goes into `folder`.
        folder = parts.path.strip("/") if parts.scheme in ("http", "https") else ""
        insecure = parts.scheme == "http" or options.get("endpoint", "").startswith("http://")
        config: dict[str, Any] = {"config": options} if options else {}
        try:
            objects, probes = (
                from_url(
                    f"{parts.scheme}://{parts.netloc}/" if folder else plain,
                    client_options={
                        "allow_http": insecure,
                        "connect_timeout": timedelta(seconds=CONNECT_S),
                        "timeout": timedelta(seconds=most_s),
                    },
                    retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=RETRY_S)},
                    **config,
                )
                for most_s, retries in ((REQUEST_S, MAX_RETRIES), (PROBE_S, 0))
            )
        except (BaseError, ValueError, TypeError) as error:
            raise StoreLocationError(f"the store at {url} cannot be opened: {_summary(error)}") from error
        return cls(objects, plain, folder, probes=probes)

    def get(self, name: str, ends: tuple[int, int] | None = None) -> Body | None:
        """Returns the object, or its bytes ``(start, stop)``; None if there is none.

        Iterating over its pieces may raise StoreError, too.
        """
        with self._errors("read", name):
            try:
                found = obstore.get(self._objects, self._folder + name, options={"range": ends} if ends else None)
            except FileNotFoundError:
                return None
            return Body(found.meta["size"], self._pieces(name, found.stream(min_chunk_size=PIECE_BYTES)))

    def head_bytes(self, name: str, n_bytes: int) -> bytes | None:
        """Returns up to `n_bytes` from the object's start; None if there is none. Raises StoreError."""
        with self._errors("read", name):
            try:
                return bytes(obstore.get(self._objects, self._folder + name, options={"range": (0, n_bytes)}).bytes())
            except FileNotFoundError:
                return None

    def record(self, name: str) -> ObjectRecord | None:
        """Returns the object's record; None if there is none. Raises StoreError."""
        with self._errors("read", name):
            try:
                return self._record(obstore.head(self._objects, self._folder + name))
            except FileNotFoundError:
                return None

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write an object of `parts`, whole or not at all; replaces an existing one. Raises StoreError."""
        with self._errors("written", name):
            obstore.put(self._objects, self._folder + name, iter(parts), use_multipart=False)

    def delete(self, name: str) -> None:
        """Delete an object; a missing one is not an error. Raises StoreError."""
        with self._errors("deleted", name), suppress(FileNotFoundError):
            obstore.delete(self._objects, self._folder + name)

    def folder(self, name: str = "") -> tuple[list[str], list[ObjectRecord]]:
        """Returns the names of the folders and the objects directly in a folder, both in order. Raises StoreError."""
        prefix = f"{self._folder}{name}/" if name else self._folder
        with self._errors("listed", f"{name}/"):
            try:
                found = obstore.list_with_delimiter(self._objects, prefix or None)
            except FileNotFoundError:
                return [], []
            folders = sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"])
            return folders, sorted(map(self._record, found["objects"]), key=lambda record: record.name)

    def _pieces(self, name: str, stream: Any) -> Iterator[memoryview]:
        with self._errors("read", name):
            for piece in stream:
                yield memoryview(piece)
        self._known = name

    def _record(self, meta: _Meta) -> ObjectRecord:
        mtime_ns = round(meta["last_modified"].timestamp() * 1e9)
        return ObjectRecord(meta["path"].removeprefix(self._folder), meta["size"], mtime_ns)

    @contextmanager
    def _errors(self, done: str, name: str) -> Iterator[None]:
        """Raises StoreError, or ObjectError where only the object `name` can't be read, written, deleted or listed."""
        what = f"{self.location}: {name} can't be {done}"
        self._health.check(done, name, what)
        try:
            yield
        except (BaseError, OSError) as error:
            kind = self._health.failed(done, name)
            raise kind(f"{what}: {_summary(error)}") from error
        self._health.succeeded(done)

    def _answers(self, name: str) -> bool:
        """Ask the server for one byte of another object than `name`. Returns True if it gives it, or has no such."""
        for other in {self._known, PROBE} - {None, name}:
            try:
                obstore.get(self._probes, f"{self._folder}{other}", options={"range": (0, 1)}).bytes()
            except FileNotFoundError:
                return True
            except (BaseError, OSError):
                continue
            return True
        return False


class Health:
    """What recent failures speak against: one object, all writes, or the server. Times are the clock's, in seconds.

    `answers` asks the server for another object than the one it is given.
    """

    def __init__(self, clock: Callable[[], float], answers: Callable[[str], bool]) -> None:
        self._clock = clock
        self._answers = answers
        self._away_until = float("-inf")
        self._no_writes_until = float("-inf")
        self._unwritten: str | None = None
        self._refused_until: dict[tuple[str, str], float] = {}

    def check(self, done: str, name: str, what: str) -> None:
        """Raises StoreError or ObjectError at once where the same has just failed."""
        now = self._clock()
        if now < self._away_until:
            raise StoreError(f"{what}: the server did not answer a moment ago")
        if done == "written" and now < self._no_writes_until:
            raise StoreError(f"{what}: the server refused other objects a moment ago")
        if now < self._refused_until.get((done, name), now):
            raise ObjectError(f"{what}: the server refused it a moment ago")

    def failed(self, done: str, name: str) -> type[StoreError]:
        """Note a failure. Returns the kind of error that it is."""
        answers = self._answers(name)
        until = self._clock() + COOL_S
        if not answers:
            self._away_until = until
            return StoreError
        remember(self._refused_until, (done, name), until, MAX_REFUSED)
        if done == "written":
            if self._unwritten not in (None, name):
                self._no_writes_until = until
            self._unwritten = name
        return ObjectError

    def succeeded(self, done: str) -> None:
        if done == "written":
            self._unwritten = None


def _summary(error: Exception) -> str:
    """Shortens obstore's messages, which contain pages of debugging output."""
    return str(error).strip().splitlines()[0]
