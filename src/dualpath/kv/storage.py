"""`Storage`: a directory or a bucket, and the stores of namespaces in it."""

from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.kv.directory import DESCRIPTION, described, is_namespace_name, namespaces_of, stored_namespaces
from dualpath.kv.keys import Namespace
from dualpath.kv.layout import KVLayout
from dualpath.kv.posix_store import PosixStore
from dualpath.kv.store import Store

if TYPE_CHECKING:
    from dualpath.kv.bucket import Bucket

_MAX_DESCRIPTION_BYTES = 1 << 20


class Storage:
    """What ``--store`` names: a directory, or a URL such as ``s3://bucket/prefix?endpoint=…`` or ``http://host/prefix``.

    `durable` is a directory's: an object server flushes as it is configured to. Used from many threads. Raises
    StoreError for a URL that can't be one; nothing is opened yet.
    """

    def __init__(self, location: str | Path, layout: KVLayout, *, durable: bool = True) -> None:
        self._location = str(location)
        self._layout = layout
        self._durable = durable
        self._bucket = _bucket_of(self._location)

    def open(self, space: Namespace) -> Store:
        """The store of a namespace, made if absent. Raises StoreError, ValueError as they do."""
        if self._bucket is None:
            return PosixStore(self._location, self._layout, space, durable=self._durable)
        from dualpath.kv.object_store import ObjectStore

        return ObjectStore(self._bucket, self._layout, space)

    def namespaces(self) -> list[Namespace]:
        """The described namespaces of this layout, in the order of their names. Raises StoreError, OSError."""
        if self._bucket is None:
            return stored_namespaces(self._location, self._layout)
        names = filter(is_namespace_name, self._bucket.folder()[0])
        texts = ((name, self._bucket.head_bytes(f"{name}/{DESCRIPTION}", _MAX_DESCRIPTION_BYTES)) for name in names)
        return namespaces_of((described(text, name) for name, text in texts if text is not None), self._layout)


def _bucket_of(location: str) -> "Bucket | None":
    """None for a directory. obstore is only imported where it is needed: it starts threads of its own."""
    if "://" not in location:
        return None
    from dualpath.kv.bucket import Bucket

    return Bucket.open(location)
