"""A cluster with all cores busy: agents that ask at once, of three kinds, and how slow the machine is meanwhile.

What the parts of a cluster take by themselves is measured before; agents that ask at once take longer than that. Caches
and memory are shared, threads are switched, Python's lock is waited for. Crowds tell how much longer: one of mixed
turns, one that appends much and one that is answered at length.
"""

import statistics

import msgspec

from dualpath.calibration.process_clocks import busy_cores_ns, cpu_clocks
from dualpath.experiment.launcher import LaunchedCluster
from dualpath.reference_work import reference_work
from dualpath.workload import AgentMix, ReplayOptions, Trajectory, generate_trajectories, replay, warm_up

ROUNDS = 8


def _crowd(agents: int, turns: int, append_tokens: float, generate_tokens: float) -> tuple[Trajectory, ...]:
    mix = AgentMix(
        turns=1 + turns, first_context_tokens=2000, append_tokens=append_tokens, generate_tokens=generate_tokens
    )
    return tuple(generate_trajectories(mix, agents, seed=1))


CROWDS = {
    "mixed": _crowd(6, 3, append_tokens=64, generate_tokens=16),
    "appends": _crowd(6, 2, append_tokens=320, generate_tokens=4),
    "answers": _crowd(6, 2, append_tokens=16, generate_tokens=48),
}
"""Who asks at once; the first turns are the warm-up."""


class Busy(msgspec.Struct, frozen=True):
    """One crowd at once. Means of replays."""

    jct_ns: float
    cpu_ns: float
    """Of the cluster and the client together."""
    others_cores: float
    """Cores that were busy with anything else meanwhile."""
    reference_ns: float
    """CPU time of the reference work meanwhile."""


async def measure_busy(cluster: LaunchedCluster, pids: list[int]) -> dict[str, Busy]:
    """By crowd; `pids` are the cluster's processes. Raises ClusterError, ReplayError, RuntimeError."""
    contexts = {name: await cluster.run(warm_up(cluster.url, crowd, ReplayOptions())) for name, crowd in CROWDS.items()}
    replays: dict[str, list[Busy]] = {name: [] for name in CROWDS}
    for seed in range(1, 1 + ROUNDS):  # other tokens each time, so that none are in storage
        for name in CROWDS:
            replays[name].append(await _replayed(cluster, pids, name, contexts[name], seed))
    return {name: mean_of(several) for name, several in replays.items()}


def mean_of(several: list[Busy]) -> Busy:
    """Field by field; of one crowd, or over all."""
    return Busy(*(statistics.mean(of) for of in zip(*map(msgspec.structs.astuple, several), strict=True)))


async def _replayed(
    cluster: LaunchedCluster, pids: list[int], crowd: str, contexts: dict[str, list[int]], seed: int
) -> Busy:
    async with reference_work() as meanwhile:
        ours, everybody = sum(cpu_clocks(pids)), busy_cores_ns()
        asked = replay(cluster.url, CROWDS[crowd], ReplayOptions(seed=seed), contexts=contexts)
        jct_ns = (await cluster.run(asked)).jct_s * 1e9
        cpu_ns = sum(cpu_clocks(pids)) - ours
        others_cores = max(0.0, busy_cores_ns() - everybody - cpu_ns) / jct_ns
    if meanwhile.mean_ns is None:
        raise RuntimeError("the process that does the reference work was killed meanwhile")
    return Busy(jct_ns, cpu_ns, others_cores, meanwhile.mean_ns)
