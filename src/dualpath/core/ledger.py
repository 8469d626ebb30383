"""The ledger of blocks: which attempt holds which buffer blocks and promised device blocks on which engine.

Theory of operation. Core applies back-pressure: it issues a command that makes an engine allocate only when the ledger
has room for it. An engine's allocation therefore fails only by a bug. Each engine has one FIFO line for its buffer,
served from the head only, so a large request is never overtaken.

The order of allocation cannot deadlock. An attempt holds its DE's device blocks (promised at DE choice) before it lines
up for the DE buffer, and all its DE buffer before it lines up for the PE buffer: for what the PE reads, or at once for
the whole prompt where the PE stages (`EngineFacts.stages`). A holder of PE buffer needs only storage and compute. So
each line waits only for attempts that are further along.

An aborted attempt keeps its blocks as *draining*, because a transfer may still touch them. They are freed only when the
engine answers `released` or is lost. No deadline frees a block.
"""

from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from dualpath.core.engines import DecodeEngines
from dualpath.core.vocabulary import EngineFacts, EngineId, RequestId

Key = tuple[RequestId, int]
"""``(request, attempt)``."""


class Holding(msgspec.Struct, frozen=True, gc=False):
    """The blocks that one attempt holds on one engine."""

    engine: EngineId
    request: RequestId
    attempt: int
    buffer_blocks: int
    hbm_blocks: int
    draining: bool


class _Held:
    __slots__ = ("buffer_blocks", "draining", "hbm_blocks")

    def __init__(self, buffer_blocks: int = 0, hbm_blocks: int = 0, draining: bool = False) -> None:
        self.buffer_blocks = buffer_blocks
        self.hbm_blocks = hbm_blocks
        self.draining = draining


class Account:
    """One engine's blocks: the free ones, the held ones by attempt, and the line for its buffer."""

    __slots__ = ("buffer_free_blocks", "facts", "hbm_free_blocks", "held", "line")

    def __init__(self, facts: EngineFacts) -> None:
        self.facts = facts
        self.buffer_free_blocks = facts.buffer_blocks
        self.hbm_free_blocks = facts.hbm_blocks
        self.held: dict[Key, _Held] = {}
        self.line: OrderedDict[Key, int] = OrderedDict()

    def grant(self, key: Key, blocks: int) -> None:
        """Give the attempt `blocks` of the buffer."""
        self.buffer_free_blocks -= blocks
        held = self.held.get(key)
        if held is None:
            self.held[key] = _Held(blocks)
        else:
            held.buffer_blocks += blocks


class Ledger:
    """The accounts of all engines. The ledger also keeps the free-HBM column of `decode` up to date."""

    def __init__(self, decode: DecodeEngines) -> None:
        self._decode = decode
        self.accounts: dict[EngineId, Account] = {}

    def open(self, facts: EngineFacts) -> None:
        self.accounts[facts.engine] = Account(facts)

    def close(self, engine: EngineId) -> None:
        """The engine is lost: drop its account and all that was held there."""
        del self.accounts[engine]

    def promise_hbm(self, engine: EngineId, key: Key, blocks: int) -> None:
        account = self.accounts[engine]
        account.held[key] = _Held(hbm_blocks=blocks)
        account.hbm_free_blocks -= blocks
        self._decode.promise_hbm(engine, blocks)

    def line_up(self, engine: EngineId, key: Key, blocks: int) -> bool:
        """Ask for `blocks` of the engine's buffer. Returns True if they are granted at once, else joins the line."""
        account = self.accounts[engine]
        if account.line or blocks > account.buffer_free_blocks:
            account.line[key] = blocks
            return False
        account.grant(key, blocks)
        return True

    def has_line(self, engine: EngineId) -> bool:
        """Returns True when an attempt waits for the engine's buffer."""
        return bool(self.accounts[engine].line)

    def grant_next(self, engine: EngineId) -> Key | None:
        """Grant the head of the line its blocks. Returns its key; None when the line is empty or blocks are short."""
        account = self.accounts[engine]
        if not account.line:
            return None
        key, blocks = next(iter(account.line.items()))
        if blocks > account.buffer_free_blocks:
            return None
        del account.line[key]
        account.grant(key, blocks)
        return key

    def free_buffer(self, engine: EngineId, key: Key, blocks: int) -> bool:
        """Free a part of the attempt's buffer. Returns False when `blocks` is below 1 or more than it holds."""
        account = self.accounts[engine]
        held = account.held[key]
        if not 1 <= blocks <= held.buffer_blocks:
            return False
        held.buffer_blocks -= blocks
        account.buffer_free_blocks += blocks
        return True

    def give_back(self, engine: EngineId, key: Key) -> None:
        """Free everything the attempt holds on the engine, and take it out of the engine's line."""
        account = self.accounts[engine]
        if account.line:
            account.line.pop(key, None)
        held = account.held.pop(key, None)
        if held is None:
            return
        account.buffer_free_blocks += held.buffer_blocks
        if held.hbm_blocks:
            account.hbm_free_blocks += held.hbm_blocks
            self._decode.promise_hbm(engine, -held.hbm_blocks)

    def drain(self, engine: EngineId, key: Key) -> None:
        """Take the attempt out of the line, and keep its blocks held as draining until `give_back`."""
        account = self.accounts[engine]
        account.line.pop(key, None)
        account.held.setdefault(key, _Held()).draining = True

    def holdings(self) -> Iterator[Holding]:
        """Yields every holding, by engine in the order they joined."""
        for engine, account in self.accounts.items():
            for (request, attempt), held in account.held.items():
                yield Holding(engine, request, attempt, held.buffer_blocks, held.hbm_blocks, held.draining)
