"""The names in a store: files of a directory, objects of a bucket.

::

    <namespace hex>/namespace.json          model and layout, for people and for `dualpath store`
                    ab/ab…cd.kv             one file per Full Block, 256 shards by the key's first byte
                    ab/.ab…cd.kv.….tmp      a block being written, or a leftover of a killed process (directories only)
                    bad/ab…cd.checksum      quarantined files, never served again
"""

import os

import msgspec

from dualpath.kv.keys import KEY_BYTES, BlockKey, Namespace
from dualpath.kv.stores.errors import BlockFault
from dualpath.kv.stores.protocol import NamespaceDescription

MAX_QUARANTINED_FILES = 64
"""A namespace keeps this many bad files for inspection; quarantining one more deletes the oldest."""
MAX_BAD_STEM_BYTES = 200
"""Of a bad file's own name this much is kept: file systems take 255 bytes, and its fault comes behind it."""
DESCRIPTION = "namespace.json"
MAX_DESCRIPTION_BYTES = 1 << 16
"""A description of more bytes is none of ours; ours have less than a thousand."""
BLOCK_SUFFIX = ".kv"
BAD = "bad"


def block_name(root: BlockKey, key: BlockKey) -> str:
    """Returns a block's name in its store."""
    name = key.hex()
    return f"{root.hex()}/{name[:2]}/{name}{BLOCK_SUFFIX}"


def key_of(name: str) -> BlockKey | None:
    """Returns the key in a block file's name; None if it is not a key or is in the wrong shard."""
    shard, stem = name.removesuffix(BLOCK_SUFFIX).split("/")[-2:]
    return bytes.fromhex(stem) if is_namespace_name(stem) and stem[:2] == shard else None


def bad_name(name: str, cause: BlockFault) -> str:
    """Returns the name in quarantine of the bad file `name`, wherever it is in its namespace, or in its place."""
    parts = name.split("/")
    stem = os.fsdecode(os.fsencode(parts[-1].removesuffix(BLOCK_SUFFIX))[:MAX_BAD_STEM_BYTES])
    return f"{parts[0]}/{BAD}/{stem}.{cause.value}"


def is_namespace_name(name: str) -> bool:
    """Returns True when a folder may be a namespace: its name is a key in hexadecimal."""
    return len(name) == 2 * KEY_BYTES and _is_hex(name)


def is_shard_name(name: str) -> bool:
    """Returns True when a folder may hold block files: its name is two hexadecimal digits."""
    return len(name) == 2 and _is_hex(name)


def describe(space: Namespace) -> bytes:
    """Returns the content of ``namespace.json`` for a namespace."""
    description = NamespaceDescription(
        space.hex, space.model_fingerprint, space.weights_version, space.layout, space.salted
    )
    return msgspec.json.format(msgspec.json.encode(description)) + b"\n"


def described(text: bytes | None, root: BlockKey) -> NamespaceDescription | None:
    """Decodes what `describe` wrote for the namespace of `root`; None if missing, damaged or of another one."""
    try:
        found = msgspec.json.decode(text or b"", type=NamespaceDescription)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if found.namespace == root.hex() else None


def _is_hex(text: str) -> bool:
    return set(text) <= set("0123456789abcdef")
