"""What the simulated engines stand on: cores, NICs, threads, and the way to the coordinator."""

from collections.abc import Callable
from typing import Protocol

from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId, Leg, Side
from dualpath.prediction.cpu import Cpu
from dualpath.prediction.machine import MachineRates, TransportCost
from dualpath.prediction.nic import Lane, Mover, Nic
from dualpath.prediction.processes import Processes, Signal, Steps, Workers, all_of
from dualpath.prediction.turns import Turn
from dualpath.sim.events import Events


class Reports(Protocol):
    """What engines tell the coordinator. Called where and when the coordinator has the message in hand."""

    def prepared(self, turn: Turn) -> None: ...

    def loaded(self, turn: Turn, side: Side) -> None: ...

    def prefill_done(self, turn: Turn) -> None: ...

    def tokens(self, turns: list[Turn]) -> None:
        """One token each."""
        ...

    def buffer_freed(self, turn: Turn, blocks: int) -> None: ...

    def stored(self, turn: Turn) -> None: ...

    def finished(self, turn: Turn) -> None: ...


class Plant:
    """Shared by the engines of one run."""

    def __init__(
        self,
        events: Events,
        rates: MachineRates,
        engines: int,
        transport: TransportCost,
        snic_bytes_per_s: int | None,
        cnic_bytes_per_s: int | None,
        paced: bool,
        slowness: float,
    ) -> None:
        self.rates = rates
        self.transport = transport
        self.processes = Processes(events)
        self.cpu = Cpu(events, rates.cores, rates.slowdown, slowness, max(1.0, rates.side_by_side))
        self.mover = Mover(self.processes, self.cpu)
        self.snics = [Nic(snic_bytes_per_s) for _ in range(engines)]
        self.cnics = [Nic(cnic_bytes_per_s, paced) for _ in range(engines)]
        self.layer_token_bytes = rates.kv_bytes_per_token // rates.layers
        self.block_bytes = rates.kv_bytes_per_token * BLOCK_TOKENS
        self.coordinator_thread = Workers(self.processes)
        self.reports: Reports

    @property
    def now(self) -> int:
        return self.processes.events.now

    def working(self, ns: float) -> Steps:
        """A job of one of the threads that mostly sleep: it does nothing but work for so long."""
        yield self.cpu.run_light(ns)

    def tell(self, report: Callable[[], None], tokens: int = 0) -> Signal:
        """An engine's message to the coordinator, perhaps with generated tokens; set when it is dealt with."""
        return self.processes.start(self._telling(report, tokens))

    def _telling(self, report: Callable[[], None], tokens: int) -> Steps:
        control = self.rates.control
        yield self.processes.after(control.hop_ns)
        taking_ns = control.message_ns + tokens * control.token_ns + (control.tokens_message_ns if tokens else 0.0)
        yield self.coordinator_thread.submit(self.working(taking_ns))
        report()


class BlockReader:
    """An engine's threads that read Full Blocks through its SNIC, in the order in which legs were asked for."""

    def __init__(self, plant: Plant, engine: EngineId) -> None:
        self._plant = plant
        self._lane: Lane = plant.snics[engine].rx
        self._threads = Workers(plant.processes, plant.rates.storage.read_threads)

    def read(self, leg: Leg) -> Signal:
        """Set when every block of the leg is in the buffer and checked."""
        return all_of([self._threads.submit(self._block()) for _ in range(leg.blocks)])

    def _block(self) -> Steps:
        plant = self._plant
        yield plant.processes.until(self._lane.reserve(plant.now, plant.block_bytes))
        yield plant.cpu.run_light(plant.rates.storage.read_ns)


class BlockWriter:
    """An engine's threads that write Full Blocks through its SNIC and wait until they are durable."""

    def __init__(self, plant: Plant, engine: EngineId) -> None:
        self._plant = plant
        self._lane = plant.snics[engine].tx
        self._threads = Workers(plant.processes, plant.rates.storage.write_threads)

    def write(self) -> Signal:
        """Set when one block is durable."""
        return self._threads.submit(self._block())

    def _block(self) -> Steps:
        plant = self._plant
        yield plant.processes.until(self._lane.reserve(plant.now, plant.block_bytes))
        yield plant.cpu.run_light(plant.rates.storage.write_ns)
        yield plant.processes.after(plant.rates.storage.write_wait_ns)
