"""What asking, answering and telling cost: lone requests to an otherwise idle cluster, and who used the cores for them.

One cluster of one PE and one DE serves four kinds of request, one after another. What each process's CPU clock says of
a kind, less what is known already (steps, copies, blocks), is fitted to requests, prompt tokens, generated tokens and
messages. Then the same lone requests are simulated; what they really take longer to their first token is hops between
processes, of which a first token needs six.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from dualpath.calibration.fitting import fit
from dualpath.core.batching import Chunk
from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.experiment.launcher import SERVE, LaunchedCluster, LocalLauncher
from dualpath.prediction.machine import ControlCost, Fit, MachineRates
from dualpath.prediction.predict import simulate
from dualpath.prediction.setup import RunSetup
from dualpath.workload import ReplayOptions, Round, Trajectory, replay, warm_up

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


class Used(msgspec.Struct, frozen=True):
    """CPU nanoseconds of one request of a kind, by process; and its times to first token."""

    client_ns: float
    server_ns: float
    prefill_ns: float
    decode_ns: float
    ttft_s: float


def measure_control(rates: MachineRates, model: Path, store: Path) -> tuple[ControlCost, dict[str, Fit]]:
    """Start a cluster with its store under `store`, ask, and fit. `rates.control` is ignored.

    Raises ClusterError, ReplayError.
    """
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="calibrate-", dir=store) as folder:
        used = asyncio.run(_measure(rates, model, Path(folder)))
    return fit_control(rates, used)


def fit_control(rates: MachineRates, used: dict[str, Used]) -> tuple[ControlCost, dict[str, Fit]]:
    """From CPU times to coefficients, see the module."""
    kinds = [kind for kind in KINDS if kind.name in used]
    of = [used[kind.name] for kind in kinds]
    (client, client_prompt, client_token), client_fit = fit(
        [(1, kind.prompt_tokens, kind.generate_tokens + 1) for kind in kinds], [one.client_ns for one in of]
    )
    (request, prompt, token, message), server_fit = fit(
        [(1, kind.prompt_tokens, kind.generate_tokens, kind.messages) for kind in kinds],
        [one.server_ns for one in of],
    )
    decode_request, decode_step = _decode_control(rates, kinds, of)
    control = ControlCost(
        client_request_ns=client,
        client_prompt_token_ns=client_prompt,
        client_token_ns=client_token,
        request_ns=request,
        prompt_token_ns=prompt,
        token_ns=token,
        message_ns=message,
        prefill_request_ns=_prefill_control(rates, kinds, of),
        decode_request_ns=decode_request,
        decode_step_ns=decode_step,
        hop_ns=0.0,
    )
    hop_ns, hop_fit = _hop(rates, control, kinds, of)
    fits = {"client": client_fit, "coordinator": server_fit, "first token of lone requests": hop_fit}
    return msgspec.structs.replace(control, hop_ns=hop_ns), fits


def _prefill_control(rates: MachineRates, kinds: Sequence[Kind], of: Sequence[Used]) -> float:
    """What is left of a PE's time for a short prompt, less its steps and its half of what is shipped."""
    left = []
    for kind, one in zip(kinds, of, strict=True):
        if not kind.context_tokens and not kind.stored_blocks:
            step_ns = rates.prefill.layer_ns((Chunk(0, 0, 0, kind.append_tokens, True),))
            known_ns = rates.layers * (step_ns * rates.threads + _shipped_ns(rates, kind) / 2)
            left.append(one.prefill_ns - known_ns)
    return max(0.0, statistics.median(left))


def _shipped_ns(rates: MachineRates, kind: Kind) -> float:
    """Core time of one layer's put of a prompt that was computed whole, both ends together."""
    put = rates.transports["shm"].put
    return put.copying_ns(kind.prompt_tokens * rates.kv_bytes_per_token // rates.layers, 0) * put.threads


def _decode_control(rates: MachineRates, kinds: Sequence[Kind], of: Sequence[Used]) -> tuple[float, float]:
    """A request's and a step's, from the two kinds without blocks."""
    by_name = {kind.name: (kind, one) for kind, one in zip(kinds, of, strict=True)}
    (short, one_token), (answer, many) = by_name["short"], by_name["answer"]
    copy_ns = short.prompt_tokens * rates.kv_bytes_per_token * rates.fill.byte_ns
    request_ns = max(0.0, one_token.decode_ns - copy_ns - rates.layers * _shipped_ns(rates, short) / 2)
    steps = answer.generate_tokens - short.generate_tokens
    computed_ns = sum(rates.decode.step_ns(1, answer.prompt_tokens + i + 1) for i in range(steps)) * rates.threads
    return request_ns, max(0.0, (many.decode_ns - one_token.decode_ns - computed_ns) / steps)


def _hop(rates: MachineRates, control: ControlCost, kinds: Sequence[Kind], of: Sequence[Used]) -> tuple[float, Fit]:
    """The hop that makes simulated first tokens as late as measured ones, by the median over kinds."""
    hops_ns = []
    for kind, one in zip(kinds, of, strict=True):
        plain, hopping = (_lone_ttft_s(rates, control, kind, hop_ns) for hop_ns in (0.0, 1e6))
        hops_ns.append((one.ttft_s - plain) / (hopping - plain) * 1e6)
    hop_ns = max(0.0, statistics.median(hops_ns))
    errors = [
        abs(_lone_ttft_s(rates, control, kind, hop_ns) / one.ttft_s - 1) for kind, one in zip(kinds, of, strict=True)
    ]
    return hop_ns, Fit(samples=len(errors), mean_error=statistics.mean(errors), max_error=max(errors))


def _lone_ttft_s(rates: MachineRates, control: ControlCost, kind: Kind, hop_ns: float) -> float:
    control = msgspec.structs.replace(control, hop_ns=hop_ns)
    trajectory = kind.trajectory()
    setup = RunSetup(
        rates=msgspec.structs.replace(rates, control=control),
        prefill_engines=1,
        decode_engines=1,
        system="dualpath",
        snic_bytes_per_s=None,
        cnic_bytes_per_s=None,
        compute_quota_s=0.3,
        transport="shm",
        trajectories=(msgspec.structs.replace(trajectory, rounds=trajectory.rounds[:3]),),
        first_round=1,
        agents_per_s=None,
        gap_scale=0.0,
        seed=0,
    )
    _, turns, _ = simulate(setup)
    return statistics.mean((turn.first_token_ns - turn.sent_ns) / 1e9 for turn in turns)


class _Ready(msgspec.Struct):
    class _Engine(msgspec.Struct):
        role: str
        pid: int

    pid: int
    engines: list[_Engine]


async def _measure(rates: MachineRates, model: Path, folder: Path) -> dict[str, Used]:
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
        return {kind.name: await _used(cluster, pids, kind) for kind in KINDS}


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
