"""What the scheduler knows of every engine, in columns: one numpy array a quantity, one slot an engine.

The paper's reported quantities (§8, §6.1): `seq_e`, unfinished requests; `tok_e`, their total tokens; `read_q_n`, a
node's storage-read queue in tokens. Slots are sorted by id (a DE's by group, then id), so that the first of equals is
the one with the smallest id and a group is a slice. Joining and leaving rebuild the columns and may cost O(engines);
everything else is O(1).
"""

from bisect import bisect_left
from itertools import groupby

import numpy as np
import numpy.typing as npt

from dualpath.core.vocabulary import BLOCK_TOKENS, Cause, EngineFacts, EngineId, GroupId, Leg, NodeId, Role

Column = npt.NDArray[np.int64]


def _column(values: list[int]) -> Column:
    return np.array(values, dtype=np.int64)


class PrefillEngines:
    """PEs by slot, in order of id."""

    def __init__(self) -> None:
        self.facts: list[EngineFacts] = []
        self.slots: dict[EngineId, int] = {}
        self.seq = _column([])
        self.tok = _column([])
        self.read_queue = _column([])
        """Of the engine's node, in tokens: equal for the engines of a node."""
        self.buffer_capacity = _column([])
        self.smallest_buffer_blocks = 0

    def __len__(self) -> int:
        return len(self.facts)

    def add(self, facts: EngineFacts, read_queue_tokens: int) -> None:
        slot = bisect_left(self.facts, facts.engine, key=lambda known: known.engine)
        self.facts.insert(slot, facts)
        self.seq = np.insert(self.seq, slot, 0)
        self.tok = np.insert(self.tok, slot, 0)
        self.read_queue = np.insert(self.read_queue, slot, read_queue_tokens)
        self._index()

    def remove(self, engine: EngineId) -> None:
        slot = self.slots[engine]
        del self.facts[slot]
        self.seq = np.delete(self.seq, slot)
        self.tok = np.delete(self.tok, slot)
        self.read_queue = np.delete(self.read_queue, slot)
        self._index()

    def start(self, engine: EngineId, tokens: int) -> None:
        """The engine has one unfinished request more."""
        slot = self.slots[engine]
        self.seq[slot] += 1
        self.tok[slot] += tokens

    def end(self, engine: EngineId, tokens: int) -> None:
        slot = self.slots[engine]
        self.seq[slot] -= 1
        self.tok[slot] -= tokens

    def add_to_read_queue(self, node: NodeId, tokens: int) -> None:
        self.read_queue[self._slots_of_node[node]] += tokens

    def _index(self) -> None:
        self.slots = {facts.engine: slot for slot, facts in enumerate(self.facts)}
        by_node: dict[NodeId, list[int]] = {}
        for slot, facts in enumerate(self.facts):
            by_node.setdefault(facts.node, []).append(slot)
        self._slots_of_node = {node: np.array(slots, dtype=np.intp) for node, slots in by_node.items()}
        self.buffer_capacity = _column([facts.buffer_blocks for facts in self.facts])
        self.smallest_buffer_blocks = min((facts.buffer_blocks for facts in self.facts), default=0)


class DecodeGroup:
    """A group of DEs: views of its slice of the columns, and its totals."""

    def __init__(self, engines: "DecodeEngines", group: GroupId, start: int, stop: int) -> None:
        self.group = group
        self.facts = engines.facts[start:stop]
        self.seq = engines.seq[start:stop]
        self.tok = engines.tok[start:stop]
        self.hbm_free = engines.hbm_free[start:stop]
        self.buffer_capacity = engines.buffer_capacity[start:stop]
        self.tok_total = int(self.tok.sum())
        self.hbm_free_total = int(self.hbm_free.sum())


class DecodeEngines:
    """DEs by slot, in order of group, then id."""

    def __init__(self) -> None:
        self.facts: list[EngineFacts] = []
        self.slots: dict[EngineId, int] = {}
        self.groups: dict[GroupId, DecodeGroup] = {}
        self.group_ids: list[GroupId] = []
        self.group_load = _column([])
        """By position in `group_ids`: tokens of the group's engines and of its private queue."""
        self.seq = _column([])
        self.tok = _column([])
        self.hbm_free = _column([])
        self.hbm_capacity = _column([])
        self.buffer_capacity = _column([])
        self.smallest_hbm_blocks = self.smallest_buffer_blocks = 0
        self._queued: dict[GroupId, int] = {}

    def __len__(self) -> int:
        return len(self.facts)

    def add(self, facts: EngineFacts) -> None:
        slot = bisect_left(self.facts, (facts.group, facts.engine), key=lambda known: (known.group, known.engine))
        self.facts.insert(slot, facts)
        self.seq = np.insert(self.seq, slot, 0)
        self.tok = np.insert(self.tok, slot, 0)
        self.hbm_free = np.insert(self.hbm_free, slot, facts.hbm_blocks)
        self._index()

    def remove(self, engine: EngineId) -> None:
        slot = self.slots[engine]
        del self.facts[slot]
        self.seq = np.delete(self.seq, slot)
        self.tok = np.delete(self.tok, slot)
        self.hbm_free = np.delete(self.hbm_free, slot)
        self._index()

    def start(self, engine: EngineId, tokens: int) -> None:
        """The engine has one unfinished request more."""
        self._change(engine, 1, tokens)

    def end(self, engine: EngineId, tokens: int) -> None:
        self._change(engine, -1, -tokens)

    def promise_hbm(self, engine: EngineId, blocks: int) -> None:
        """Take (or with a negative number give back) device blocks."""
        slot = self.slots[engine]
        self.hbm_free[slot] -= blocks
        self.groups[self.facts[slot].group].hbm_free_total -= blocks

    def queue(self, group: GroupId, tokens: int) -> None:
        """Tokens enter (or, negative, leave) the group's private queue, which counts as load of the group."""
        self._queued[group] = self._queued.get(group, 0) + tokens
        self.group_load[self._position[group]] += tokens

    def _change(self, engine: EngineId, seq: int, tokens: int) -> None:
        slot = self.slots[engine]
        group = self.facts[slot].group
        self.seq[slot] += seq
        self.tok[slot] += tokens
        self.groups[group].tok_total += tokens
        self.group_load[self._position[group]] += tokens

    def _index(self) -> None:
        self.slots = {facts.engine: slot for slot, facts in enumerate(self.facts)}
        self.hbm_capacity = _column([facts.hbm_blocks for facts in self.facts])
        self.buffer_capacity = _column([facts.buffer_blocks for facts in self.facts])
        self.smallest_hbm_blocks = min((facts.hbm_blocks for facts in self.facts), default=0)
        self.smallest_buffer_blocks = min((facts.buffer_blocks for facts in self.facts), default=0)
        self.groups = {}
        start = 0
        for group, members in groupby(self.facts, key=lambda facts: facts.group):
            stop = start + sum(1 for _ in members)
            self.groups[group] = DecodeGroup(self, group, start, stop)
            start = stop
        self.group_ids = list(self.groups)
        self._position = {group: position for position, group in enumerate(self.group_ids)}
        self._queued = {group: self._queued.get(group, 0) for group in self.group_ids}
        self.group_load = _column([self.groups[group].tok_total + self._queued[group] for group in self.group_ids])


class Fleet:
    """All engines that have joined and are not lost, and the read queues of their nodes."""

    def __init__(self) -> None:
        self.facts: dict[EngineId, EngineFacts] = {}
        self.prefill = PrefillEngines()
        self.decode = DecodeEngines()
        self._read_queue: dict[NodeId, int] = {}
        self._engines_of_node: dict[NodeId, list[EngineId]] = {}

    def add(self, facts: EngineFacts) -> None:
        """Raises ValueError on a known id, a capacity that holds nothing, or a node of two roles or groups."""
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
        read_queue_tokens = self._read_queue.setdefault(facts.node, 0)
        if facts.role is Role.PREFILL:
            self.prefill.add(facts, read_queue_tokens)
        else:
            self.decode.add(facts)

    def remove(self, engine: EngineId) -> None:
        facts = self.facts.pop(engine)
        (self.prefill if facts.role is Role.PREFILL else self.decode).remove(engine)
        self._engines_of_node[facts.node].remove(engine)
        if not self._engines_of_node[facts.node]:
            del self._engines_of_node[facts.node], self._read_queue[facts.node]

    def read_queue_tokens(self, engine: EngineId) -> int:
        """Of the engine's node."""
        return self._read_queue[self.facts[engine].node]

    def start_read(self, engine: EngineId, leg: Leg) -> None:
        self._add_read(engine, leg.blocks * BLOCK_TOKENS)

    def end_read(self, engine: EngineId, leg: Leg) -> None:
        self._add_read(engine, -leg.blocks * BLOCK_TOKENS)

    def _add_read(self, engine: EngineId, tokens: int) -> None:
        facts = self.facts[engine]
        self._read_queue[facts.node] += tokens
        if facts.role is Role.PREFILL:
            self.prefill.add_to_read_queue(facts.node, tokens)

    def refusal(self, pe_blocks: int, de_blocks: int, hbm_blocks: int) -> Cause | None:
        """Why no engine could ever take such a request, however idle; None where some PE and some DE could."""
        prefill, decode = self.prefill, self.decode
        if not prefill or not decode:
            return Cause.NO_ENGINE
        if pe_blocks > prefill.smallest_buffer_blocks and pe_blocks > prefill.buffer_capacity.max():
            return Cause.TOO_LARGE
        if de_blocks > decode.smallest_buffer_blocks or hbm_blocks > decode.smallest_hbm_blocks:
            fits = (decode.buffer_capacity >= de_blocks) & (decode.hbm_capacity >= hbm_blocks)
            if not fits.any():
                return Cause.TOO_LARGE
        return None
