"""`Arriving`: a block's object while it is received, checked layer by layer."""

from collections.abc import Iterator

from dualpath.kv.stores.block_file import CHUNK_BYTES, BlockHeader, LayerChecks, Pace
from dualpath.kv.stores.bucket import Body
from dualpath.kv.stores.errors import BlockError, BlockFault


class Arriving:
    """An object being received: its header first, then its payload."""

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
        filled, layers = 0, LayerChecks(header, into)
        for piece in self._after(header.header_bytes):
            while piece:
                chunk = piece[: min(CHUNK_BYTES, len(into) - filled)]
                if not chunk:
                    raise BlockError(header.key, BlockFault.HEADER, "the server sent more bytes than it had announced")
                pace(len(chunk))
                into[filled : filled + len(chunk)] = chunk
                filled, piece = filled + len(chunk), piece[len(chunk) :]
                if verify:
                    layers.check(filled)
        if filled < len(into):
            raise BlockError(header.key, BlockFault.TRUNCATED, f"the object ended after {filled} payload bytes")

    def _after(self, header_bytes: int) -> Iterator[memoryview]:
        yield memoryview(self._raw)[header_bytes:]
        yield from self._pieces
