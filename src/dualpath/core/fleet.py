"""`Fleet`: every engine that has joined, whether it may get work, and why none could ever take a request."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec

from dualpath.core.engines import DecodeEngines, PrefillEngines, ReadQueues
from dualpath.core.vocabulary import BLOCK_TOKENS, Cause, EngineFacts, EngineId, Leg, NodeId, Role

_NONE: frozenset[EngineId] = frozenset()


class Fleet:
    """All engines that have joined and are not lost, and the read queues of their nodes."""

    def __init__(self) -> None:
        self.facts: dict[EngineId, EngineFacts] = {}
        self.read_queues = ReadQueues()
        self.prefill = PrefillEngines(self.read_queues)
        self.decode = DecodeEngines()
        self._engines_of_node: dict[NodeId, list[EngineId]] = {}
        self._place_of: dict[EngineId, int] = {}
        """Index of the engine's node in `read_queues`."""

    def add(self, facts: EngineFacts) -> None:
        """Raises ValueError for a known id, a capacity below one block, or a node with two roles or groups."""
        if facts.engine in self.facts:
            raise ValueError(f"engine {facts.engine} has joined already; an engine that comes back takes a new id")
        if facts.buffer_blocks < 1 or (facts.role is Role.DECODE and facts.hbm_blocks < 1):
            raise ValueError(f"{facts}: every engine needs a buffer, and a decode engine device memory, of a block")
        neighbours = self._engines_of_node.setdefault(facts.node, [])
        for neighbour in neighbours:
            known = self.facts[neighbour]
            if (known.role, known.group) != (facts.role, facts.group):
                raise ValueError(f"{facts} shares its node with {known}: a node has one role and one group")
        neighbours.append(facts.engine)
        self.facts[facts.engine] = facts
        self._place_of[facts.engine] = self.read_queues.place(facts.node)
        if facts.role is Role.PREFILL:
            self.prefill.add(facts)
        else:
            self.decode.add(facts)

    def remove(self, engine: EngineId) -> None:
        """Remove an engine; the caller has ended its reads."""
        facts = self.facts.pop(engine)
        del self._place_of[engine]
        columns = self.prefill if facts.role is Role.PREFILL else self.decode
        columns.draining.discard(engine)
        columns.remove(engine)
        self._engines_of_node[facts.node].remove(engine)
        if not self._engines_of_node[facts.node]:
            del self._engines_of_node[facts.node]

    def drain(self, engine: EngineId, draining: bool) -> None:
        """While an engine is draining, it gets no more requests; those that it has go on."""
        facts = self.facts[engine]
        columns = self.prefill if facts.role is Role.PREFILL else self.decode
        (columns.draining.add if draining else columns.draining.discard)(engine)
        without_room = msgspec.structs.replace(facts, buffer_blocks=-1)  # for placement
        seen = without_room if draining else facts
        columns.facts[columns.slots[engine]] = seen
        columns.index()

    @contextmanager
    def hiding(self, engines: Iterable[EngineId]) -> Iterator[None]:
        """In here, placement sees no room at these engines; none of them is draining."""
        hidden = list(engines)
        for engine in hidden:
            self.drain(engine, True)
        yield
        for engine in hidden:
            self.drain(engine, False)

    def avoidable(
        self,
        role: Role,
        engines: frozenset[EngineId],
        buffer_blocks: int,
        hbm_blocks: int,
        unable: frozenset[EngineId] = _NONE,
    ) -> set[EngineId]:
        """Returns those of `engines` that could take such a request; none when no others could. `unable` can't."""
        columns = self.prefill if role is Role.PREFILL else self.decode
        able = {
            facts.engine
            for facts in columns.facts  # draining ones have room for nothing here
            if facts.buffer_blocks >= buffer_blocks and (role is Role.PREFILL or facts.hbm_blocks >= hbm_blocks)
        } - unable
        return able & engines if able - engines else set()

    @property
    def has_both_roles(self) -> bool:
        """Whether there are a PE and a DE, draining ones included."""
        return len(self.prefill) > 0 and len(self.decode) > 0

    def read_queue_tokens(self, engine: EngineId) -> int:
        """Returns the read queue of the engine's node."""
        return self.read_queues.tokens_at[self._place_of[engine]]

    def start_read(self, engine: EngineId, leg: Leg) -> None:
        self.read_queues.tokens_at[self._place_of[engine]] += leg.blocks * BLOCK_TOKENS

    def end_read(self, engine: EngineId, leg: Leg) -> None:
        self.read_queues.tokens_at[self._place_of[engine]] -= leg.blocks * BLOCK_TOKENS

    def refusal(self, pe_blocks: int, de_blocks: int, hbm_blocks: int) -> Cause | None:
        """Returns why no engine, idle or draining, could ever take such a request; None when some PE and DE could.

        `de_blocks` are the whole prompt's, and what a PE needs that stages it.
        """
        prefill, decode = self.prefill, self.decode
        if (
            max(pe_blocks, de_blocks if prefill.some_stage else 0) <= prefill.smallest_buffer_blocks
            and de_blocks <= decode.smallest_buffer_blocks
            and hbm_blocks <= decode.smallest_hbm_blocks
        ):
            return None
        if not self.has_both_roles:
            return Cause.NO_ENGINE
        fitting = {
            facts.role
            for facts in self.facts.values()
            if facts.buffer_blocks >= (pe_blocks if facts.role is Role.PREFILL and not facts.stages else de_blocks)
            and (facts.role is Role.PREFILL or facts.hbm_blocks >= hbm_blocks)
        }
        return None if len(fitting) == len(Role) else Cause.TOO_LARGE
