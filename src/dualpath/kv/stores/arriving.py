"""`Arriving`: a block's object, or a range of it, while it is received, checked layer by layer."""

from collections.abc import Iterator

from dualpath.kv.stores.block_file import CHUNK_BYTES, BlockHeader, LayerChecks, Pace
from dualpath.kv.stores.bucket import Body
from dualpath.kv.stores.errors import BlockError, BlockFault


class Arriving:
    """An object being received: its header first, then its payload; or a range of the payload."""

    def __init__(self, body: Body) -> None:
        self.n_bytes = body.n_bytes
        self._pieces = body.pieces
        self._raw = b""

    def head(self, n_bytes: int) -> bytes:
        """Returns its first `n_bytes`, or fewer if it ends earlier."""
        while len(self._raw) < n_bytes and (piece := next(self._pieces, None)) is not None:
            self._raw += piece
        return self._raw[:n_bytes]

    def payload(self, header: BlockHeader, into: memoryview, pace: Pace, *, verify: bool) -> None:
        """Copy the payload into `into` and check each layer against its checksum. Raises BlockError, StoreError."""
        self._raw = self._raw[header.header_bytes :]
        self.part(header, into, (0, len(into)), pace, LayerChecks(header, into) if verify else None)

    def part(
        self, header: BlockHeader, into: memoryview, ends: tuple[int, int], pace: Pace, checks: LayerChecks | None
    ) -> None:
        """Copy what arrives to ``into[start:stop]``, which `ends` gives, and check the layers that it completes.

        Raises BlockError, StoreError.
        """
        filled, stop = ends
        for piece in self._rest():
            while piece:
                chunk = piece[: min(CHUNK_BYTES, stop - filled)]
                if not chunk:
                    raise BlockError(header.key, BlockFault.HEADER, "the server sent more bytes than it had announced")
                pace(len(chunk))
                into[filled : filled + len(chunk)] = chunk
                filled, piece = filled + len(chunk), piece[len(chunk) :]
                if checks is not None:
                    checks.check(filled)
        if filled < stop:
            raise BlockError(header.key, BlockFault.TRUNCATED, f"the object ended after {filled} payload bytes")

    def _rest(self) -> Iterator[memoryview]:
        yield memoryview(self._raw)
        yield from self._pieces
