"""A small layout, its namespace, and chains of blocks whose payload follows from their key."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dualpath.kv import BlockKey, KVLayout, KVPart, Namespace, PosixStore, block_keys, namespace

Bytes = NDArray[np.uint8]


@pytest.fixture
def layout() -> KVLayout:
    """Three layers of 256 bytes: files small enough to damage byte by byte."""
    return KVLayout(layers=3, parts=(KVPart("k", 1, 4), KVPart("v", 1, 4)), dtype="float16", block_tokens=16)


@pytest.fixture
def space(layout: KVLayout) -> Namespace:
    return namespace("tiny-model", "1", layout)


@pytest.fixture
def store(tmp_path: Path, layout: KVLayout, space: Namespace) -> PosixStore:
    return PosixStore(tmp_path / "store", layout, space)


@pytest.fixture
def payload_of(layout: KVLayout) -> Callable[[BlockKey], Bytes]:
    def payload(key: BlockKey) -> Bytes:
        seed = int.from_bytes(key, "little")
        return np.random.default_rng(seed).integers(0, 256, layout.full_block_bytes, dtype=np.uint8)

    return payload


@pytest.fixture
def write_chain(store: PosixStore, payload_of: Callable[[BlockKey], Bytes]) -> Callable[..., list[BlockKey]]:
    """Write a chain of `blocks` blocks whose tokens start with `first_token`, below `parent`; their keys."""

    def write(blocks: int, first_token: int = 0, parent: BlockKey | None = None) -> list[BlockKey]:
        above = parent or store.namespace.root
        tokens = range(first_token, first_token + blocks * store.namespace.layout.block_tokens)
        keys = block_keys(above, tokens, store.namespace.layout.block_tokens)
        for key in keys:
            store.write(key, above, payload_of(key))
            above = key
        return keys

    return write


@pytest.fixture
def path_of(store: PosixStore, tmp_path: Path) -> Callable[[BlockKey], Path]:
    """Where the documented directory layout says a block's file is."""
    return lambda key: tmp_path / "store" / store.namespace.hex / key.hex()[:2] / f"{key.hex()}.kv"
