"""Where requests wait for a PE and a DE, and the fetch that places them (paper §6.1).

A request stands in two lines at once: the one FIFO for PEs, and for a DE first the global queue, then the private queue
of a group. Every fetch drains the global queue into the groups' and serves each line from its head until it is stuck.
Whoever has both engines leaves.

Half-placed requests hold something while they wait: tokens counted on a PE, or a promise of device blocks. That can't
lock up as long as all lines keep the order of arrival: who holds a promise and waits for a PE is younger than everyone
who has a PE, and stands behind them in every private queue. Losing an engine would mix that order, so `start_over` then
takes every half-made choice back; no command depends on one yet.
"""

from collections import deque

from dualpath.core.engines import Fleet
from dualpath.core.ledger import Ledger
from dualpath.core.placement import OneLine, Placement, TwoLevels
from dualpath.core.read_path import ReadPath, least_pe_blocks
from dualpath.core.request import Request
from dualpath.core.vocabulary import EngineId, GroupId, RequestId

Line = deque[Request]
"""In order of arrival. Leaving from the middle is O(line), and rare: cancelled, or lost with an engine."""


class WaitingRoom:
    """All QUEUED requests, in order of arrival."""

    def __init__(self, placement: Placement, read_path: ReadPath, fleet: Fleet, ledger: Ledger) -> None:
        self._placement = placement
        self._read_path = read_path
        self._fleet = fleet
        self._ledger = ledger
        self.requests: dict[RequestId, Request] = {}
        self.for_prefill: Line = deque()
        self.for_decode: Line = deque()
        self.private: dict[GroupId, Line] = {}
        """Private queues that are not empty."""

    def join(self, request: Request) -> None:
        self.requests[request.id] = request
        self.for_prefill.append(request)
        self.for_decode.append(request)

    def leave(self, request: Request) -> None:
        """Out of every line, and back with what was chosen for it."""
        del self.requests[request.id]
        if request.prefill_engine is None:
            self.for_prefill.remove(request)
        if request.decode_engine is None:
            if request.group is None:
                self.for_decode.remove(request)
            else:
                line = self.private[request.group]
                line.remove(request)
                self._fleet.decode.groups[request.group].short_of_blocks = 0
                if not line:
                    del self.private[request.group]
        self._take_back(request)

    def start_over(self) -> None:
        """Undo every half-made choice: all stand in both lines again, in order of arrival."""
        for request in self.requests.values():
            self._take_back(request)
        self.for_prefill = deque(self.requests.values())
        self.for_decode = deque(self.requests.values())
        self.private.clear()
        for group in self._fleet.decode.groups.values():
            group.short_of_blocks = 0

    def fetch(self) -> list[Request]:
        """Place what can be placed; who now has both a PE and a DE, in the order in which that came about."""
        placed: list[Request] = []
        self._fetch_prefill(placed)
        if isinstance(self._placement, TwoLevels):
            self._share_out(self._placement)
            for group in list(self.private):
                self._fetch_group(self._placement, group, placed)
        else:
            self._fetch_one_line(self._placement, placed)
        for request in placed:
            del self.requests[request.id]
        return placed

    def _fetch_prefill(self, placed: list[Request]) -> None:
        engines, placement, read_path = self._fleet.prefill, self._placement, self._read_path
        line = self.for_prefill
        while line:
            request = line[0]
            engine = placement.prefill_engine(engines, least_pe_blocks(read_path, request.hit_blocks))
            if engine is None:
                return
            line.popleft()
            engines.start(engine, request.facts.prompt_tokens)
            request.prefill_engine = engine
            if request.decode_engine is not None:
                placed.append(request)

    def _share_out(self, placement: TwoLevels) -> None:
        """DE choice, phase 1: each request of the global queue to a group."""
        decode, private = self._fleet.decode, self.private
        for request in self.for_decode:
            group = placement.decode_group(decode, request.prompt_blocks, request.hbm_blocks)
            request.group = group
            decode.queue(group, request.facts.prompt_tokens)
            if group in private:
                private[group].append(request)
            else:
                private[group] = deque((request,))
        self.for_decode.clear()

    def _fetch_group(self, placement: TwoLevels, group_id: GroupId, placed: list[Request]) -> None:
        """DE choice, phase 2: the group's private queue from its head."""
        decode, line = self._fleet.decode, self.private[group_id]
        group = decode.groups[group_id]
        if group.short_of_blocks:
            return  # as stuck as it was
        z = placement.z_tokens(group, line)
        while line:
            request = line[0]
            tokens = request.facts.prompt_tokens
            engine = placement.group_engine(group, tokens, z, request.prompt_blocks, request.hbm_blocks)
            if engine is None:
                group.short_of_blocks = request.hbm_blocks
                return
            line.popleft()
            decode.queue(group_id, -tokens)
            self._give_decode(request, engine, placed)
        del self.private[group_id]

    def _fetch_one_line(self, placement: OneLine, placed: list[Request]) -> None:
        decode, line = self._fleet.decode, self.for_decode
        while line:
            request = line[0]
            tokens = request.facts.prompt_tokens
            engine = placement.decode_engine(decode, tokens, request.prompt_blocks, request.hbm_blocks)
            if engine is None:
                return
            line.popleft()
            self._give_decode(request, engine, placed)

    def _give_decode(self, request: Request, engine: EngineId, placed: list[Request]) -> None:
        request.decode_engine = engine
        self._fleet.decode.start(engine, request.facts.prompt_tokens)
        self._ledger.promise_hbm(engine, request.key, request.hbm_blocks)
        if request.prefill_engine is not None:
            placed.append(request)

    def _take_back(self, request: Request) -> None:
        """What was chosen for it, a private queue included."""
        tokens = request.facts.prompt_tokens
        if request.prefill_engine is not None:
            self._fleet.prefill.end(request.prefill_engine, tokens)
        if request.decode_engine is not None:
            self._fleet.decode.end(request.decode_engine, tokens)
            self._ledger.give_back(request.decode_engine, request.key)
        elif request.group is not None:
            self._fleet.decode.queue(request.group, -tokens)
        request.leave_engines()
