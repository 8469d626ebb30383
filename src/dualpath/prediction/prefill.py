"""A prefill engine of the runtime, simulated: legs from storage, batches by core's queue, three threads a batch.

Theory of operation. The same order of things as the runtime's: layer *l* uses buffer *l mod slots*; it is loaded once
layer *l - slots* is computed and shipped, computed once it is loaded, shipped once its rows are written, which is early
in its computing. Where a system is not layerwise everything is loaded, then computed, then shipped. What
moves comes from core's `chunk_plan`. The first token is out when the last layer has been shipped.
"""

from dualpath.core.batching import Chunk, PrefillQueue
from dualpath.core.load_plan import chunk_plan
from dualpath.core.vocabulary import EngineId, Leg, Side
from dualpath.prediction.plant import BlockReader, Plant
from dualpath.prediction.processes import Condition, Signal, Steps, Workers, all_of
from dualpath.prediction.turns import Turn

Moves = dict[EngineId, int]
"""Bytes by the decode engine they come from or go to."""


class LayerMoves:
    """What one layer of a batch moves."""

    def __init__(self) -> None:
        self.copied_bytes = 0
        """From the PE buffer."""
        self.pulled: Moves = {}
        self.put: Moves = {}

    def add(self, turn: Turn, chunk: Chunk, token_bytes: int) -> None:
        plan = chunk_plan(tuple(turn.legs), turn.hit_tokens, chunk.cached_tokens, chunk.new_tokens)
        decode = turn.decode_engine
        for part in plan.loads:
            if part.side is Side.PE:
                self.copied_bytes += part.tokens * token_bytes
            else:
                self.pulled[decode] = self.pulled.get(decode, 0) + part.tokens * token_bytes
        for ship in plan.ships:
            self.put[decode] = self.put.get(decode, 0) + ship.tokens * token_bytes


class PrefillEngine:
    """One PE."""

    def __init__(self, plant: Plant, engine: EngineId, queue: PrefillQueue, layerwise: bool) -> None:
        self._plant = plant
        self.engine = engine
        self._queue = queue
        self._layerwise = layerwise
        self._reader = BlockReader(plant, engine)
        self._main = Workers(plant.processes)
        self._turns: dict[int, Turn] = {}
        self._computing = False

    def load(self, turn: Turn, leg: Leg) -> Steps:
        """The coordinator's order to read a leg."""
        yield self._reader.read(leg)
        self._plant.tell(lambda: self._plant.reports.loaded(turn, Side.PE))

    def prefill(self, turn: Turn) -> Steps:
        """The coordinator's order to compute: everything is in the buffers."""
        yield self._main.submit(self._plant.working(self._plant.rates.control.prefill_request_ns))
        self._turns[turn.request] = turn
        self._queue.push(turn.request, 0, turn.hit_tokens, turn.prompt_tokens - turn.hit_tokens)
        if not self._computing:
            self._computing = True
            self._plant.processes.start(self._batches())

    def _batches(self) -> Steps:
        while chunks := self._queue.next_batch():
            yield self._plant.processes.start(self._batch(chunks))
            for chunk in chunks:
                self._queue.chunk_done(chunk.request, 0)
                if chunk.last:
                    turn = self._turns.pop(chunk.request)
                    self._plant.tell(lambda turn=turn: self._plant.reports.prefill_done(turn), tokens=1)  # type: ignore[misc]
        self._computing = False

    def _batch(self, chunks: tuple[Chunk, ...]) -> Steps:
        plant = self._plant
        moves = LayerMoves()
        for chunk in chunks:
            moves.add(self._turns[chunk.request], chunk, plant.layer_token_bytes)
        layer_ns = plant.rates.prefill.layer_ns(chunks)
        run = _LayerRun(plant, self.engine, moves, layer_ns, self._layerwise)
        yield all_of([plant.processes.start(work) for work in (run.loading(), run.computing(), run.shipping())])


class _LayerRun:
    """One batch: the loader, the compute and the shipper thread, and how far each is, in layers."""

    def __init__(self, plant: Plant, engine: EngineId, moves: LayerMoves, layer_ns: float, layerwise: bool) -> None:
        self._plant = plant
        self._moves = moves
        self._layer_ns = layer_ns
        self._layerwise = layerwise
        self._nic = plant.cnics[engine]
        self._layers = plant.rates.layers
        self._slots = plant.rates.limits.device_layers if layerwise else self._layers
        self._loaded = self._written = self._attended = self._shipped = 0
        self._progress = Condition()

    def loading(self) -> Steps:
        for layer in range(self._layers):
            yield self._progress.when(lambda layer=layer: layer < self._freed() + self._slots)  # type: ignore[misc]
            yield all_of(self._load())
            self._loaded += 1
            self._progress.changed()

    def computing(self) -> Steps:
        for layer in range(self._layers):
            needed = layer + 1 if self._layerwise else self._layers
            yield self._progress.when(lambda needed=needed: self._loaded >= needed)  # type: ignore[misc]
            self._written += 1
            self._progress.changed()
            yield self._plant.cpu.run(self._layer_ns, self._plant.rates.threads)
            self._attended += 1
            self._progress.changed()

    def shipping(self) -> Steps:
        for layer in range(self._layers):
            yield self._progress.when(lambda layer=layer: self._may_ship(layer))  # type: ignore[misc]
            yield all_of(self._ship())
            self._shipped += 1
            self._progress.changed()

    def _freed(self) -> int:
        return min(self._attended, self._shipped)

    def _may_ship(self, layer: int) -> bool:
        return self._written > layer if self._layerwise else self._attended == self._layers

    def _load(self) -> list[Signal]:
        plant, moves, nic = self._plant, self._moves, self._nic
        steps = [
            plant.mover.move((plant.cnics[decode].tx, nic.rx), n_bytes, plant.transport.pull)
            for decode, n_bytes in moves.pulled.items()
        ]
        if moves.copied_bytes:
            steps.append(plant.mover.move((nic.tx, nic.rx), moves.copied_bytes, plant.rates.local_copy))
        return [plant.processes.start(one) for one in steps]

    def _ship(self) -> list[Signal]:
        plant = self._plant
        return [
            plant.processes.start(
                plant.mover.move((self._nic.tx, plant.cnics[decode].rx), n_bytes, plant.transport.put)
            )
            for decode, n_bytes in self._moves.put.items()
        ]
