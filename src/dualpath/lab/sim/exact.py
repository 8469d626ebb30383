"""The slow parts: every block read, layer and decode step is an event, and compute NICs share max-min fairly.

With ``exact=True`` they replace `storage.Storage`, `fabric.Fabric`, `prefill.PrefillPart` and `decode.DecodePart` in a
`Simulator`, so that those can be checked against them (within 2 % on small cases, test_sim_exact.py). They share the
interfaces and the cost model's totals, but not the shortcuts. As in the runtime, traffic comes from `core.load_plan`.
"""

from collections import deque
from collections.abc import Callable, Sequence

from dualpath.core.load_plan import chunk_plan
from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId, Leg, NodeId, Side
from dualpath.lab.sim.costs import StepCosts
from dualpath.lab.sim.decode import SimulatedDecodeEngine, SimulatedDecodeGroup
from dualpath.lab.sim.events import Action, Events
from dualpath.lab.sim.fabric import Fabric
from dualpath.lab.sim.maxmin import SharedLinks
from dualpath.lab.sim.prefill import Batch, PrefillGroup, PrefillPart, StepRecord
from dualpath.lab.sim.storage import Storage
from dualpath.lab.sim.turns import LiveTurn


class ExactStorage(Storage):
    """Reads block by block: every SNIC has a FIFO of legs, one block of which is on the wire."""

    def __init__(self, *arguments: object, block_bytes: int) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._block_bytes = block_bytes
        self._lines: list[deque[tuple[LiveTurn, Side, int]]] = [deque() for _ in self._free_ns]
        self._left_bytes: list[deque[int]] = [deque() for _ in self._free_ns]

    def read(self, node: NodeId, n_bytes: int, turn: LiveTurn, side: Side) -> None:
        self._lines[node].append((turn, side, turn.attempt))
        self._left_bytes[node].append(n_bytes)
        if len(self._lines[node]) == 1:
            self._next_block(node)

    def _next_block(self, node: NodeId) -> None:
        n_bytes = min(self._block_bytes, self._left_bytes[node][0])
        spent_ns = n_bytes * self._ns_per_byte[node]
        self.read_bytes[node] += n_bytes
        self.busy_ns[node] += spent_ns
        self._events.at(self._events.now + round(spent_ns), self._block_done, (node, n_bytes))

    def _block_done(self, block: tuple[NodeId, int]) -> None:
        node, n_bytes = block
        self._left_bytes[node][0] -= n_bytes
        if not self._left_bytes[node][0]:
            self._left_bytes[node].popleft()
            leg = self._lines[node].popleft()
            self._events.at(self._events.now + self._latency_ns, self._on_loaded, leg)
        if self._lines[node]:
            self._next_block(node)


class ExactFabric(Fabric):
    """CNICs whose two directions are links, shared by all copies, pulls and transfers under way."""

    def __init__(self, events: Events, bytes_per_s: Sequence[float]) -> None:
        super().__init__(events, bytes_per_s)
        engines = len(bytes_per_s)
        self.links = SharedLinks(events, [1e9 / one for one in self.ns_per_byte for _direction in range(2)])
        self._copies: list[deque[tuple[int, float, Action, object]]] = [deque() for _ in range(engines)]
        """Copies of each engine to its device, one under way at a time."""

    def move(self, source: EngineId, target: EngineId, n_bytes: int, on_done: Action, argument: object) -> None:
        """Moves bytes from memory that `source`'s CNIC reads to memory that `target`'s CNIC writes."""
        self.read_bytes[source] += n_bytes
        self.write_bytes[target] += n_bytes
        self.links.start((2 * source, 2 * target + 1), n_bytes, on_done, argument)

    def copy(self, decode: EngineId, n_bytes: int, least_ns: float, on_done: Action, argument: object) -> None:
        line = self._copies[decode]
        line.append((n_bytes, least_ns, on_done, argument))
        if len(line) == 1:
            self._next_copy(decode)

    def _next_copy(self, decode: EngineId) -> None:
        n_bytes, least_ns, _, _ = self._copies[decode][0]
        least_at_ns = self._events.now + int(least_ns)
        self.move(decode, decode, n_bytes, lambda _: self._events.at(least_at_ns, self._copied, decode), None)

    def _copied(self, decode: EngineId) -> None:
        _, _, on_done, argument = self._copies[decode].popleft()
        if self._copies[decode]:
            self._next_copy(decode)
        on_done(argument)


class _Step:
    """One step of a group, layer by layer."""

    def __init__(self, group: PrefillGroup, batch: Batch, layer_ns: float, record: StepRecord) -> None:
        self.group = group
        self.batch = batch
        self.layer_ns = layer_ns
        self.record = record
        self.layer = -1
        """Layer being computed; -1 before the first."""
        self.loading = 0
        """Flows of the next layer's loads that have not arrived."""
        self.computing = False
        self.shipping = 0
        self.all_shipped: list[tuple[LiveTurn, int]] | None = None
        """Prompts that end with this step, set once it has ended."""


class ExactPrefill(PrefillPart):
    """Loads the next layer while one is computed, and ships the one before. Not layerwise: all of each in turn."""

    _fabric: ExactFabric

    def _run(self, group: PrefillGroup, batch: Batch, compute_ns: float, record: StepRecord) -> None:
        self._load_layer(_Step(group, batch, compute_ns / self._layers(), record))

    def _layers(self) -> int:
        """Number of pieces in which a step is loaded, computed and shipped."""
        return self._costs.layers if self._layerwise else 1

    def _moves(self, step: _Step, kind: str) -> list[tuple[EngineId, EngineId, int]]:
        """Returns source, target and bytes of one layer's loads or ships."""
        moves = []
        kv = self._costs.kv
        for engine, chunks in step.batch:
            for chunk in chunks:
                turn = self._lives[chunk.request]
                plan = chunk_plan(_legs(turn), turn.hit_tokens, chunk.past_tokens, chunk.new_tokens)
                if kind == "load":
                    for part in plan.loads:
                        source = engine.engine if part.side is Side.PE else turn.decode_engine
                        n_bytes = kv.seen_bytes(part.first_token, part.tokens, chunk.past_tokens)
                        moves.append((source, engine.engine, n_bytes))
                else:
                    n_bytes = sum(
                        kv.seen_bytes(part.first_token, part.tokens, chunk.past_tokens) for part in plan.ships
                    )
                    moves.append((engine.engine, turn.decode_engine, n_bytes))
        return [(source, target, n_bytes // self._layers()) for source, target, n_bytes in moves]

    def _load_layer(self, step: _Step) -> None:
        moves = [] if self._free_io else self._moves(step, "load")
        least_ns = 0.0
        if not self._layerwise and not self._free_io:
            least_ns = max(self._submissions_ns(chunks) for _, chunks in step.batch)
        step.loading = len(moves) + 1
        self._events.at(self._events.now + int(least_ns), self._layer_loaded, step)
        for source, target, n_bytes in moves:
            self._fabric.move(source, target, n_bytes, self._layer_loaded, step)

    def _layer_loaded(self, step: _Step) -> None:
        step.loading -= 1
        self._go_on(step)

    def _go_on(self, step: _Step) -> None:
        """Computes the next layer if its KV has arrived and the layer before is done."""
        if step.loading or step.computing:
            return
        step.layer += 1
        step.computing = True
        self._events.at(self._events.now + round(step.layer_ns), self._layer_computed, step)
        if step.layer + 1 < self._layers():
            self._load_layer(step)

    def _layer_computed(self, step: _Step) -> None:
        step.computing = False
        moves = [] if self._free_io else self._moves(step, "ship")
        step.shipping += len(moves)
        for source, target, n_bytes in moves:
            self._fabric.move(source, target, n_bytes, self._layer_shipped, step)
        if step.layer + 1 < self._layers():
            self._go_on(step)
        elif self._layerwise or self._free_io:
            self._step_computed(step)

    def _layer_shipped(self, step: _Step) -> None:
        step.shipping -= 1
        if step.shipping:
            return
        if step.all_shipped is not None:
            self._on_done(step.all_shipped)
        elif not self._layerwise:
            self._step_computed(step)

    def _step_computed(self, step: _Step) -> None:
        step.record.end_ns = self._events.now
        self.busy_ns += step.record.end_ns - step.record.start_ns
        step.all_shipped = self._close(step.batch, step.record)
        if not step.shipping and step.all_shipped:
            self._on_done(step.all_shipped)
        self._events.at(self._events.now, self._begin, step.group)


def _legs(turn: LiveTurn) -> tuple[Leg, ...]:
    pe_blocks, hit_blocks = turn.pe_tokens // BLOCK_TOKENS, turn.hit_tokens // BLOCK_TOKENS
    legs = (Leg(Side.PE, 0, pe_blocks), Leg(Side.DE, pe_blocks, hit_blocks - pe_blocks))
    return tuple(leg for leg in legs if leg.blocks)


class _Running:
    """One decoding turn, and the tokens it has yet to generate."""

    __slots__ = ("attempt", "context_tokens", "left", "turn")

    def __init__(self, turn: LiveTurn) -> None:
        self.turn = turn
        self.attempt = turn.attempt
        self.left = turn.generate_tokens - 1
        self.context_tokens = turn.prompt_tokens + 1


class ExactDecode:
    """Makes a step an event and a token a unit of it; requests join and leave between steps."""

    def __init__(self, events: Events, costs: StepCosts, on_end: Callable[[LiveTurn], None]) -> None:
        self._events = events
        self._costs = costs
        self._on_end = on_end
        self.engines: dict[EngineId, SimulatedDecodeEngine] = {}
        self.groups: list[SimulatedDecodeGroup] = []
        self.tokens = 0
        self._running: dict[EngineId, list[_Running]] = {}
        self._stepping: set[int] = set()

    def add_group(self, engines: list[EngineId]) -> None:
        """See `decode.DecodePart.add_group`."""
        group = SimulatedDecodeGroup()
        self.groups.append(group)
        for engine in engines:
            self.engines[engine] = SimulatedDecodeEngine(engine, group)
            self._running[engine] = []
            group.engines.append(self.engines[engine])

    def join(self, turn: LiveTurn) -> None:
        """See `decode.DecodePart.join`."""
        if turn.generate_tokens == 1:
            self._on_end(turn)
            return
        self._running[turn.decode_engine].append(_Running(turn))
        group = self.engines[turn.decode_engine].group
        if id(group) not in self._stepping:
            self._stepping.add(id(group))
            self._events.at(self._events.now, self._step, group)

    def remove(self, turn: LiveTurn) -> int:
        """Is never called: without faults nothing is aborted (`faults.plan_faults` refuses them)."""
        raise AssertionError(f"turn {turn.request} is aborted in the exact mode, which knows no faults")

    def lose(self, engine: EngineId) -> None:
        """Is never called, see `remove`."""
        raise AssertionError(f"engine {engine} is lost in the exact mode, which knows no faults")

    def _step(self, group: SimulatedDecodeGroup) -> None:
        batch = [(engine.engine, list(self._running[engine.engine])) for engine in group.engines]
        if not any(running for _, running in batch):
            self._stepping.discard(id(group))
            group.step_ns = 0.0
            return
        costs = self._costs
        step_ns = max(costs.decode_ns(len(runs), sum(run.context_tokens for run in runs)) for _, runs in batch)
        group.step_ns = step_ns
        self._events.at(self._events.now + round(step_ns), self._stepped, (group, batch))

    def _stepped(self, step: tuple[SimulatedDecodeGroup, list[tuple[EngineId, list[_Running]]]]) -> None:
        group, batch = step
        ended: list[LiveTurn] = []
        for engine, running in batch:
            for run in running:
                if not run.turn.second_token_ns:
                    run.turn.second_token_ns = self._events.now
                run.left -= 1
                run.context_tokens += 1
                self.tokens += 1
                if not run.left:
                    self._running[engine].remove(run)
                    ended.append(run.turn)
        self._events.at(self._events.now, self._step, group)
        for turn in ended:
            self._on_end(turn)
