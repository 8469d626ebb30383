"""Names of Full Blocks: a key names a whole prefix, so equal keys mean equal KV.

Theory of operation. A *namespace* is everything besides the tokens that decides what KV bytes are: the model, the
version of its weights, the layout, and a tenant's salt. Its root key is the hash of all of them. A block's key is::

    key[0] = H(root   ‖ tokens of block 0)        H = BLAKE2b, 16 bytes
    key[i] = H(key[i-1] ‖ tokens of block i)      tokens as little-endian uint32

Two sequences share ``key[i]`` exactly when they share a namespace and their first ``(i + 1) × block_tokens`` tokens.
Only full blocks have keys. The hash is cryptographic because a collision would serve one request's KV to another.
"""

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Annotated

import msgspec

from dualpath.kv.layout import KVLayout
from dualpath.spec.bounds import Name, Text

BlockKey = bytes
"""Sixteen bytes: a Full Block's key, or a namespace's root key."""

KEY_BYTES = 16
_KEY_VERSION = 1
"""Increased whenever the derivation changes, so that old blocks are never mistaken for new ones."""
_BLOCK_PERSON = b"dualpath block"
_ROOT_PERSON = b"dualpath root"


class Namespace(msgspec.Struct, frozen=True):
    """The start of a chain of keys. The tenant's salt is hashed into `root` and not kept."""

    root: Annotated[BlockKey, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    model_fingerprint: Name
    weights_version: Text
    layout: KVLayout
    salted: bool

    @property
    def hex(self) -> str:
        """The root key in hexadecimal: the name of the namespace's directory in a store."""
        return self.root.hex()


def namespace(model_fingerprint: str, weights_version: str, layout: KVLayout, tenant_salt: str = "") -> Namespace:
    """Returns the namespace of one model, weights version, layout and tenant. Equal arguments give equal roots."""
    facts = (_KEY_VERSION, model_fingerprint, weights_version, layout, tenant_salt)
    root = blake2b(msgspec.json.encode(facts), digest_size=KEY_BYTES, person=_ROOT_PERSON).digest()
    return Namespace(root, model_fingerprint, weights_version, layout, bool(tenant_salt))


def block_keys(parent: BlockKey, tokens: Sequence[int], block_tokens: int = 64) -> list[BlockKey]:
    """Returns keys of the ``len(tokens) // block_tokens`` full blocks of `tokens` after `parent`; the rest has no key.

    `parent` is a namespace's root key for a whole prompt, or the key of the block just before `tokens`.
    Raises ValueError when the parent is not a key, a block has no tokens, or a token id is outside 0 … 2³²−1.
    """
    if len(parent) != KEY_BYTES:
        raise ValueError(f"a parent key has {KEY_BYTES} bytes, got {len(parent)}; start from Namespace.root")
    if block_tokens < 1:
        raise ValueError(f"a block needs at least one token, got block_tokens={block_tokens}")
    step_bytes = 4 * block_tokens
    token_bytes = _little_endian(tokens)
    keys = []
    for start in range(0, len(token_bytes) - step_bytes + 1, step_bytes):
        digest = blake2b(parent, digest_size=KEY_BYTES, person=_BLOCK_PERSON)
        digest.update(token_bytes[start : start + step_bytes])
        parent = digest.digest()
        keys.append(parent)
    return keys


def _little_endian(tokens: Sequence[int]) -> memoryview:
    try:
        ids = array("I", list(tokens))
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers from 0 to 2**32 - 1: {error}") from error
    if sys.byteorder == "big":
        ids.byteswap()
    return memoryview(ids).cast("B")
