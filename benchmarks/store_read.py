"""Measures warm reads of Full Blocks: GB/s of `PosixStore.read` against a plain `preadv` loop over the same files.

    python benchmarks/store_read.py [--dir DIR] [--json FILE]

Every row is measured in turn, round after round, and its best round is kept, because other load only makes it slower.
Look at the ratios to `preadv` in the same run; absolute figures drift with the machine. The last reader takes every
second layer, as where windows alternate (gpt-oss); its GB are the bytes that it takes.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from dualpath.kv import BlockKey, KVLayout, KVPart, PosixStore, block_keys, namespace
from dualpath.kv.stores.block_file import CHUNK_BYTES, PAGE_BYTES

LAYOUTS = {
    "small: 12 layers × 16 KiB": KVLayout.alike(12, (KVPart("k", 1, 64), KVPart("v", 1, 64)), "bfloat16"),
    "MLA: 61 layers × 72 KiB": KVLayout.alike(61, (KVPart("latent", 1, 512), KVPart("rope", 1, 64)), "bfloat16"),
    "gpt-oss: 36 layers × 128 KiB": KVLayout.alike(36, (KVPart("k", 8, 64), KVPart("v", 8, 64)), "bfloat16"),
    "GQA: 64 layers × 256 KiB": KVLayout.alike(64, (KVPart("k", 8, 128), KVPart("v", 8, 128)), "bfloat16"),
}
ALTERNATING = "read, every 2nd layer"
Reader = Callable[[BlockKey, NDArray[np.uint8]], None]


class Row(msgspec.Struct):
    """One line of the result."""

    layout: str
    reader: str
    threads: int
    gb_per_s: float
    ratio_to_preadv: float


def fill(directory: Path, layout: KVLayout, total_bytes: int) -> list[BlockKey]:
    """Writes about `total_bytes` of blocks, unflushed; returns their keys."""
    space = namespace("benchmark", "1", layout)
    store = PosixStore(directory, durable=False, verify_writes=False)
    blocks = max(8, total_bytes // layout.full_block_bytes)
    keys = block_keys(space.root, range(blocks * layout.block_tokens))
    payload = np.random.default_rng(0).integers(0, 256, layout.full_block_bytes, dtype=np.uint8)
    for key, parent in zip(keys, [space.root, *keys], strict=False):
        store.write(space, key, parent, payload)
    return keys


def plain_reader(directory: Path, layout: KVLayout) -> Reader:
    """Returns a reader that does what the fastest honest loop does: open, preadv in the same chunks, close."""
    root = directory / namespace("benchmark", "1", layout).hex

    def read(key: BlockKey, into: NDArray[np.uint8]) -> None:
        fd = os.open(root / key.hex()[:2] / f"{key.hex()}.kv", os.O_RDONLY)
        try:
            for start in range(0, len(into), CHUNK_BYTES):
                os.preadv(fd, [into[start : start + CHUNK_BYTES].data], PAGE_BYTES + start)
        finally:
            os.close(fd)

    return read


def gb_per_s(read: Reader, keys: list[BlockKey], buffers: list[NDArray[np.uint8]], block_bytes: int) -> float:
    """Reads `block_bytes` of each of `keys`, dealt out to one thread per buffer."""
    threads = len(buffers)

    def work(thread: int) -> None:
        for key in keys[thread::threads]:
            read(key, buffers[thread])

    with ThreadPoolExecutor(threads) as pool:
        start_ns = time.perf_counter_ns()
        list(pool.map(work, range(threads)))
        return len(keys) * block_bytes / (time.perf_counter_ns() - start_ns)


def measure(directory: Path, name: str, layout: KVLayout, total_bytes: int, rounds: int) -> list[Row]:
    """Measures all readers at 1 and 4 threads over one layout."""
    keys = fill(directory, layout, total_bytes)
    space = namespace("benchmark", "1", layout)
    readers: dict[str, Reader] = {
        "preadv": plain_reader(directory, layout),
        "read, no checksums": partial(PosixStore(directory, verify_reads=False).read, space),
        "read": partial(PosixStore(directory).read, space),
        ALTERNATING: partial(PosixStore(directory).read, space, layers=range(0, layout.layers, 2)),
    }
    pages = -(-layout.full_block_bytes // PAGE_BYTES) * PAGE_BYTES
    pool = np.zeros((4, pages), dtype=np.uint8)  # touched, so that no page fault is measured
    pool += 1
    cases = [(reader, threads) for threads in (1, 4) for reader in readers]
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for reader, threads in cases:
            buffers = [pool[n, : layout.full_block_bytes] for n in range(threads)]
            taken = sum(layout.layer_block_bytes[::2]) if reader is ALTERNATING else layout.full_block_bytes
            rates[reader, threads].append(gb_per_s(readers[reader], keys, buffers, taken))
    best = {case: max(found) for case, found in rates.items()}
    return [
        Row(name, reader, threads, best[reader, threads], best[reader, threads] / best["preadv", threads])
        for reader, threads in cases
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", help="where to make the temporary store (default: the system's temporary directory)")
    parser.add_argument("--mib", type=int, default=256, help="MiB of blocks per layout (default: 256)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per row (default: 9)")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE as well")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name, layout in LAYOUTS.items():
        with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
            rows += measure(Path(directory), name, layout, arguments.mib << 20, arguments.rounds)
    print(f"{'layout':<30}{'reader':<24}{'threads':>8}{'GB/s':>9}{'ratio':>8}")
    for row in rows:
        print(f"{row.layout:<30}{row.reader:<24}{row.threads:>8}{row.gb_per_s:>9.2f}{row.ratio_to_preadv:>8.2f}")
    if arguments.json:
        result = {"benchmark": "store_read", "mib": arguments.mib, "rounds": arguments.rounds}
        Path(arguments.json).write_text(json.dumps(result | {"rows": msgspec.to_builtins(rows)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
