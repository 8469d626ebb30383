"""The scheduler's knowledge of every engine, in columns: one numpy array per quantity, one slot per engine.

The quantities are the paper's (§8, §6.1): `seq_e`, unfinished requests; `tok_e`, their total tokens; `read_q_n`, a
node's storage-read queue in tokens. Slots are sorted by id (a DE's by group, then id). The first of equal values
therefore has the smallest id, and a group is a slice. Joining and leaving rebuild the columns in O(engines); every
other operation is O(1).

Searches use the arrays. Single entries are read and written through memoryviews of them (`…_at`), which give plain ints
at a third of the cost.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import msgspec
import numpy as np
import numpy.typing as npt

from dualpath.core.vocabulary import BLOCK_TOKENS, Cause, EngineFacts, EngineId, GroupId, Leg, NodeId, Role

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
        seen = (
            msgspec.structs.replace(facts, buffer_blocks=-1) if draining else facts
        )  # placement sees room for nothing
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
