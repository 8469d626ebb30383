"""What becomes of memory that a forward frees."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's parameters, by their numbers in malloc.h."""
KEPT_BYTES = 1 << 30
"""Most that stays free at the end of the heap."""
MAPPED_BYTES = 256 << 20
"""What is at least this large has a mapping of its own, which goes when it is freed."""


def keep_freed_memory() -> None:
    """Keep freed memory for this process's next allocations; `malloc_trim` gives it back. Without glibc: nothing.

    glibc returns the end of its heap to the kernel as soon as some MiB of it are free. A layer would take page faults
    for tensors as large as those that the last one freed: 30,000 in a prefill of 1,000 tokens, a tenth of its CPU time
    and more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
