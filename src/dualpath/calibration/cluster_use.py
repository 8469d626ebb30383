"""A whole cluster, measured from outside: which process and which thread used the cores for what.

One cluster of one PE and one DE serves a few kinds of request, alone, one after another; CPU clocks of processes and of
engines' threads tell what they took for one. Then several like them are answered together (`choir`), and agents ask at
once (`busy`).
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from dualpath.calibration.busy import Busy, measure_busy
from dualpath.calibration.choir import Together, measure_choir
from dualpath.calibration.kinds import KINDS
from dualpath.calibration.process_clocks import Clocks, cpu_clocks, engine_clocks
from dualpath.experiment.launcher import SERVE, LaunchedCluster, LocalLauncher
from dualpath.prediction.machine import MachineRates
from dualpath.workload import ReplayOptions, Trajectory, replay, warm_up

SETTLE_S = 0.4
IDLE_S = 1.0
LONE_ROUNDS = 4


class Used(msgspec.Struct, frozen=True):
    """Of one request of a kind: time to first token; CPU time of client, server, engines' main and compute threads."""

    ttft_s: float
    client_ns: float
    server_ns: float
    prefill_main_ns: float
    prefill_compute_ns: float
    decode_main_ns: float
    decode_compute_ns: float


class ClusterUse(msgspec.Struct, frozen=True):
    """What the parts of the measurement used."""

    lone: dict[str, Used]
    """By kind."""
    choir: Together
    busy: dict[str, Busy]
    """By crowd."""


def measure_cluster(rates: MachineRates, model: Path, store: Path) -> ClusterUse:
    """Start a cluster with its store under `store`, and ask. Raises ClusterError, ReplayError."""
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="calibrate-", dir=store) as folder:
        return asyncio.run(_measure(rates, model, Path(folder)))


class _Ready(msgspec.Struct):
    class _Engine(msgspec.Struct):
        role: str
        pid: int

    pid: int
    engines: list[_Engine]


async def _measure(rates: MachineRates, model: Path, folder: Path) -> ClusterUse:
    ready_file = folder / "ready.json"
    launcher = LocalLauncher(
        model=model,
        snic_bytes_per_s=None,
        cnic_bytes_per_s=None,
        logs=folder,
        ready_file=ready_file,
        serve_command=(*SERVE, "--threads", str(rates.threads), "--dtype", rates.dtype),
    )
    async with launcher.cluster("calibration", "1P1D", "dualpath", folder / "store", limited=False) as cluster:
        ready = msgspec.json.decode(ready_file.read_bytes(), type=_Ready)
        engines = [e.pid for role in ("prefill", "decode") for e in ready.engines if e.role == role]

        def clocks() -> list[int]:
            return [*cpu_clocks([ready.pid]), *engine_clocks(engines)]

        idle = await _idle(clocks)
        lone = await _lone(cluster, clocks, idle)
        choir = await measure_choir(cluster, clocks, idle)
        busy = await measure_busy(cluster, [ready.pid, *engines])
        return ClusterUse(lone, choir, busy)


async def _lone(cluster: LaunchedCluster, clocks: Clocks, idle: list[float]) -> dict[str, Used]:
    """All kinds in turns, several times over: what disturbs the machine may stay for seconds."""
    one_agent = {kind.name: [kind.trajectory()] for kind in KINDS}
    contexts = {
        name: await cluster.run(warm_up(cluster.url, agent, ReplayOptions())) for name, agent in one_agent.items()
    }
    spent: dict[str, list[Used]] = {name: [] for name in one_agent}
    for seed in range(1, 1 + LONE_ROUNDS):  # other tokens each time, so that none are in storage
        for name, agent in one_agent.items():
            spent[name] += await _spent(cluster, clocks, idle, agent, contexts[name], seed)
    return {name: typical(used) for name, used in spent.items()}


async def _spent(
    cluster: LaunchedCluster,
    clocks: Clocks,
    idle: list[float],
    agent: list[Trajectory],
    contexts: dict[str, list[int]],
    seed: int,
) -> list[Used]:
    """Request by request but for the first, less what is used idle. A request ends with its stream."""
    marks: list[tuple[float, list[int]]] = []

    def mark(_: object) -> None:
        marks.append((time.perf_counter(), clocks()))

    asked = replay(cluster.url, agent, ReplayOptions(seed=seed), contexts=contexts, on_turn=mark)
    result = await cluster.run(asked)
    spent = []
    for turn, ((since, earlier), (at, later)) in zip(result.turns[1:], pairwise(marks), strict=True):
        parts = zip(later, earlier, idle, strict=True)
        spent.append(Used(turn.ttft_s, *(after - was - share * (at - since) for after, was, share in parts)))
    return spent


def typical(spent: Sequence[Used]) -> Used:
    """Medians of CPU times.

    What else runs on the machine only ever delays: of the times to first token the lower quartile is nearer to an idle
    one than the median.
    """
    ttft_s, *cpu_ns = zip(*map(msgspec.structs.astuple, spent), strict=True)
    return Used(statistics.quantiles(ttft_s, n=4)[0], *(max(1.0, statistics.median(of)) for of in cpu_ns))


async def _idle(clocks: Clocks) -> list[float]:
    """CPU nanoseconds a second of each clock while nobody asks: heartbeats."""
    await asyncio.sleep(SETTLE_S)
    before = clocks()
    await asyncio.sleep(IDLE_S)
    return [(after - was) / IDLE_S for after, was in zip(clocks(), before, strict=True)]
