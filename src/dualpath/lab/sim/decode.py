"""Decode engines, simulated by a counter of steps per group instead of an event per token.

Theory of operation. The engines of a group step together (without expert parallelism, an engine is a group); a step
lasts as long as the costs say for its most loaded engine. `steps` counts them as a real number that advances with time
at the rate of the present batch. A request that joins at the next whole step and wants g tokens leaves when the counter
has grown by g: one heap entry of the group, one armed event. A join changes the rate; the armed event then comes too
early, looks, and is posted again. Contexts grow by a token per step without an update: an engine's context is ``base +
requests * steps``.

The most loaded engine is remembered and searched again only when it loses a request. In between, another may overtake
it only by the growth of its context, a few thousandths of a step.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from math import ceil

from dualpath.core.vocabulary import EngineId
from dualpath.lab.sim.costs import StepCosts
from dualpath.lab.sim.events import Events
from dualpath.lab.sim.turns import LiveTurn

_EPSILON = 1e-6


class SimulatedDecodeEngine:
    """One DE's running batch."""

    __slots__ = ("context_base", "engine", "group", "requests")

    def __init__(self, engine: EngineId, group: "SimulatedDecodeGroup") -> None:
        self.engine = engine
        self.group = group
        self.requests = 0
        self.context_base = 0.0
        """Context tokens less requests * steps."""


class SimulatedDecodeGroup:
    """Engines that step together, with the time at which each turn leaves."""

    __slots__ = ("armed_ns", "engines", "leavers", "peak", "requests", "since_ns", "step_ns", "steps")

    def __init__(self) -> None:
        self.engines: list[SimulatedDecodeEngine] = []
        self.steps = 0.0
        self.since_ns = 0
        """When `steps` was last brought up to date."""
        self.step_ns = 0.0
        """Present length of a step; 0 while the group is empty."""
        self.requests = 0
        self.leavers: list[tuple[int, int, int, LiveTurn]] = []
        """Heap of (step, request, attempt, turn)."""
        self.armed_ns = 0
        self.peak: SimulatedDecodeEngine | None = None


class DecodePart:
    """All decode engines. Calls `on_end(turn)` when a turn's last token is out."""

    def __init__(self, events: Events, costs: StepCosts, on_end: Callable[[LiveTurn], None]) -> None:
        self._events = events
        self._costs = costs
        self._fixed_ns = costs.decode_fixed_ns
        self._request_ns = costs.decode_request_ns
        self._context_token_ns = costs.decode_context_token_ns
        self._on_end = on_end
        self.engines: dict[EngineId, SimulatedDecodeEngine] = {}
        self.groups: list[SimulatedDecodeGroup] = []
        self.tokens = 0
        """Tokens generated in all."""
        self.stretch: Callable[[], float] | None = None
        """Factor on steps if engines share cores; read when the batch changes."""

    @property
    def busy_groups(self) -> int:
        return sum(group.requests > 0 for group in self.groups)

    def add_group(self, engines: list[EngineId]) -> None:
        """Adds engines that step together."""
        group = SimulatedDecodeGroup()
        self.groups.append(group)
        for engine in engines:
            self.engines[engine] = SimulatedDecodeEngine(engine, group)
            group.engines.append(self.engines[engine])

    def join(self, turn: LiveTurn) -> None:
        """Adds a turn whose KV is on the device and whose first token is known; it generates the rest."""
        left = turn.generate_tokens - 1
        if left == 0:
            self._on_end(turn)
            return
        engine = self.engines[turn.decode_engine]
        group = engine.group
        self._advance(group)
        first_step = ceil(group.steps - _EPSILON)
        if not group.requests:
            group.steps = float(first_step)
        turn.joined_step = first_step
        engine.requests += 1
        engine.context_base += turn.prompt_tokens + 1 - first_step
        group.requests += 1
        peak = group.peak
        if peak is not engine and (peak is None or self._load_ns(engine) > self._load_ns(peak)):
            group.peak = engine
        heappush(group.leavers, (first_step + left, turn.request, turn.attempt, turn))
        self._pace(group)
        self._arm(group)
        turn.second_token_ns = self._events.now + int((first_step + 1 - group.steps) * group.step_ns)

    def remove(self, turn: LiveTurn) -> int:
        """Removes an aborted attempt; returns the tokens it had generated, without the first one (the prefill's)."""
        if turn.joined_step < 0:
            return 0
        group = self.engines[turn.decode_engine].group
        self._advance(group)
        generated = max(0, int(group.steps + _EPSILON) - turn.joined_step)
        self._leave(turn)
        self._pace(group)
        self._arm(group)
        return generated

    def lose(self, engine: EngineId) -> None:
        """Removes a lost engine, whose turns were removed before; its group continues without it."""
        lost = self.engines.pop(engine)
        lost.group.engines.remove(lost)
        self._find_peak(lost.group)

    def _advance(self, group: SimulatedDecodeGroup) -> None:
        now = self._events.now
        if group.step_ns:
            group.steps += (now - group.since_ns) / group.step_ns
        group.since_ns = now

    def _load_ns(self, engine: SimulatedDecodeEngine) -> float:
        requests = engine.requests
        context_tokens = engine.context_base + requests * engine.group.steps
        return requests * self._request_ns + context_tokens * self._context_token_ns

    def _pace(self, group: SimulatedDecodeGroup) -> None:
        if group.requests:
            assert group.peak is not None
            group.step_ns = self._fixed_ns + self._load_ns(group.peak)
            if self.stretch is not None:
                group.step_ns *= self.stretch()
        else:
            group.step_ns = 0.0

    def _arm(self, group: SimulatedDecodeGroup) -> None:
        """Makes sure that an event is posted at or before the time the next turn leaves."""
        leavers = group.leavers
        while leavers:
            step, _, attempt, turn = leavers[0]
            if turn.joined_step >= 0 and turn.attempt == attempt:
                break
            heappop(leavers)
        else:
            return
        at_ns = group.since_ns + ceil((step - group.steps) * group.step_ns)
        if group.armed_ns <= self._events.now or at_ns < group.armed_ns:
            group.armed_ns = at_ns
            self._events.at(at_ns, self._fire, (group, at_ns))

    def _fire(self, armed: tuple[SimulatedDecodeGroup, int]) -> None:
        group, at_ns = armed
        if group.armed_ns != at_ns:
            return  # an earlier event has been posted since
        group.armed_ns = 0
        self._advance(group)
        leavers = group.leavers
        reached = group.steps + _EPSILON
        ended: list[LiveTurn] = []
        while leavers and leavers[0][0] <= reached:
            _, _, attempt, turn = heappop(leavers)
            if turn.attempt == attempt and turn.joined_step >= 0:
                self._leave(turn)
                ended.append(turn)
        self._pace(group)
        self._arm(group)
        for turn in ended:
            self._on_end(turn)

    def _leave(self, turn: LiveTurn) -> None:
        engine = self.engines[turn.decode_engine]
        group = engine.group
        generated = min(max(0, int(group.steps + _EPSILON) - turn.joined_step), turn.generate_tokens - 1)
        self.tokens += generated
        engine.context_base -= turn.prompt_tokens + 1 - turn.joined_step
        engine.requests -= 1
        group.requests -= 1
        turn.joined_step = -1
        if engine is group.peak:
            self._find_peak(group)

    def _find_peak(self, group: SimulatedDecodeGroup) -> None:
        group.peak = max(group.engines, key=self._load_ns, default=None)
