"""Simulates a result file's runs on a profile, from their setup and their agents and nothing that was measured.

The simulator is `lab.sim`, as for any cluster. Engines on
CPUs share the host's cores (`Machine.full_speed_engines`). What HTTP, processes and copies take of the cores is not
modelled.
"""

from pathlib import Path

import msgspec
import numpy as np

from dualpath.cluster.config import ClusterConfig
from dualpath.core.systems import SYSTEMS, find_system
from dualpath.core.vocabulary import BLOCK_TOKENS, EngineFacts, Role
from dualpath.lab.facts.profile import Profile, ProfileError
from dualpath.lab.sim.costs import SECOND_NS, measured_costs
from dualpath.lab.sim.machine import BatchLimits, Machine, constants_for, limits_for
from dualpath.lab.sim.run import without_garbage_collection
from dualpath.lab.sim.simulator import Simulator
from dualpath.lab.sim.turns import LiveTurn
from dualpath.lab.sim.workloads import typical_turn
from dualpath.results.build import compared, run_of
from dualpath.results.file import ResultFile, Run
from dualpath.results.turns import ReplayResult, TurnResult
from dualpath.spec.cluster_setup import ClusterSetup
from dualpath.spec.topology import Topology
from dualpath.traces.trajectory import Trajectory
from dualpath.traces.turn_table import Agents, TurnTable

_UNLIMITED_BYTES_PER_S = 1e12
_SERVE = ClusterConfig(model="", store="")
"""Defaults of `dualpath serve` that a result file does not repeat."""


def predict(measured: ResultFile, profile: Profile, where: str, command: str = "") -> ResultFile:
    """Returns the same runs in order, of kind ``prediction``. Raises ProfileError naming the run, or `where`."""
    machine = f"simulated with {where}, a profile of {profile.model} on {profile.machine.device or 'some device'}"
    return ResultFile(
        kind="prediction",
        name=measured.name,
        trajectories=measured.trajectories,
        runs=compared([_predicted(measured, number, profile, where) for number in range(len(measured.runs))]),
        configuration=msgspec.structs.replace(measured.configuration, machine=machine),
        command=command,
        workload=measured.workload,
    )


def _predicted(result: ResultFile, number: int, profile: Profile, where: str) -> Run:
    run = result.runs[number]
    name = f"run {number} ({run.topology} {run.system})"
    if run.cluster is None or run.trajectories not in result.trajectories:
        raise ProfileError(
            f"{name} does not say what its {'cluster was' if run.cluster is None else 'agents asked'}; results of "
            "dualpath demo and experiment do, and of replays against dualpath serve"
        )
    late = result.kind == "replay" and (run.agents_per_s is not None or len(run.parts) > 1)
    if late or run.system not in SYSTEMS.names():
        raise ProfileError(
            f"{name}: only runs of dualpath's systems can be simulated, and of replays "
            "those whose agents all start at once, not resumed"
        )
    _check(name, run.cluster, Path(result.configuration.model).name, profile, where)
    try:
        machine = _machine(Topology.parse(run.topology), run.cluster, profile)
        agents = _agents(result.trajectories[run.trajectories], run.first_round, run.gap_scale)
    except ValueError as error:
        raise ProfileError(f"{name} can't be simulated: {error}") from error
    return _simulated(run, machine, agents, [one.id for one in result.trajectories[run.trajectories]])


def _check(name: str, cluster: ClusterSetup, model: str, profile: Profile, where: str) -> None:
    """Checks that the profile is for this model, dtype and thread count, as far as the profile says."""
    for what, ran, measured in (
        ("model", model, profile.model),
        ("bytes of KV a token", cluster.kv_bytes_per_token, profile.kv_bytes_per_token),
        ("dtype", cluster.dtype, profile.machine.dtype or None),
        ("threads of an engine", cluster.threads, profile.machine.threads),
    ):
        if measured is not None and ran != measured:
            raise ProfileError(f"{name} has {ran!r} as its {what}, {where} has {measured!r}; give a profile of that")


def _machine(topology: Topology, cluster: ClusterSetup, profile: Profile) -> Machine:
    kv_bytes, rates, prefill = cluster.kv_bytes_per_token, profile.rates, topology.prefill_engines
    node_of = [node for node, engines in enumerate(topology.sizes) for _ in range(engines)]
    snics, cnics = topology.by_node(cluster.snic_bytes_per_s), topology.by_node(cluster.cnic_bytes_per_s)
    block_bytes = kv_bytes * BLOCK_TOKENS
    engines = tuple(
        EngineFacts(
            engine=number,
            role=Role.PREFILL if number < prefill else Role.DECODE,
            node=node,
            group=int(number >= prefill),
            buffer_blocks=_SERVE.buffer_bytes // block_bytes,
            hbm_blocks=0 if number < prefill else _SERVE.hbm_bytes // block_bytes,
        )
        for number, node in enumerate(node_of)
    )
    return Machine(
        name=str(topology),
        engines=engines,
        costs=measured_costs(profile.engine(), cluster.layers, cluster.kv),
        synchronised=False,
        snic_bytes_per_s=tuple(_slower(rate, rates.store_read_bytes_per_s) for rate in snics),
        cnic_bytes_per_s=tuple(_slower(cnics[node], rates.transfer_bytes_per_s) for node in node_of),
        read_latency_ns=0,
        prefill_kv_tokens=_SERVE.max_batch_kv_tokens,
        batches=BatchLimits(
            # The file's quota is of one layer's attention; a profile knows whole steps.
            quota_ns=cluster.compute_quota_s * SECOND_NS * cluster.layers,
            requests=_SERVE.max_batch_requests,
            kv_tokens=_SERVE.max_batch_kv_tokens,
        ),
        full_speed_engines=None if profile.machine.threads is None else cluster.cores / cluster.threads,
    )


def _slower(link: float | None, measured: float | None) -> float:
    return min(link or _UNLIMITED_BYTES_PER_S, measured or _UNLIMITED_BYTES_PER_S)


def _agents(trajectories: list[Trajectory], first_round: int, gap_scale: float) -> Agents:
    """Returns the measured rounds, from `first_round` on; earlier ones are stored. Raises ValueError."""
    whole = TurnTable.from_trajectories(trajectories)
    kept = [position for start, end in zip(whole.starts[:-1], whole.starts[1:], strict=True)
            for position in range(start + first_round, end)]  # fmt: skip
    starts = whole.starts - first_round * np.arange(len(whole) + 1)
    gaps = (whole.gap_ns[kept] * gap_scale).round().astype(whole.gap_ns.dtype)
    return Agents.of_templates(
        TurnTable(starts, whole.kept_tokens[kept], whole.append_tokens[kept], whole.generate_tokens[kept], gaps)
    )


def _simulated(run: Run, machine: Machine, agents: Agents, names: list[str]) -> Run:
    # The runtime's oracle moves its bytes too, as fast as it can.
    policy = msgspec.structs.replace(find_system(run.system).policy, free_io=False)
    simulator = Simulator(machine, policy, constants_for(machine, *typical_turn(agents)), limits_for(len(agents)))
    turns: list[TurnResult] = []
    simulator.on_turn = lambda turn: turns.append(
        _turn(turn, names[turn.agent.number], run.first_round + turn.agent.taken, simulator.events.now)
    )
    # An agent's first measured turn comes when its pause is over.
    simulator.arrive(agents, agents.table.gap_ns[agents.table.starts[:-1]].tolist())
    with without_garbage_collection():
        simulator.run()
    failed = sum(simulator.measured.failed.values())
    jct_s = simulator.events.now / 1e9
    prefill = Topology.parse(run.topology).prefill_nodes
    nodes = [f"PE{n}" if n < prefill else f"DE{n - prefill}" for n in range(machine.nodes)]
    snic_bytes = dict(zip(nodes, simulator.storage.read_bytes, strict=True))
    return run_of(
        ReplayResult(jct_s=jct_s, turns=tuple(turns), failures=()),
        **{field: getattr(run, field) for field in SET_UP},
        snic_bytes=snic_bytes,
        errors=failed,
    )


SET_UP = ("parameters", "trajectories", "first_round", "gap_scale", "cluster", "topology", "system", "repeat")
"""Fields of a run's record that were not measured."""


def _turn(turn: LiveTurn, trajectory: str, round_index: int, now: int) -> TurnResult:
    first_ns, second_ns, generated = turn.first_token_ns, turn.second_token_ns, turn.generate_tokens
    later = generated - 1
    return TurnResult(
        trajectory=trajectory,
        round_index=round_index,
        tries=1,
        start_s=turn.submitted_ns / 1e9,
        ttft_s=(first_ns - turn.submitted_ns) / 1e9,
        ttst_s=(second_ns - first_ns) / 1e9 if later else None,
        tpot_s=(now - first_ns) / 1e9 / later if later else None,
        latency_s=(now - turn.submitted_ns) / 1e9,
        prompt_tokens=turn.prompt_tokens,
        loaded_tokens=turn.hit_tokens,
        generated_tokens=generated,
        output_digest="",
    )
