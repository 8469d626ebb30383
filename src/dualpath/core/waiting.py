"""The lines in which requests wait for a PE and a DE, and the fetch that places them (paper §6.1).

A request waits in two lines at once: the one FIFO for PEs, and the line for DEs, which is first the global queue, then
a group's private queue. Every fetch drains the global queue into the private queues and serves each line from its head
until no engine fits. A request with both engines leaves the lines.

A half-placed request holds something while it waits: tokens counted on a PE, or promised device blocks. This cannot
deadlock as long as all lines keep the order of arrival: a request that holds a promise and waits for a PE is younger
than every request that has a PE, and is behind them in every private queue. Losing an engine would break that order, so
`start_over` then takes back every half-made choice; no command depends on one yet.

A request whose transfer failed waits for engines other than those two, one that an engine could not compute for another
than that, as long as any could take it: where nothing succeeds there is always room.
"""

from collections import deque
from contextlib import AbstractContextManager, nullcontext

from dualpath.core.fleet import Fleet
from dualpath.core.ledger import Ledger
from dualpath.core.placement import OneLine, Placement, TwoLevels
from dualpath.core.read_path import ReadPath, least_pe_blocks
from dualpath.core.request import Request
from dualpath.core.vocabulary import EngineId, GroupId, RequestId, Role

_NOTHING = nullcontext()
Line = deque[Request]
"""Requests in order of arrival. Leaving from the middle is O(line) and rare: a cancellation or a lost engine."""


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
        """The private queues that are not empty."""

    def join(self, request: Request) -> None:
        self.requests[request.id] = request
        self.for_prefill.append(request)
        self.for_decode.append(request)

    def leave(self, request: Request) -> None:
        """Take the request out of every line and take back the engines chosen for it."""
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
        """Undo every half-made choice: all requests are in both lines again, in order of arrival."""
        for request in self.requests.values():
            self._take_back(request)
        self.for_prefill = deque(self.requests.values())
        self.for_decode = deque(self.requests.values())
        self.private.clear()
        for group in self._fleet.decode.groups.values():
            group.short_of_blocks = 0

    def fetch(self) -> list[Request]:
        """Place what can be placed. Returns the requests that now have a PE and a DE, in the order they got both."""
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
            blocks = least_pe_blocks(read_path, request.hit_blocks)
            with self._keeping_away(request, Role.PREFILL, blocks):
                engine = placement.prefill_engine(engines, blocks)
            if engine is None:
                return
            line.popleft()
            engines.start(engine, request.facts.prompt_tokens)
            request.prefill_engine = engine
            if request.decode_engine is not None:
                placed.append(request)

    def _share_out(self, placement: TwoLevels) -> None:
        """DE choice, phase 1: give each request of the global queue a group."""
        decode, private = self._fleet.decode, self.private
        for request in self.for_decode:
            with self._keeping_away(request, Role.DECODE, request.prompt_blocks):
                group = placement.decode_group(decode, request.prompt_blocks, request.hbm_blocks)
            request.group = group
            decode.queue(group, request.facts.prompt_tokens)
            if group in private:
                private[group].append(request)
            else:
                private[group] = deque((request,))
        self.for_decode.clear()

    def _fetch_group(self, placement: TwoLevels, group_id: GroupId, placed: list[Request]) -> None:
        """DE choice, phase 2: serve the group's private queue from its head."""
        decode, line = self._fleet.decode, self.private[group_id]
        group = decode.groups[group_id]
        if group.short_of_blocks:
            return  # the head still does not fit
        z = placement.z_tokens(group, line)
        while line:
            request = line[0]
            tokens = request.facts.prompt_tokens
            with self._keeping_away(request, Role.DECODE, request.prompt_blocks):
                group = decode.groups[group_id]
                engine = placement.group_engine(group, tokens, z, request.prompt_blocks, request.hbm_blocks)
            if engine is None:
                decode.groups[group_id].short_of_blocks = request.hbm_blocks
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
            with self._keeping_away(request, Role.DECODE, request.prompt_blocks):
                engine = placement.decode_engine(decode, tokens, request.prompt_blocks, request.hbm_blocks)
            if engine is None:
                return
            line.popleft()
            self._give_decode(request, engine, placed)

    def _keeping_away(self, request: Request, role: Role, buffer_blocks: int) -> AbstractContextManager[None]:
        """In here, the engines that the request avoids have no room, where others could take it. It waits for those.

        Nor have PEs that would have to stage a prompt of its size, and can't.
        """
        fleet = self._fleet
        small = fleet.prefill.too_small_to_stage(request.prompt_blocks) if role is Role.PREFILL else frozenset()
        if not (request.avoids or small):
            return _NOTHING
        return fleet.hiding(small | fleet.avoidable(role, request.avoids, buffer_blocks, request.hbm_blocks, small))

    def _give_decode(self, request: Request, engine: EngineId, placed: list[Request]) -> None:
        request.decode_engine = engine
        self._fleet.decode.start(engine, request.facts.prompt_tokens)
        self._ledger.promise_hbm(engine, request.key, request.hbm_blocks)
        if request.prefill_engine is not None:
            placed.append(request)

    def _take_back(self, request: Request) -> None:
        """Take back the request's engines, and its place in a group's load."""
        tokens = request.facts.prompt_tokens
        if request.prefill_engine is not None:
            self._fleet.prefill.end(request.prefill_engine, tokens)
        if request.decode_engine is not None:
            self._fleet.decode.end(request.decode_engine, tokens)
            self._ledger.give_back(request.decode_engine, request.key)
        elif request.group is not None:
            self._fleet.decode.queue(request.group, -tokens)
        request.leave_engines()
