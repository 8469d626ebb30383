"""Small clusters and agents for tests of the simulator."""

from typing import Any

import msgspec
import numpy as np

from dualpath.core.audit import audit
from dualpath.core.systems import find_system
from dualpath.lab.facts.cluster_files import load_cluster
from dualpath.lab.sim.costs import Calibration
from dualpath.lab.sim.machine import Machine, build_machine, constants_for, limits_for
from dualpath.lab.sim.simulator import Simulator
from dualpath.spec.topology import Topology
from dualpath.traces.turn_table import Agents, TurnTable

CALIBRATION = Calibration()


def machine_of(
    preset: str,
    engines_per_node: int = 2,
    calibration: Calibration = CALIBRATION,
    model: str | None = None,
    **changed: Any,
) -> Machine:
    """The preset with small nodes, whose weights are made to fit."""
    cluster = load_cluster(preset)
    if model is not None:
        cluster = cluster.with_model(model)
    buffer_bytes = cluster.dram_buffer_bytes / cluster.engines_per_node * engines_per_node
    topology = Topology(cluster.prefill_nodes, cluster.decode_nodes, engines_per_node)
    cluster = msgspec.structs.replace(
        cluster, topology=topology, dram_buffer_bytes=buffer_bytes, weight_bytes_per_parameter=0.2
    )
    return msgspec.structs.replace(build_machine(cluster, calibration), **changed)


def some_agents(
    count: int, turns: int, seed: int = 0, first: int = 12_000, append: int = 400, generate: int = 100
) -> Agents:
    """Agents whose first round reads much, as agents do; gamma-distributed lengths with these means."""
    rng = np.random.default_rng(seed)
    appends, generations = [], []
    for _ in range(count):
        lengths = np.concatenate([[rng.integers(first // 2, 3 * first // 2)], rng.gamma(1, append, turns - 1)])
        appends.append(np.maximum(1, lengths).astype(np.int32))
        generations.append(np.maximum(1, rng.gamma(1, generate, turns)).astype(np.int32))
    return Agents.of_templates(TurnTable.from_lengths(appends, generations))


def one_agent(*rounds: tuple[int, int]) -> Agents:
    """One agent with these (append, generate) rounds."""
    append, generate = (np.array(column, np.int32) for column in zip(*rounds, strict=True))
    return Agents.of_templates(TurnTable.from_lengths([append], [generate]))


def simulator_of(machine: Machine, system: str, **options: Any) -> Simulator:
    return Simulator(
        machine, find_system(system).policy, constants_for(machine, 16_000, 15_600), limits_for(1_000), **options
    )


def simulate(machine: Machine, system: str, agents: Agents, **options: Any) -> Simulator:
    """A whole run, audited, with nothing left behind."""
    simulator = simulator_of(machine, system, **options)
    simulator.arrive(agents)
    simulator.run()
    audit(simulator.scheduler.life)
    assert not simulator.scheduler.held()
    assert not simulator.lives
    return simulator
