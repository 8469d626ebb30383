"""Moves one prefill batch's KV, layer by layer: turns core's chunk plans into copies and channel operations.

Before layer l computes, its hit rows are copied from the PE buffer (locally, through the CNIC) or pulled from the DE
buffer (a read over the compute network). Afterwards its rows are put into the DE buffer (paper §4.1 ②③). The threads
that serve the engine's loader and shipper call this code. An item that fails or is cancelled does not affect others.
"""

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future

import msgspec
import numpy as np

from dualpath.core.load_plan import ChunkPlan
from dualpath.core.vocabulary import BLOCK_TOKENS, Side
from dualpath.kv.layout import KVLayout
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import Channel, PageRange

TRANSFER_DEADLINE_NS = 60_000_000_000
"""Longest one layer's transfer of one item may take before the attempt is failed."""

Rows = np.ndarray
"""uint8 bytes of whole tokens of one layer, its `KVLayout.row_bytes` each."""


class TokenRun(msgspec.Struct, frozen=True):
    """Consecutive tokens inside one page."""

    page: int
    first_token: int
    tokens: int
    row: int
    """Index of the first token in the item's rows, which is its position in the prompt."""


def token_runs(pages: list[int], first_block: int, first_token: int, tokens: int) -> list[TokenRun]:
    """Returns runs for tokens [first_token, first_token + tokens) of a prompt; block `first_block` is `pages[0]`."""
    runs = []
    at, end = first_token, first_token + tokens
    while at < end:
        block, inside = divmod(at, BLOCK_TOKENS)
        n = min(BLOCK_TOKENS - inside, end - at)
        runs.append(TokenRun(pages[block - first_block], inside, n, at))
        at += n
    return runs


class LayerRuns(msgspec.Struct, frozen=True):
    """One item's runs in one kind of layer."""

    copies: list[TokenRun]
    """From the PE buffer."""
    pulls: list[TokenRun]
    """From the DE buffer."""
    puts: list[TokenRun]
    """Into the DE buffer."""


class ItemTransfers:
    """One item's runs, in layers without a window and in those with each of `windows`."""

    def __init__(
        self,
        plan: ChunkPlan,
        pe_pages: list[int],
        pe_first_block: int,
        de_pages: list[int],
        channel: Channel | None,
        cancelled: Callable[[], bool],
        windows: Collection[int | None] = (None,),
    ) -> None:
        self.channel = channel
        self.cancelled = cancelled
        self._pe_pages, self._pe_first_block, self._de_pages = pe_pages, pe_first_block, de_pages
        self._runs = {window: self._runs_of(plan.within(window)) for window in windows}

    def runs(self, window_tokens: int | None) -> LayerRuns:
        return self._runs[window_tokens]

    def _runs_of(self, plan: ChunkPlan) -> LayerRuns:
        copies, pulls, puts = [], [], []
        for part in plan.loads:
            if part.side is Side.PE:
                copies += token_runs(self._pe_pages, self._pe_first_block, part.first_token, part.tokens)
            else:
                pulls += token_runs(self._de_pages, 0, part.first_token, part.tokens)
        for ship in plan.ships:
            puts += token_runs(self._de_pages, 0, ship.first_token, ship.tokens)
        return LayerRuns(copies, pulls, puts)


class AttemptCancelledError(Exception):
    """The coordinator aborted the attempt while it was in a batch."""


class BatchTransfers:
    """Does what `model.prefill.LayerIO` says, over the PE buffer and the channels to decode engines."""

    def __init__(self, layout: KVLayout, pool: BufferPool, traffic: TrafficManager, items: list[ItemTransfers]) -> None:
        self._layout = layout
        self._pool = pool
        self._traffic = traffic
        self._items = items
        self.errors: list[Exception | None] = [None] * len(items)
        """The first failure of each item."""

    def note(self, errors: list[Exception | None]) -> None:
        """Keep the first failure of each item; several threads may call."""
        for index, error in enumerate(errors):
            self.errors[index] = self.errors[index] or error

    def load_layer(self, layer: int, destinations: list[Rows | None]) -> list[Exception | None]:
        """Fill every destination. All pulls run together, while local copies are made."""
        errors: list[Exception | None] = [None] * len(destinations)
        pulls: list[Future[int] | None] = [None] * len(destinations)
        runs = [item.runs(self._layout.kind(layer).window_tokens) for item in self._items]
        for i, (item, rows) in enumerate(zip(self._items, destinations, strict=True)):
            if rows is not None and runs[i].pulls:
                errors[i], pulls[i] = self._post(item, layer, rows, runs[i].pulls, write=False)
        for i, rows in enumerate(destinations):
            if rows is not None and runs[i].copies and errors[i] is None:
                self._copy(layer, rows, runs[i].copies)
        return [self._wait(error, pull) for error, pull in zip(errors, pulls, strict=True)]

    def ship_layer(self, layer: int, rows: list[Rows | None]) -> list[Exception | None]:
        """Put every item's rows into its decode engine's buffer. Returns when the peers have acknowledged."""
        posted: list[tuple[Exception | None, Future[int] | None]] = []
        for item, item_rows in zip(self._items, rows, strict=True):
            if item_rows is None:
                posted.append((None, None))
            else:
                puts = item.runs(self._layout.kind(layer).window_tokens).puts
                posted.append(self._post(item, layer, item_rows, puts, write=True))
        return [self._wait(error, put) for error, put in posted]

    def _post(
        self, item: ItemTransfers, layer: int, rows: Rows, runs: list[TokenRun], write: bool
    ) -> tuple[Exception | None, Future[int] | None]:
        if item.cancelled():
            return AttemptCancelledError(), None
        if item.channel is None:
            return ConnectionError("no channel to the decode engine"), None
        ranges, local = [], []
        for run in runs:
            start, stop = self._layout.layer_range(layer, run.first_token, run.tokens)
            ranges.append(PageRange(run.page, start, stop - start))
            local.append(self._part(layer, rows, run))
        deadline_ns = time.monotonic_ns() + TRANSFER_DEADLINE_NS
        verb = "write" if write else "read"
        try:
            transfer: object = getattr(item.channel, verb)(ranges, local, deadline_ns)
        except BaseException as error:  # a closed or overfull channel, or foreign code's panic, fails this item alone
            return error if isinstance(error, Exception) else RuntimeError(repr(error)), None
        if not isinstance(transfer, Future):  # nothing would be waited for, and rows taken that never came
            return TypeError(f"the channel's {verb} returned {transfer!r}, and no Future"), None
        return None, transfer

    def _copy(self, layer: int, rows: Rows, runs: list[TokenRun]) -> None:
        self._traffic.local_copy(sum(run.tokens for run in runs) * self._layout.row_bytes[layer])
        for run in runs:
            start, stop = self._layout.layer_range(layer, run.first_token, run.tokens)
            source = self._pool.view(run.page)[start:stop]
            np.copyto(self._part(layer, rows, run), source)  # gives up the interpreter lock

    def _part(self, layer: int, rows: Rows, run: TokenRun) -> Rows:
        row_bytes = self._layout.row_bytes[layer]
        return rows[run.row * row_bytes : (run.row + run.tokens) * row_bytes]

    @staticmethod
    def _wait(error: Exception | None, transfer: Future[int] | None) -> Exception | None:
        if error is not None or transfer is None:
            return error
        # The channel ends every future by its deadline, and touches no rows after that.
        return transfer.exception()  # type: ignore[return-value]
