"""Faults at a given time: an engine dies, a storage NIC or all of storage slows down or recovers.

A lost engine's turns leave it at once; core aborts them elsewhere and retries them after the tokens that the client has
seen. A slowed NIC stretches the reads under way.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from dualpath.core.vocabulary import Role, Side
from dualpath.lab.sim.simulator import Simulator


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens when. Raises ValueError for a negative time or a factor that is not above zero."""

    at_s: float
    kind: Literal["engine_lost", "snic", "storage"]
    target: int = 0
    """Number of an engine or a node; `storage` means every node's SNIC."""
    factor: float = 1.0
    """Factor on a NIC's present rate: 0.1 slows it down tenfold, 10 afterwards restores it."""

    def __post_init__(self) -> None:
        if self.at_s < 0 or self.factor <= 0:
            raise ValueError(f"{self}: at_s can't be below zero, and factor must be above zero")


def plan_faults(simulator: Simulator, faults: Sequence[Fault]) -> None:
    """Posts the faults. Raises ValueError for an engine or node that the machine does not have, and in exact mode."""
    if faults and simulator.exact:
        raise ValueError("the exact mode knows no faults; leave out one of the two")
    for fault in faults:
        count = len(simulator.machine.engines) if fault.kind == "engine_lost" else simulator.machine.nodes
        if not 0 <= fault.target < count:
            raise ValueError(f"{fault}: {simulator.machine.name} has {count} of them, numbered from 0")
        simulator.events.at(round(fault.at_s * 1e9), lambda fault: _happen(simulator, fault), fault)


def _happen(simulator: Simulator, fault: Fault) -> None:
    if fault.kind == "engine_lost":
        _lose_engine(simulator, fault.target)
        return
    nodes = range(simulator.machine.nodes) if fault.kind == "storage" else [fault.target]
    for node in nodes:
        _slow_down(simulator, node, fault.factor)


def _lose_engine(simulator: Simulator, engine: int) -> None:
    if simulator.machine.engines[engine].role is Role.PREFILL:
        if engine in simulator.prefill.engines:
            simulator.prefill.lose(engine)
    elif engine in simulator.decode.engines:
        for turn in simulator.lives.values():
            if turn.decode_engine == engine:
                simulator.stop_decoding(turn)
        simulator.decode.lose(engine)
    simulator.scheduler.engine_lost(simulator.events.now, engine)


def _slow_down(simulator: Simulator, node: int, factor: float) -> None:
    now = simulator.events.now
    legs = [
        (turn, side)
        for turn in simulator.lives.values()
        for side, engine in ((Side.PE, turn.load_engine), (Side.DE, turn.decode_engine))
        if turn.load_done_ns[side is Side.DE] > now and simulator.machine.engines[engine].node == node
    ]
    legs.sort(key=lambda leg: (leg[0].load_done_ns[leg[1] is Side.DE], leg[0].request))
    simulator.storage.slow_down(node, factor, legs)
