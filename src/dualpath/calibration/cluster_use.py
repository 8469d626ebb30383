"""A whole cluster, measured from outside: which process used the cores for what.

One cluster of one PE and one DE serves a few kinds of request, alone, one after another; each process's CPU clock tells
what it took for one. Then a few agents ask at once.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import psutil

from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.experiment.launcher import SERVE, LaunchedCluster, LocalLauncher
from dualpath.prediction.machine import MachineRates
from dualpath.workload import AgentMix, ReplayOptions, Round, Trajectory, generate_trajectories, replay, warm_up

SETTLE_S = 0.4
IDLE_S = 1.0
FIRST_CONTEXT_TOKENS = 2000


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """`count` requests alike. With a context, it is stored first, and each request begins with it."""

    name: str
    count: int
    append_tokens: int
    generate_tokens: int
    context_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        return self.context_tokens + self.append_tokens

    @property
    def hit_tokens(self) -> int:
        return min(self.context_tokens, self.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def stored_blocks(self) -> int:
        """Blocks that each request adds to storage."""
        return (self.prompt_tokens + self.generate_tokens - 1) // BLOCK_TOKENS - self.hit_tokens // BLOCK_TOKENS

    @property
    def messages(self) -> int:
        """From engines, without those that carry tokens: prepared, legs, pages freed, blocks stored, finished."""
        computed = self.prompt_tokens // BLOCK_TOKENS - self.hit_tokens // BLOCK_TOKENS
        return 3 + (self.hit_tokens > 0) + computed + self.stored_blocks + self.generate_tokens

    def trajectory(self) -> Trajectory:
        """A warm-up round, which leaves the context, and the requests one after another."""
        one = Round(
            append_tokens=self.append_tokens, generate_tokens=self.generate_tokens, keep_tokens=self.context_tokens
        )
        first = Round(append_tokens=self.context_tokens, generate_tokens=1)
        rounds = (first,) if self.context_tokens else (msgspec.structs.replace(one, keep_tokens=None),)
        return Trajectory(id=f"calibrate-{self.name}", rounds=(*rounds, *[one] * self.count))


KINDS = (
    Kind(name="short", count=16, append_tokens=32, generate_tokens=1),
    Kind(name="answer", count=8, append_tokens=32, generate_tokens=32),
    Kind(name="context", count=10, append_tokens=16, generate_tokens=1, context_tokens=FIRST_CONTEXT_TOKENS),
    Kind(name="blocks", count=8, append_tokens=1024, generate_tokens=1),
    Kind(name="long", count=8, append_tokens=16, generate_tokens=24, context_tokens=FIRST_CONTEXT_TOKENS),
)


BUSY_AGENTS = tuple(
    generate_trajectories(
        AgentMix(turns=4, first_context_tokens=FIRST_CONTEXT_TOKENS, append_tokens=64, generate_tokens=16), 6, seed=1
    )
)
"""Who asks at once; the first turns are the warm-up."""
BUSY_REPLAYS = 2


class Used(msgspec.Struct, frozen=True):
    """CPU nanoseconds of one request of a kind, by process; and its times to first token."""

    client_ns: float
    server_ns: float
    prefill_ns: float
    decode_ns: float
    ttft_s: float


class Busy(msgspec.Struct, frozen=True):
    """`BUSY_AGENTS` at once. Means of replays."""

    jct_ns: float
    cpu_ns: float
    """Of the cluster and the client together."""
    others_cores: float
    """Cores that were busy with anything else meanwhile."""


class ClusterUse(msgspec.Struct, frozen=True):
    """What the two halves of the measurement used."""

    lone: dict[str, Used]
    """By kind."""
    busy: Busy


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
        pids = [ready.pid, *(e.pid for role in ("prefill", "decode") for e in ready.engines if e.role == role)]
        lone = {kind.name: await _used(cluster, pids, kind) for kind in KINDS}
        return ClusterUse(lone, await _busy(cluster, pids))


async def _busy(cluster: LaunchedCluster, pids: list[int]) -> Busy:
    contexts = await cluster.run(warm_up(cluster.url, BUSY_AGENTS, ReplayOptions()))
    replays = []
    for seed in range(1, 1 + BUSY_REPLAYS):  # other tokens each time, so that none are in storage
        await asyncio.sleep(SETTLE_S)
        ours, everybody = sum(_clocks(pids)), _busy_cores_ns()
        result = await cluster.run(replay(cluster.url, BUSY_AGENTS, ReplayOptions(seed=seed), contexts=contexts))
        cpu_ns, jct_ns = sum(_clocks(pids)) - ours, result.jct_s * 1e9
        replays.append((jct_ns, cpu_ns, max(0.0, _busy_cores_ns() - everybody - cpu_ns) / jct_ns))
    return Busy(*(statistics.mean(of) for of in zip(*replays, strict=True)))


def _busy_cores_ns() -> float:
    """Of all processes of this machine, and of its host's others: what nobody could use is no core of ours."""
    times = psutil.cpu_times()
    return 1e9 * float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


async def _used(cluster: LaunchedCluster, pids: list[int], kind: Kind) -> Used:
    """One kind: the median over its requests, less what is used idle. A request ends with its stream."""
    trajectory, options = [kind.trajectory()], ReplayOptions()
    contexts = await cluster.run(warm_up(cluster.url, trajectory, options))
    await asyncio.sleep(SETTLE_S)
    idle = await _idle(pids)
    marks: list[tuple[float, list[int]]] = []
    result = await cluster.run(
        replay(
            cluster.url,
            trajectory,
            options,
            contexts=contexts,
            on_turn=lambda _: marks.append((time.perf_counter(), _clocks(pids))),
        )
    )
    spent = [
        [after - was - share * (at - since) for after, was, share in zip(clocks, earlier, idle, strict=True)]
        for (since, earlier), (at, clocks) in pairwise(marks)
    ]
    client, server, prefill, decode = (max(1.0, statistics.median(of)) for of in zip(*spent, strict=True))
    # What else runs on the machine only ever delays: the lower quartile is nearer to an idle one than the median.
    ttft_s = statistics.quantiles((turn.ttft_s for turn in result.turns), n=4)[0]
    return Used(client, server, prefill, decode, ttft_s)


async def _idle(pids: list[int]) -> list[float]:
    """CPU nanoseconds a second of each process while nobody asks: heartbeats."""
    before = _clocks(pids)
    await asyncio.sleep(IDLE_S)
    return [(after - was) / IDLE_S for after, was in zip(_clocks(pids), before, strict=True)]


def _clocks(pids: list[int]) -> list[int]:
    """CPU time of this process, then of `pids`, all their threads, dead ones included."""
    return [time.process_time_ns(), *(time.clock_gettime_ns(_cpu_clock(pid)) for pid in pids)]


def _cpu_clock(pid: int) -> int:
    """Linux's clock id of another process's CPU time (clock_getcpuclockid(3))."""
    if not sys.platform.startswith("linux"):
        raise RuntimeError("CPU clocks of other processes are read as on Linux")
    return (~pid << 3) | 2
