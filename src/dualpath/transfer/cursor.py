"""A place in a list of byte arrays, and the slices that the next chunk of a transfer takes from it."""

from collections.abc import Sequence

from dualpath.transfer.pool import Bytes


class Cursor:
    """Walks `arrays` (uint8, one dimension) from first byte to last."""

    __slots__ = ("_arrays", "_index", "_offset")

    def __init__(self, arrays: Sequence[Bytes]) -> None:
        self._arrays = arrays
        self._index = 0
        self._offset = 0

    def take(self, n_bytes: int) -> list[Bytes]:
        """The next `n_bytes` as views. There must be as many: the caller keeps count."""
        slices = []
        while n_bytes:
            array = self._arrays[self._index]
            piece = array[self._offset : self._offset + n_bytes]
            slices.append(piece)
            n_bytes -= len(piece)
            self._offset += len(piece)
            if self._offset == len(array):
                self._index += 1
                self._offset = 0
        return slices
