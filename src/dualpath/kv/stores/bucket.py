"""`Bucket`: named objects behind S3, Google Cloud, Azure or plain HTTP (WebDAV), through obstore.

It uses only what every such server can do: whole PUTs, which appear at once or not at all, GET, HEAD, DELETE, and lists
of one folder. Requests are retried for `RETRY_S` and end after `REQUEST_S`. A server that still does not answer raises
`StoreError`; an object that does not exist is None. The functions block, without the GIL.

For `COOL_S` after such a failure every call fails at once, so that a prompt of many blocks does not wait for each.
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

REQUEST_S = 60.0
"""Longest duration of one request, body included."""
CONNECT_S = 5.0
RETRY_S = 10.0
MAX_RETRIES = 4
COOL_S = 1.0
PIECE_BYTES = 256 * 1024
"""Approximate size of the pieces in which bodies arrive."""
_SECRETS = ("key", "secret", "token", "password")


class ObjectRecord(msgspec.Struct, frozen=True, gc=False):
    """An object as a list or a HEAD describes it."""

    name: str
    n_bytes: int
    mtime_ns: int


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

    `folder` is a prefix of every name.
    """

    def __init__(
        self, objects: Any, location: str, folder: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._objects = objects
        self._clock = clock
        self._away_until = float("-inf")
        self._folder = f"{folder}/" if folder else ""
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
            objects = from_url(
                f"{parts.scheme}://{parts.netloc}/" if folder else plain,
                client_options={
                    "allow_http": insecure,
                    "connect_timeout": timedelta(seconds=CONNECT_S),
                    "timeout": timedelta(seconds=REQUEST_S),
                },
                retry_config={"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)},
                **config,
            )
        except (BaseError, ValueError, TypeError) as error:
            raise StoreLocationError(f"the store at {url} cannot be opened: {_summary(error)}") from error
        return cls(objects, plain, folder)

    def get(self, name: str) -> Body | None:
        """Returns the object; None if there is none. Iterating over its pieces may raise StoreError."""
        with self._errors(f"{name} can't be read"):
            try:
                found = obstore.get(self._objects, self._folder + name)
            except FileNotFoundError:
                return None
            return Body(found.meta["size"], self._pieces(name, found.stream(min_chunk_size=PIECE_BYTES)))

    def head_bytes(self, name: str, n_bytes: int) -> bytes | None:
        """Returns up to `n_bytes` from the object's start; None if there is none. Raises StoreError."""
        with self._errors(f"{name} can't be read"):
            try:
                return bytes(obstore.get(self._objects, self._folder + name, options={"range": (0, n_bytes)}).bytes())
            except FileNotFoundError:
                return None

    def record(self, name: str) -> ObjectRecord | None:
        """Returns the object's record; None if there is none. Raises StoreError."""
        with self._errors(f"{name} can't be found"):
            try:
                return self._record(obstore.head(self._objects, self._folder + name))
            except FileNotFoundError:
                return None

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write an object of `parts`, whole or not at all; replaces an existing one. Raises StoreError."""
        with self._errors(f"{name} can't be written"):
            obstore.put(self._objects, self._folder + name, iter(parts), use_multipart=False)

    def delete(self, name: str) -> None:
        """Delete an object; a missing one is not an error. Raises StoreError."""
        with self._errors(f"{name} can't be deleted"), suppress(FileNotFoundError):
            obstore.delete(self._objects, self._folder + name)

    def folder(self, name: str = "") -> tuple[list[str], list[ObjectRecord]]:
        """Returns the names of the folders and the objects directly in a folder, both in order. Raises StoreError."""
        prefix = f"{self._folder}{name}/" if name else self._folder
        with self._errors(f"{name or '/'} can't be listed"):
            try:
                found = obstore.list_with_delimiter(self._objects, prefix or None)
            except FileNotFoundError:
                return [], []
            folders = sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"])
            return folders, sorted(map(self._record, found["objects"]), key=lambda record: record.name)

    def _pieces(self, name: str, stream: Any) -> Iterator[memoryview]:
        with self._errors(f"{name} can't be read to its end"):
            for piece in stream:
                yield memoryview(piece)

    def _record(self, meta: _Meta) -> ObjectRecord:
        mtime_ns = round(meta["last_modified"].timestamp() * 1e9)
        return ObjectRecord(meta["path"].removeprefix(self._folder), meta["size"], mtime_ns)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        if self._clock() < self._away_until:
            raise StoreError(f"{self.location}: {what}: the server did not answer a moment ago")
        try:
            yield
        except (BaseError, OSError) as error:
            self._away_until = self._clock() + COOL_S
            raise StoreError(f"{self.location}: {what}: {_summary(error)}") from error


def _summary(error: Exception) -> str:
    """Shortens obstore's messages, which contain pages of debugging output."""
    return str(error).strip().splitlines()[0]
