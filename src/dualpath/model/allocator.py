"""What becomes of memory that a forward frees."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's parameters, by their numbers in malloc.h."""
KEPT_BYTES = 1 << 30
"""Most that stays free at the end of the heap."""
MAPPED_BYTES = 256 << 20
"""What is at least this large has a mapping of its own, which goes when it is freed."""


def keep_freed_memory() -> None:
    """Keep freed memory for this process's next allocations, until `giving_memory_back`. Without glibc: nothing.

    glibc returns the end of its heap to the kernel as soon as some MiB of it are free. A layer would take page faults
    for tensors as large as those that the last one freed: 30,000 in a prefill of 1,000 tokens, a tenth of its CPU time
    and more.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def giving_memory_back() -> Iterator[None]:
    """What is freed in the with-block goes back to the kernel, and with it what was kept free before.

    `malloc_trim` alone is not enough: it does not shorten the heaps that threads other than the first allocate from.
    Their ends go when something is freed there, if they are longer than the threshold at that time.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_TRIM_THRESHOLD, 0)
    try:
        yield
        libc.malloc_trim(0)
    finally:
        libc.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
