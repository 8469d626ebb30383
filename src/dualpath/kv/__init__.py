"""KV-cache blocks: their keys and layout, the prefix index, and the stores. Start with `layout.py` and `keys.py`."""

from dualpath.kv.index import GoneBlock, IndexStatistics, PrefixIndex
from dualpath.kv.keys import BlockKey, Namespace, block_keys, namespace
from dualpath.kv.layout import KVLayout, KVPart, LayerKV
from dualpath.kv.rebuild import RebuildReport, ancestors, delete_orphan, publish_all, rebuild
from dualpath.kv.stores import STORES, StoreOpener, open_store
from dualpath.kv.stores.errors import (
    BlockError,
    BlockFault,
    BlockUnavailableError,
    StoreError,
    StoreLocationError,
    StoreWriteError,
)
from dualpath.kv.stores.posix import PosixStore
from dualpath.kv.stores.protocol import (
    BadFile,
    BlockRecord,
    Inspectable,
    NamespaceDescription,
    Store,
)

__all__ = [
    "STORES",
    "BadFile",
    "BlockError",
    "BlockFault",
    "BlockKey",
    "BlockRecord",
    "BlockUnavailableError",
    "GoneBlock",
    "IndexStatistics",
    "Inspectable",
    "KVLayout",
    "KVPart",
    "LayerKV",
    "Namespace",
    "NamespaceDescription",
    "PosixStore",
    "PrefixIndex",
    "RebuildReport",
    "Store",
    "StoreError",
    "StoreLocationError",
    "StoreOpener",
    "StoreWriteError",
    "ancestors",
    "block_keys",
    "delete_orphan",
    "namespace",
    "open_store",
    "publish_all",
    "rebuild",
]
