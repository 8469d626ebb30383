"""Who holds what: buffer blocks and promised device blocks, by engine and attempt.

Theory of operation. Back-pressure is core's: a command that makes an engine allocate is issued only when the ledger has
room for it, so an engine's allocation never fails but by a bug. Each engine has a FIFO line for its buffer, served from
the head only, so a large request is never overtaken for ever.

The order of allocation can't deadlock. An attempt holds its DE's device blocks (promised at DE choice) before it lines
up for DE buffer, and its whole DE buffer before it lines up for PE buffer; who holds PE buffer needs nothing but
compute. Each line thus waits only for holders further along.

An attempt that is aborted keeps its blocks as *draining*: a transfer may still touch them, so they are given back only
when the engine says `released`, or is lost. No deadline frees a block.
"""

from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from dualpath.core.engines import DecodeEngines
from dualpath.core.vocabulary import EngineFacts, EngineId, RequestId

Key = tuple[RequestId, int]
"""``(request, attempt)``."""


class Holding(msgspec.Struct, frozen=True, gc=False):
    """What one attempt holds at one engine."""

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
    """One engine's blocks: free ones, held ones by attempt, and who waits for buffer."""

    __slots__ = ("buffer_free_blocks", "facts", "hbm_free_blocks", "held", "line")

    def __init__(self, facts: EngineFacts) -> None:
        self.facts = facts
        self.buffer_free_blocks = facts.buffer_blocks
        self.hbm_free_blocks = facts.hbm_blocks
        self.held: dict[Key, _Held] = {}
        self.line: OrderedDict[Key, int] = OrderedDict()

    def grant(self, key: Key, blocks: int) -> None:
        """Give the attempt so much of the buffer."""
        self.buffer_free_blocks -= blocks
        held = self.held.get(key)
        if held is None:
            self.held[key] = _Held(blocks)
        else:
            held.buffer_blocks += blocks


class Ledger:
    """The accounts of all engines. Keeps the free-HBM column of `decode` in step."""

    def __init__(self, decode: DecodeEngines) -> None:
        self._decode = decode
        self.accounts: dict[EngineId, Account] = {}

    def open(self, facts: EngineFacts) -> None:
        self.accounts[facts.engine] = Account(facts)

    def close(self, engine: EngineId) -> None:
        """The engine is lost, and with it whatever was held there."""
        del self.accounts[engine]

    def promise_hbm(self, engine: EngineId, key: Key, blocks: int) -> None:
        account = self.accounts[engine]
        account.held[key] = _Held(hbm_blocks=blocks)
        account.hbm_free_blocks -= blocks
        self._decode.promise_hbm(engine, blocks)

    def line_up(self, engine: EngineId, key: Key, blocks: int) -> bool:
        """Ask for `blocks` of the engine's buffer; True if they are given at once, else the attempt is in line."""
        account = self.accounts[engine]
        if account.line or blocks > account.buffer_free_blocks:
            account.line[key] = blocks
            return False
        account.grant(key, blocks)
        return True

    def has_line(self, engine: EngineId) -> bool:
        """Somebody waits for the engine's buffer."""
        return bool(self.accounts[engine].line)

    def grant_next(self, engine: EngineId) -> Key | None:
        """Give the head of the line its blocks, if there are enough; who it was, else None."""
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
        """A part of the attempt's buffer is given back; False where it does not hold so much."""
        account = self.accounts[engine]
        held = account.held[key]
        if not 1 <= blocks <= held.buffer_blocks:
            return False
        held.buffer_blocks -= blocks
        account.buffer_free_blocks += blocks
        return True

    def give_back(self, engine: EngineId, key: Key) -> None:
        """Everything the attempt has at the engine, a place in its line included, is free again."""
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
        """What the attempt holds stays held until `give_back`; it waits for nothing more."""
        account = self.accounts[engine]
        account.line.pop(key, None)
        account.held.setdefault(key, _Held()).draining = True

    def holdings(self) -> Iterator[Holding]:
        """Everything held anywhere, by engine in order of joining."""
        for engine, account in self.accounts.items():
            for (request, attempt), held in account.held.items():
                yield Holding(engine, request, attempt, held.buffer_blocks, held.hbm_blocks, held.draining)
