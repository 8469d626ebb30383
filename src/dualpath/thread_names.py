"""Thread pools whose threads have names, as `top -H`, `perf` and /proc show them.

A thread without one has the name of the thread that started it.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

COMPUTE_THREAD = "compute"
"""The one thread of an engine that runs the model."""
MAX_NAME_BYTES = 15


def named_threads(count: int, name: str) -> ThreadPoolExecutor:
    """`count` threads called `name`, to Python and to the system."""
    return ThreadPoolExecutor(count, name, name_this_thread, (name,))


def name_this_thread(name: str) -> None:
    """Tell the system the name of the calling thread."""
    with suppress(OSError):  # systems other than Linux have no such file, and nothing depends on it
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_bytes(name.encode()[:MAX_NAME_BYTES])
