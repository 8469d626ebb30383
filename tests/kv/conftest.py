"""A small layout, its namespace, and chains of blocks whose payload follows from their key."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dualpath.kv import BlockKey, KVLayout, KVPart, Namespace, PosixStore, Store, block_keys, namespace

Bytes = NDArray[np.uint8]


@pytest.fixture
def layout() -> KVLayout:
    """Three layers of 256 bytes: files small enough to damage byte by byte."""
    return KVLayout.alike(layers=3, parts=(KVPart("k", 1, 4), KVPart("v", 1, 4)), dtype="float16", block_tokens=16)


@pytest.fixture
def space(layout: KVLayout) -> Namespace:
    return namespace("tiny-model", "1", layout)


@pytest.fixture
def store(tmp_path: Path, space: Namespace) -> PosixStore:
    made = PosixStore(tmp_path / "store")
    made.prepare(space)
    return made


@pytest.fixture
def payload_of(layout: KVLayout) -> Callable[[BlockKey], Bytes]:
    def payload(key: BlockKey) -> Bytes:
        seed = int.from_bytes(key, "little")
        return np.random.default_rng(seed).integers(0, 256, layout.full_block_bytes, dtype=np.uint8)

    return payload


@pytest.fixture
def write_chain(
    store: Store, space: Namespace, payload_of: Callable[[BlockKey], Bytes]
) -> Callable[..., list[BlockKey]]:
    """Write a chain of `blocks` blocks whose tokens start with `first_token`, below `parent`; their keys."""

    def write(blocks: int, first_token: int = 0, parent: BlockKey | None = None) -> list[BlockKey]:
        above = parent or space.root
        tokens = range(first_token, first_token + blocks * space.layout.block_tokens)
        keys = block_keys(above, tokens, space.layout.block_tokens)
        for key in keys:
            store.write(space, key, above, payload_of(key))
            above = key
        return keys

    return write


@pytest.fixture
def path_of(space: Namespace, tmp_path: Path) -> Callable[[BlockKey], Path]:
    """Where the documented directory layout says a block's file is."""
    return lambda key: tmp_path / "store" / space.hex / key.hex()[:2] / f"{key.hex()}.kv"
