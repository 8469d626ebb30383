"""The PE buffer and the DE buffer: a bounded region of shared memory, one page per Full Block.

Theory of operation
-------------------
The region is one file in ``/dev/shm``: a header of 4096 bytes with its geometry, then `pages` pages. A page is a Full
Block rounded up to 4096 bytes, so that O_DIRECT can read into it. The process that creates the file owns it and alone
decides who holds which page (`BufferPool`). Peers on the same host map the same file (`MappedPages`) and get page
numbers from the control plane. Shared memory holds no ownership, hence no lock that a dead process could keep.

A page is in one of three states::

    free ──allocate──> held by an owner ──free──────────────────> free
                            └──quarantine──> quarantined ──release_quarantine──> free

Quarantine is for pages of a failed attempt that a peer might still write into. Nobody may hold them until the peer is
proven quiet (`Server.quiesce`): a late write into a reused page would corrupt another request's KV.

The creator holds an exclusive `flock` on the file as long as it lives. The kernel drops the lock however the process
dies, so `sweep_dead_pools` can tell an orphan from a live pool without pids, which are reused and differ between
containers. The pid in the name is for people.
"""

import errno
import mmap
import os
import re
import struct
import threading
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from dualpath.transfer.pool_files import POOL_DIRECTORY, create_locked, own_path

Owner = Hashable
"""The holder of pages, for example ``(request, attempt)``. Opaque to the pool."""
Bytes = npt.NDArray[np.uint8]

PAGE_ALIGNMENT_BYTES = 4096
_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"DPPOOL01"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class PoolExhausted(Exception):  # noqa: N818
    """More pages were requested than are free. Nothing was allocated."""


class PoolStatistics(msgspec.Struct, frozen=True, gc=False):
    """A pool's gauges at one moment; free + held + quarantined = pages."""

    pages: int
    free_pages: int
    held_pages: int
    quarantined_pages: int
    high_water_pages: int
    """Most pages ever in use at once, quarantined ones included."""


class MappedPages:
    """A mapping of a pool's pages into this process, readable and writable. `BufferPool.attach` returns it to peers."""

    def __init__(self, path: Path, descriptor: int) -> None:
        total_bytes = os.fstat(descriptor).st_size
        if total_bytes < PAGE_ALIGNMENT_BYTES:
            raise ValueError(f"{path} is not a buffer pool: {total_bytes} bytes are too few for a header")
        # Populate it now: a page fault for every 4 KiB of the first transfers would cost more than copying them.
        region = mmap.mmap(descriptor, total_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        magic, self.page_bytes, self.stride_bytes, self.pages = _HEADER.unpack_from(region)
        if magic != _MAGIC or PAGE_ALIGNMENT_BYTES + self.pages * self.stride_bytes != total_bytes:
            raise ValueError(f"{path} is not a buffer pool of this version: its header is {magic!r}")
        self.path = path
        flat = np.frombuffer(region, np.uint8, offset=PAGE_ALIGNMENT_BYTES)
        self._pages: npt.NDArray[np.uint8] | None = flat.reshape(self.pages, self.stride_bytes)

    def view(self, page: int) -> Bytes:
        """Returns the `page_bytes` bytes of a page as a uint8 array over the shared memory; valid while referenced.

        Raises IndexError for a page outside the pool, ValueError after `close`.
        """
        if self._pages is None:
            raise ValueError(f"pool {self.path} is closed")
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} is outside pool {self.path} of {self.pages} pages")
        view: Bytes = self._pages[page, : self.page_bytes]
        return view

    @property
    def memory(self) -> Bytes:
        """All pages as they lie, for a NIC to register. Raises ValueError after `close`."""
        if self._pages is None:
            raise ValueError(f"pool {self.path} is closed")
        return self._pages.reshape(-1)

    def close(self) -> None:
        """Drop the mapping; the memory is released with its last view."""
        self._pages = None


class BufferPool(MappedPages):
    """A pool in the process that owns it. Any thread may call any method; no method blocks."""

    def __init__(self, path: Path, descriptor: int) -> None:
        super().__init__(path, descriptor)
        self._descriptor: int | None = descriptor
        self._lock = threading.Lock()
        self._free = list(range(self.pages - 1, -1, -1))
        self._held: dict[Owner, set[int]] = {}
        self._quarantined: dict[Owner, set[int]] = {}
        self._high_water_pages = 0

    @classmethod
    def create(cls, name: str, page_bytes: int, pages: int, *, directory: Path = POOL_DIRECTORY) -> Self:
        """Create ``dualpath-<pid>-<name>-<random>`` in `directory`, and allocate and zero all its memory at once.

        Raises ValueError for a bad name or size, and OSError when there is too little memory: an error now is better
        than a SIGBUS during a transfer.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"pool name {name!r}: use 1 to 64 letters, digits, '_', '.' or '-'")
        if page_bytes < 1 or pages < 1:
            raise ValueError(f"pool {name!r}: page_bytes ({page_bytes}) and pages ({pages}) must be at least 1")
        stride_bytes = -(-page_bytes // PAGE_ALIGNMENT_BYTES) * PAGE_ALIGNMENT_BYTES
        path = own_path(directory, name)
        descriptor = create_locked(path)
        try:
            _take_memory(path, descriptor, PAGE_ALIGNMENT_BYTES + pages * stride_bytes)
            os.pwrite(descriptor, _HEADER.pack(_MAGIC, page_bytes, stride_bytes, pages), 0)
            return cls(path, descriptor)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise

    @staticmethod
    def attach(path: str | Path) -> MappedPages:
        """Map another process's pool. Raises FileNotFoundError if it is gone, ValueError if it is not a pool."""
        path = Path(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return MappedPages(path, descriptor)
        finally:
            os.close(descriptor)

    def allocate(self, owner: Owner, n_pages: int) -> list[int]:
        """Give `n_pages` free pages to `owner`, in no particular order, with their old bytes.

        Raises PoolExhausted when too few are free; nothing has changed then.
        """
        if n_pages < 0:
            raise ValueError(f"{owner!r} asks for {n_pages} pages")
        with self._lock:
            if n_pages > len(self._free):
                raise PoolExhausted(
                    f"{owner!r} needs {n_pages} pages of {self.path.name}, {len(self._free)} of {self.pages} are free "
                    f"({_count(self._quarantined)} quarantined)"
                )
            taken = [self._free.pop() for _ in range(n_pages)]
            if taken:
                self._held.setdefault(owner, set()).update(taken)
            self._high_water_pages = max(self._high_water_pages, self.pages - len(self._free))
            return taken

    def free(self, owner: Owner, pages: Iterable[int]) -> None:
        """Free some of `owner`'s pages. Raises ValueError and frees none if `owner` does not hold all of them."""
        with self._lock:
            self._free.extend(self._take_from(owner, pages))

    def quarantine(self, owner: Owner, pages: Iterable[int]) -> None:
        """Withdraw some of `owner`'s pages from use until `release_quarantine`. Raises ValueError like `free`."""
        with self._lock:
            withdrawn = self._take_from(owner, pages)
            if withdrawn:
                self._quarantined.setdefault(owner, set()).update(withdrawn)

    def release_quarantine(self, owner: Owner) -> int:
        """Free `owner`'s quarantined pages, once no peer can touch them. Returns how many there were, maybe 0."""
        with self._lock:
            released = sorted(self._quarantined.pop(owner, ()))
            self._free.extend(released)
            return len(released)

    def holders(self) -> dict[Owner, int]:
        """Returns how many pages each owner holds, without quarantined ones."""
        with self._lock:
            return {owner: len(pages) for owner, pages in self._held.items()}

    def statistics(self) -> PoolStatistics:
        with self._lock:
            return PoolStatistics(
                pages=self.pages,
                free_pages=len(self._free),
                held_pages=_count(self._held),
                quarantined_pages=_count(self._quarantined),
                high_water_pages=self._high_water_pages,
            )

    def close(self) -> None:
        """Remove the pool from ``/dev/shm``. Peers keep their mappings; no new peer can attach."""
        super().close()
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _take_from(self, owner: Owner, pages: Iterable[int]) -> list[int]:
        """Remove `pages` from `owner`'s pages, or raise and change nothing."""
        leaving = list(pages)
        held = self._held.get(owner, set())
        seen: set[int] = set()
        for page in leaving:
            if page not in held or page in seen:
                raise ValueError(f"{owner!r} does not hold page {page} of {self.path.name}: {self._whereabouts(page)}")
            seen.add(page)
        held.difference_update(seen)
        if not held:
            self._held.pop(owner, None)
        return leaving

    def _whereabouts(self, page: int) -> str:
        for owner, pages in self._held.items():
            if page in pages:
                return f"{owner!r} holds it (given twice in one call, or by the wrong owner)"
        for owner, pages in self._quarantined.items():
            if page in pages:
                return f"it is quarantined for {owner!r}"
        return "it is free (freed twice?)" if 0 <= page < self.pages else f"the pool has {self.pages} pages"


def _take_memory(path: Path, descriptor: int, total_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, total_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        room = os.fstatvfs(descriptor)
        raise OSError(
            errno.ENOSPC,
            f"pool {path.name} needs {total_bytes} bytes, {path.parent} has {room.f_bavail * room.f_frsize} free; "
            "make the buffer smaller or the file system larger (docker: --shm-size)",
        ) from error


def _count(pages_by_owner: dict[Owner, set[int]]) -> int:
    return sum(len(pages) for pages in pages_by_owner.values())
