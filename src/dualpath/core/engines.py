"""The scheduler's knowledge of every engine, in columns: one numpy array per quantity, one slot per engine.

The quantities are the paper's (§8, §6.1): `seq_e`, unfinished requests; `tok_e`, their total tokens; `read_q_n`, a
node's storage-read queue in tokens. Slots are sorted by id (a DE's by group, then id). The first of equal values
therefore has the smallest id, and a group is a slice. Joining and leaving rebuild the columns in O(engines); every
other operation is O(1).

Searches use the arrays. Single entries are read and written through memoryviews of them (`…_at`), which give plain ints
at a third of the cost.
"""

from bisect import bisect_left
from itertools import groupby

import numpy as np
import numpy.typing as npt

from dualpath.core.vocabulary import EngineFacts, EngineId, GroupId, NodeId

Column = npt.NDArray[np.int64]
_UNBOUNDED = 1 << 62
_NONE: frozenset[EngineId] = frozenset()


def _column(values: list[int]) -> Column:
    return np.array(values, dtype=np.int64)


class ReadQueues:
    """Storage-read queues of all nodes, in tokens. A node without engines keeps its place, with an empty queue."""

    def __init__(self) -> None:
        self.tokens = _column([])
        self.tokens_at = self.tokens.data
        self._places: dict[NodeId, int] = {}

    def place(self, node: NodeId) -> int:
        """Returns the node's index in `tokens`; a new node is appended."""
        known = self._places.get(node)
        if known is not None:
            return known
        place = self._places[node] = len(self.tokens)
        self.tokens = np.append(self.tokens, 0)
        self.tokens_at = self.tokens.data
        return place


class PrefillEngines:
    """The PEs, by slot in order of id."""

    def __init__(self, queues: ReadQueues) -> None:
        self._queues = queues
        self.draining: set[EngineId] = set()
        self.facts: list[EngineFacts] = []
        self.slots: dict[EngineId, int] = {}
        self.seq = _column([])
        self.tok = _column([])
        self.buffer_capacity = _column([])
        self.index()

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def read_queue(self) -> Column:
        """Read queue of each engine's node, in tokens; engines of one node have equal entries. A copy."""
        return self._queues.tokens[self._places]

    def read_queue_at(self, slot: int) -> int:
        """One entry of `read_queue`."""
        return self._queues.tokens_at[self._place_of[slot]]

    def add(self, facts: EngineFacts) -> None:
        slot = bisect_left(self.facts, facts.engine, key=lambda known: known.engine)
        self.facts.insert(slot, facts)
        self.seq = np.insert(self.seq, slot, 0)
        self.tok = np.insert(self.tok, slot, 0)
        self.index()

    def remove(self, engine: EngineId) -> None:
        slot = self.slots[engine]
        del self.facts[slot]
        self.seq = np.delete(self.seq, slot)
        self.tok = np.delete(self.tok, slot)
        self.index()

    def start(self, engine: EngineId, tokens: int) -> None:
        """The engine has one unfinished request more."""
        slot = self.slots[engine]
        self.seq_at[slot] += 1
        self.tok_at[slot] += tokens

    def end(self, engine: EngineId, tokens: int) -> None:
        slot = self.slots[engine]
        self.seq_at[slot] -= 1
        self.tok_at[slot] -= tokens

    def index(self) -> None:
        self.slots = {facts.engine: slot for slot, facts in enumerate(self.facts)}
        self.seq_at, self.tok_at = self.seq.data, self.tok.data
        self._place_of = [self._queues.place(facts.node) for facts in self.facts]
        self._places = np.array(self._place_of, dtype=np.intp)
        self.buffer_capacity = _column([facts.buffer_blocks for facts in self.facts])
        self.smallest_buffer_blocks = min((facts.buffer_blocks for facts in self.facts), default=-1)
        """Smallest capacity of all PEs; -1 when there is no PE, so that nothing fits."""
        self.some_stage = any(facts.stages for facts in self.facts)
        staging = [facts.buffer_blocks for facts in self.facts if facts.stages and facts.engine not in self.draining]
        self._smallest_staging_blocks = min(staging, default=_UNBOUNDED)

    def too_small_to_stage(self, prompt_blocks: int) -> frozenset[EngineId]:
        """Returns the PEs that would stage such a prompt and can't; of those that are not draining."""
        if prompt_blocks <= self._smallest_staging_blocks:
            return _NONE
        return frozenset(
            facts.engine
            for facts in self.facts
            if facts.stages and facts.buffer_blocks < prompt_blocks and facts.engine not in self.draining
        )


class DecodeGroup:
    """A group of DEs: views of its slice of the columns, and its totals."""

    def __init__(self, engines: "DecodeEngines", group: GroupId, position: int, start: int, stop: int) -> None:
        self.group = group
        self.position = position
        """Index in `DecodeEngines.group_ids`."""
        self.facts = engines.facts[start:stop]
        self.seq = engines.seq[start:stop]
        self.tok = engines.tok[start:stop]
        self.hbm_free = engines.hbm_free[start:stop]
        self.buffer_capacity = engines.buffer_capacity[start:stop]
        self.tok_at, self.hbm_free_at = self.tok.data, self.hbm_free.data
        self.smallest_buffer_blocks = int(self.buffer_capacity.min())
        self.tok_total = int(self.tok.sum())
        self.hbm_free_total = int(self.hbm_free.sum())
        self.short_of_blocks = 0
        """Device blocks that the head of the private queue needs and no engine had free; 0 once an engine may."""


class DecodeEngines:
    """The DEs, by slot in order of group, then id."""

    def __init__(self) -> None:
        self.draining: set[EngineId] = set()
        self.facts: list[EngineFacts] = []
        self.slots: dict[EngineId, int] = {}
        self.groups: dict[GroupId, DecodeGroup] = {}
        self.group_ids: list[GroupId] = []
        self.group_load = _column([])
        """Tokens on the group's engines and in its private queue, by position in `group_ids`."""
        self.seq = _column([])
        self.tok = _column([])
        self.hbm_free = _column([])
        self.hbm_capacity = _column([])
        self.buffer_capacity = _column([])
        self._queued: dict[GroupId, int] = {}
        self.index()

    def __len__(self) -> int:
        return len(self.facts)

    def add(self, facts: EngineFacts) -> None:
        slot = bisect_left(self.facts, (facts.group, facts.engine), key=lambda known: (known.group, known.engine))
        self.facts.insert(slot, facts)
        self.seq = np.insert(self.seq, slot, 0)
        self.tok = np.insert(self.tok, slot, 0)
        self.hbm_free = np.insert(self.hbm_free, slot, facts.hbm_blocks)
        self.index()

    def remove(self, engine: EngineId) -> None:
        slot = self.slots[engine]
        del self.facts[slot]
        self.seq = np.delete(self.seq, slot)
        self.tok = np.delete(self.tok, slot)
        self.hbm_free = np.delete(self.hbm_free, slot)
        self.index()

    def start(self, engine: EngineId, tokens: int) -> None:
        """The engine has one unfinished request more."""
        self._change(engine, 1, tokens)

    def end(self, engine: EngineId, tokens: int) -> None:
        self._change(engine, -1, -tokens)

    def promise_hbm(self, engine: EngineId, blocks: int) -> None:
        """Promise device blocks; a negative number gives them back."""
        slot = self.slots[engine]
        group = self._group_of[slot]
        free_blocks = self._hbm_free_at[slot] - blocks
        self._hbm_free_at[slot] = free_blocks
        group.hbm_free_total -= blocks
        if blocks < 0 and free_blocks >= group.short_of_blocks:
            group.short_of_blocks = 0

    def queue(self, group: GroupId, tokens: int) -> None:
        """Add tokens to the group's private queue, which counts as the group's load; a negative number removes them."""
        self._queued[group] += tokens
        self._group_load_at[self.groups[group].position] += tokens

    def _change(self, engine: EngineId, seq: int, tokens: int) -> None:
        slot = self.slots[engine]
        group = self._group_of[slot]
        self._seq_at[slot] += seq
        self._tok_at[slot] += tokens
        group.tok_total += tokens
        self._group_load_at[group.position] += tokens

    def index(self) -> None:
        self.slots = {facts.engine: slot for slot, facts in enumerate(self.facts)}
        self.hbm_capacity = _column([facts.hbm_blocks for facts in self.facts])
        self.buffer_capacity = _column([facts.buffer_blocks for facts in self.facts])
        self.smallest_hbm_blocks = min((facts.hbm_blocks for facts in self.facts), default=0)
        self.smallest_buffer_blocks = min((facts.buffer_blocks for facts in self.facts), default=0)
        """Smallest capacity of all DEs; 0 when there is no DE, so that nothing fits."""
        self.groups = {}
        self._group_of: list[DecodeGroup] = []
        for group, members in groupby(self.facts, key=lambda facts: facts.group):
            start, stop = len(self._group_of), len(self._group_of) + sum(1 for _ in members)
            self.groups[group] = DecodeGroup(self, group, len(self.groups), start, stop)
            self._group_of += [self.groups[group]] * (stop - start)
        self.group_ids = list(self.groups)
        self._queued = {group: self._queued.get(group, 0) for group in self.group_ids}
        self.group_load = _column([self.groups[group].tok_total + self._queued[group] for group in self.group_ids])
        self._seq_at, self._tok_at, self._hbm_free_at = self.seq.data, self.tok.data, self.hbm_free.data
        self._group_load_at = self.group_load.data
