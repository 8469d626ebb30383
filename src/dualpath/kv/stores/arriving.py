"""`Arriving`: a block's object, or a range of it, while it is received, checked layer by layer."""

from collections.abc import Callable, Collection, Iterator

from dualpath.kv.keys import BlockKey, Namespace
from dualpath.kv.stores.block_file import (
    CHUNK_BYTES,
    BlockHeader,
    LayerChecks,
    Pace,
    check_namespace,
    decode_header,
    header_bytes,
)
from dualpath.kv.stores.bucket import Body
from dualpath.kv.stores.errors import BlockError, BlockFault

WORTH_A_REQUEST_BYTES = 1 << 16
"""Where a block is read in parts: fewer bytes between two of them are read too, which is cheaper than a request."""


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


def worthwhile(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join extents that are so near that what is between them costs less than another request."""
    joined: list[tuple[int, int]] = []
    for start, stop in extents:
        near = joined and start - joined[-1][1] < WORTH_A_REQUEST_BYTES
        joined.append((joined.pop()[0] if near else start, stop))
    return joined


def receive_layers(
    get: Callable[[tuple[int, int]], Body],
    space: Namespace,
    key: BlockKey,
    into: memoryview,
    pace: Pace,
    layers: Collection[int],
    *,
    verify: bool,
) -> None:
    """Read the ranges of `layers` into their places; `get` returns a range. Raises BlockError, StoreError."""
    sizes = space.layout.layer_block_bytes
    start = header_bytes(len(sizes), alike=len(set(sizes)) == 1)
    head = Arriving(get((0, start)))
    header = check_namespace(decode_header(key, head.n_bytes, head.head), space)
    checks = LayerChecks(header, into, layers) if verify else None
    for first, end in worthwhile(space.layout.extents(layers)):
        Arriving(get((start + first, start + end))).part(header, into, (first, end), pace, checks)
