"""`SharedRows`: a prefill engine's rows of KV on their way, in memory that its agent maps too.

The engine takes its layer buffers from here (`model.layers.HostMemory`), so that the agent moves KV straight into and
out of them. The file is sparse: it is as long as the largest batch needs, and has the memory that was taken.
"""

import mmap
import os
from pathlib import Path
from typing import Self

import numpy as np

from dualpath.transfer.pool import Bytes
from dualpath.transfer.pool_files import POOL_DIRECTORY, create_locked, own_path

_ALIGNMENT_BYTES = 4096


class SharedRows:
    """A mapping of the rows. Used by one thread at a time; views may be used by any."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._region = mmap.mmap(descriptor, os.fstat(descriptor).st_size, flags=mmap.MAP_SHARED)
        self._bytes: Bytes = np.frombuffer(self._region, np.uint8)
        self._taken_bytes = 0

    @classmethod
    def create(cls, name: str, most_bytes: int, *, directory: Path = POOL_DIRECTORY) -> Self:
        """Create ``dualpath-<pid>-<name>-<random>``, locked as pools are, so that a sweep spares it while we live."""
        path = own_path(directory, name)
        descriptor = create_locked(path)
        os.ftruncate(descriptor, -(-most_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        return cls(path, descriptor)

    @classmethod
    def attach(cls, path: str) -> Self:
        """Map another process's rows. Raises OSError, ValueError when they are not there."""
        return cls(Path(path), os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def take(self, n_bytes: int) -> Bytes:
        """Returns `n_bytes` that were not taken since `clear`. Raises OSError when memory is short."""
        first = self._taken_bytes
        os.posix_fallocate(self._descriptor, first, n_bytes)  # an error here, not a SIGBUS in the middle of a batch
        self._taken_bytes = -(-(first + n_bytes) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return self._bytes[first : first + n_bytes]

    def clear(self) -> None:
        """Give all memory back; nothing that was taken may be used any more."""
        self._taken_bytes = 0
        self._region.madvise(mmap.MADV_REMOVE)

    def span(self, part: Bytes) -> tuple[int, int]:
        """Returns where a part of what was taken lies: its first byte and its length."""
        address: int = part.__array_interface__["data"][0]
        return address - self._bytes.__array_interface__["data"][0], part.nbytes

    def view(self, span: tuple[int, int]) -> Bytes:
        return self._bytes[span[0] : span[0] + span[1]]

    def close(self) -> None:
        """Close the file; the mapping goes with the last view of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """For the engine, at its end."""
        self.path.unlink(missing_ok=True)
        self.close()
