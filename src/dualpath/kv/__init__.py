"""KV-cache blocks: their keys and layout, the index of what is stored, and the stores that keep them."""

from dualpath.kv.block_file import BlockError, BlockFault
from dualpath.kv.catalog import RebuildReport, rebuild
from dualpath.kv.directory import stored_namespaces
from dualpath.kv.index import IndexStatistics, PrefixIndex
from dualpath.kv.keys import BlockKey, Namespace, block_keys, namespace
from dualpath.kv.layout import KVLayout, KVPart
from dualpath.kv.posix_store import PosixStore
from dualpath.kv.storage import Storage
from dualpath.kv.store import Store, StoreError, StoreWriteError

__all__ = [
    "BlockError",
    "BlockFault",
    "BlockKey",
    "IndexStatistics",
    "KVLayout",
    "KVPart",
    "Namespace",
    "PosixStore",
    "PrefixIndex",
    "RebuildReport",
    "Storage",
    "Store",
    "StoreError",
    "StoreWriteError",
    "block_keys",
    "namespace",
    "rebuild",
    "stored_namespaces",
]
