"""Measures Full Blocks through two stores: files, and objects behind nginx on the same host or behind any URL.

    python benchmarks/object_store.py
    python benchmarks/object_store.py --url 's3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=us-east-1'

Rows: blocks written (and read back) per second, MB/s read with an engine's number of threads and with four, headers
per second when the index is rebuilt. Both stores use the same kind of directory; nothing is flushed.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from dualpath.kv import BlockKey, KVLayout, KVPart, PosixStore, Store, block_keys, namespace, open_store
from dualpath.lab.testbed.object_server import ObjectServer, free_port

LAYOUT = KVLayout.alike(8, (KVPart("k", 4, 64), KVPart("v", 4, 64)), "float32")
"""1 MiB a block."""
SPACE = namespace("benchmark", "1", LAYOUT)
THREADS = (2, 4)


class Row(msgspec.Struct, frozen=True):
    """Figures of one store."""

    store: str
    written_blocks_per_s: float
    read_mb_per_s: dict[int, float]
    """MB/s by number of threads."""
    scanned_blocks_per_s: float


def measure(name: str, store: Store, blocks: int, rounds: int) -> Row:
    """Returns the best of `rounds`."""
    root = SPACE.root
    keys = block_keys(root, range(blocks * LAYOUT.block_tokens), LAYOUT.block_tokens)
    payload = np.random.default_rng(0).integers(0, 256, LAYOUT.full_block_bytes, dtype=np.uint8)
    began = time.perf_counter()
    for key, parent in zip(keys, [root, *keys], strict=False):
        store.write(SPACE, key, parent, payload)
    written = blocks / (time.perf_counter() - began)
    read = {threads: max(read_rate(store, keys, threads) for _ in range(rounds)) for threads in THREADS}
    scanned = max(rate(lambda: list(store.scan())) * blocks for _ in range(rounds))
    return Row(name, written, read, scanned)


def read_rate(store: Store, keys: list[BlockKey], threads: int) -> float:
    """Returns MB/s with the keys dealt out to `threads`."""
    buffers = [np.zeros(LAYOUT.full_block_bytes, dtype=np.uint8) for _ in range(threads)]

    def work(thread: int) -> None:
        for key in keys[thread::threads]:
            store.read(SPACE, key, buffers[thread])

    with ThreadPoolExecutor(threads) as pool:
        return rate(lambda: list(pool.map(work, range(threads)))) * len(keys) * LAYOUT.full_block_bytes / 1e6


def rate(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return 1 / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", help="measure this bucket too")
    parser.add_argument("--blocks", type=int, default=200, help="blocks of 1 MiB (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the best counts (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE as well")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(ObjectServer(home / "objects", home / "nginx", port=free_port()))
        stores: dict[str, Store] = {
            "files": PosixStore(home / "files", durable=False),
            "nginx": open_store(server.url),
        }
        if arguments.url:
            stores["url"] = open_store(arguments.url)
        rows = [measure(name, store, arguments.blocks, arguments.rounds) for name, store in stores.items()]
    print(
        f"{'store':<8}{'written/s':>11}"
        + "".join(f"{f'MB/s, {n} threads':>17}" for n in THREADS)
        + f"{'scanned/s':>11}"
    )
    for row in rows:
        reads = "".join(f"{row.read_mb_per_s[n]:>17.0f}" for n in THREADS)
        print(f"{row.store:<8}{row.written_blocks_per_s:>11.0f}{reads}{row.scanned_blocks_per_s:>11.0f}")
    if arguments.json:
        result = {"benchmark": "object_store", "blocks": arguments.blocks, "rounds": arguments.rounds}
        Path(arguments.json).write_text(json.dumps(result | {"rows": msgspec.to_builtins(rows)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
