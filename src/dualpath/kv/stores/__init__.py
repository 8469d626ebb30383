"""External storage for Full Blocks: the stores that ``--store`` names.

`protocol` says what a store promises; read it first. Ours are `posix` (files of a directory) and `objects` (S3, HTTP).
Packages add others through the entry-point group ``dualpath.stores``: docs/how-to/add-a-store.md.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from dualpath.kv.stores.errors import StoreError, StoreLocationError
from dualpath.kv.stores.protocol import Inspectable, Store
from dualpath.spec.registry import Registry, UnknownNameError, misfit


class StoreOpener(Protocol):
    """Opens the stores of one URL scheme. Called once in every process that uses the store, with the ``--store`` value.

    `durable` False means that blocks need not survive a power cut. It should contact no server yet, so that a bad
    location is reported before engines start. Raises StoreLocationError when the location is invalid.
    """

    def __call__(self, location: str, *, durable: bool) -> Store: ...


def _posix() -> StoreOpener:
    from dualpath.kv.stores.posix import PosixStore

    def opened(location: str, *, durable: bool) -> Store:
        scheme, _, _ = location.partition("://")
        return PosixStore(Path(unquote(urlsplit(location).path)) if scheme == "file" else location, durable=durable)

    return opened


def _objects() -> StoreOpener:
    """Imports obstore only when it is needed: it starts threads, and is an extra."""
    if find_spec("obstore") is None:
        raise StoreLocationError("stores of objects need the package obstore: pip install 'dualpath[s3]'")
    from dualpath.kv.stores.bucket import Bucket
    from dualpath.kv.stores.objects import ObjectStore

    def opened(location: str, *, durable: bool) -> Store:  # noqa: ARG001 (a server flushes as it is configured to)
        return ObjectStore(Bucket.open(location))

    return opened


_OURS: dict[str, Callable[[], StoreOpener]] = {
    "file": _posix,
    **dict.fromkeys(("s3", "gs", "az", "http", "https"), _objects),
}
STORES: Registry[StoreOpener] = Registry("kind of store", "dualpath.stores", _OURS)
"""Kinds of stores by the scheme of their URL."""


def open_store(location: str | Path, *, durable: bool = True) -> Store:
    """Returns the store that ``--store`` names: a directory, or a URL whose scheme gives the kind of store.

    Raises StoreLocationError when the location can't be a store. It contacts and creates nothing yet.
    """
    scheme, is_url, _ = str(location).partition("://")
    try:
        opener = STORES.get(scheme if is_url else "file")
    except UnknownNameError as error:
        raise StoreLocationError(f"--store {location}: {error}; or write a directory") from error
    if not callable(opener):
        raise StoreLocationError(
            f"--store {location}: {scheme} names {opener!r}, which opens no store; name a function"
        )
    try:
        store = opener(str(location), durable=durable)
        fault = misfit(store, Store) or (misfit(store, Inspectable) if isinstance(store, Inspectable) else "")
    except StoreError:
        raise
    except (Exception, SystemExit) as error:  # another package's code may raise anything
        raise StoreLocationError(f"--store {location} can't be opened: {type(error).__name__}: {error}") from error
    if fault:
        raise StoreLocationError(
            f"--store {location}: {type(store).__name__} is no store: it {fault}; see docs/how-to/add-a-store.md"
        )
    return store
