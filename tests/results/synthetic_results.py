"""Result files as a cluster would give them: agents queue for storage NICs and prefill engines, then decode."""

import heapq
import itertools
import random
import statistics

import numpy as np

from dualpath.results.file import Configuration, ResultFile, Run, SnicSample, Workload
from dualpath.results.turns import TurnFailure, TurnResult, percentiles
from dualpath.spec.cluster_setup import ClusterSetup
from dualpath.spec.timings import Timings

RATE = 40_000_000
TOKEN_BYTES = 16_384
SAMPLE_S = 0.25


def synthetic(
    topologies=("1P1D", "1P2D"),
    systems=("basic", "dualpath", "oracle"),
    agents=12,
    rounds=5,
    repeats=1,
    points=({},),
    seed=0,
    timings=True,
    failures=0,
    kind="experiment",
    name="synthetic",
):
    """A result file; `points` are what the runs vary (``agents`` among it changes their number)."""
    runs = []
    for topology, point in itertools.product(topologies, points):
        measured = {}
        for repeat, system in itertools.product(range(repeats), systems):
            cluster = _Cluster(topology, system, int(point.get("agents", agents)), rounds, f"{seed}/{repeat}", timings)
            measured[repeat, system] = cluster.run()
        basic_s, oracle_s = (
            statistics.median_low(jct_s for (_, other), (jct_s, _, _) in measured.items() if other == system)
            if system in systems
            else None
            for system in ("basic", "oracle")
        )
        for (repeat, system), (jct_s, turns, samples) in measured.items():
            lost = failures if system == systems[-1] else 0
            runs.append(_run(topology, system, repeat, point, jct_s, turns, samples, basic_s, oracle_s, lost))
    return ResultFile(
        kind=kind,
        name=name,
        runs=runs,
        configuration=Configuration(
            model=".models/demo",
            topologies=list(topologies),
            systems=list(systems),
            snic_bytes_per_s=RATE,
            cnic_bytes_per_s=8 * RATE,
            repeats=repeats,
            seed=seed,
            machine="2 cores, Linux x86_64, Python 3.11",
        ),
        command=f"dualpath experiment {name}.toml",
        workload=Workload(
            source="generated",
            agents=agents,
            turns=agents * rounds,
            prompt_tokens=sum(turn.prompt_tokens for turn in runs[0].turn_results),
            append_tokens=agents * rounds * 64,
            generate_tokens=agents * rounds * 16,
            max_context_tokens=max(turn.prompt_tokens for turn in runs[0].turn_results),
            warm_up="first turns stored before the clock starts",
        ),
    )


def _run(topology, system, repeat, point, jct_s, turns, samples, basic_s, oracle_s, lost):
    prefill, decode = (int(count) for count in topology.removesuffix("D").split("P"))
    ideal = min((prefill + decode) / prefill, basic_s / oracle_s if oracle_s else 99) if basic_s else None
    ratio = basic_s / jct_s if basic_s and not lost else None
    compared = system not in ("basic", "oracle") and ratio is not None
    received = samples[-1].received_bytes
    may_read = [n for engine, n in received.items() if system != "basic" or engine.startswith("PE")]
    latencies = {}
    for key in ("ttft", "ttst", "tpot"):
        found = percentiles(getattr(turn, f"{key}_s") for turn in turns)
        latencies |= {f"{key}_p50_s": found.p50_s, f"{key}_p99_s": found.p99_s}
    return Run(
        topology=topology,
        system=system,
        repeat=repeat,
        parameters=dict(point),
        first_round=1,
        cluster=ClusterSetup(
            layers=8,
            kv_bytes_per_token=TOKEN_BYTES,
            snic_bytes_per_s=None if system == "oracle" else RATE,
            cnic_bytes_per_s=8 * RATE,
            compute_quota_s=0.3,
            threads=1,
            cores=2,
            dtype="float32",
            transport="shm",
        ),
        turn_results=turns,
        failures=[_failure(turns[at]) for at in range(lost)],
        snic_samples=samples,
        jct_s=jct_s,
        ratio_to_basic=ratio,
        ideal_ratio=ideal,
        ratio_to_ideal=ratio / ideal if compared else None,
        **latencies,
        hit_rate=sum(turn.loaded_tokens for turn in turns) / sum(turn.prompt_tokens for turn in turns),
        snic_max_over_avg=max(may_read) * len(may_read) / sum(may_read),
        snic_bytes=received,
        turns=len(turns),
        errors=lost,
        error_messages=[f"{turns[at].trajectory}, turn 1: 503 <b>engine lost</b>" for at in range(lost)],
        same_tokens_as_basic=None if system == "basic" else 1.0,
    )


def _failure(turn):
    return TurnFailure(
        trajectory=turn.trajectory, round_index=turn.round_index, tries=3, message="503", abandoned_rounds=0
    )


class _Cluster:
    """FIFO storage NICs and prefill engines; decode takes its time beside others."""

    def __init__(self, topology, system, agents, rounds, seed, timings):
        prefill, decode = (int(count) for count in topology.removesuffix("D").split("P"))
        self.prefill = {f"PE{rank}": 0.0 for rank in range(prefill)}
        self.decode = [f"DE{rank}" for rank in range(decode)]
        self.snic = dict.fromkeys([*self.prefill, *self.decode], 0.0)
        self.system, self.agents, self.rounds, self.timings = system, agents, rounds, timings
        self.random = random.Random(f"{seed}/{agents}")
        self.reads = []

    def run(self):
        ready = [(self.random.uniform(0, 0.05), agent, 1) for agent in range(self.agents)]
        context = [self.random.randint(1800, 3800) for _ in range(self.agents)]
        turns = []
        while ready:
            at_s, agent, round_index = heapq.heappop(ready)
            turn = self._turn(at_s, agent, round_index, context[agent])
            context[agent] += 80
            turns.append(turn)
            if round_index < self.rounds:
                heapq.heappush(ready, (at_s + turn.latency_s, agent, round_index + 1))
        jct_s = max(turn.start_s + turn.latency_s for turn in turns)
        return jct_s, turns, self._samples(jct_s)

    def _turn(self, at_s, agent, round_index, hit):
        scheduling_s, allocation_s = self.random.uniform(0.002, 0.012), self.random.uniform(0, 0.004)
        reader = self._reader()
        begin_s = at_s + 0.003 + scheduling_s + allocation_s
        read_s = 0.02 if self.system == "oracle" else hit * TOKEN_BYTES / RATE
        start_s = begin_s if self.system == "oracle" else max(begin_s, self.snic[reader])
        self.snic[reader] = start_s + read_s
        self.reads.append((start_s, start_s + read_s, reader, hit * TOKEN_BYTES))
        pe = min(self.prefill, key=self.prefill.__getitem__)
        computed_s = max(start_s + read_s, self.prefill[pe]) + self.random.uniform(0.03, 0.07)
        self.prefill[pe] = computed_s
        de, tpot_s = self.decode[(agent + round_index) % len(self.decode)], self.random.uniform(0.012, 0.03)
        told = Timings(
            scheduling_s=scheduling_s,
            allocation_s=allocation_s,
            read_s=start_s + read_s - begin_s,
            prefill_s=computed_s - start_s - read_s,
            decode_s=15 * tpot_s,
            prefill_engine=pe,
            decode_engine=de,
            pe_read_tokens=hit if reader.startswith("PE") else 0,
            de_read_tokens=0 if reader.startswith("PE") else hit,
            attempts=1,
        )
        return TurnResult(
            trajectory=f"agent-{agent:03d}",
            round_index=round_index,
            tries=1,
            start_s=at_s,
            ttft_s=computed_s - at_s,
            ttst_s=tpot_s * self.random.uniform(1, 3),
            tpot_s=tpot_s,
            latency_s=computed_s - at_s + 15 * tpot_s,
            prompt_tokens=hit + 64,
            loaded_tokens=hit,
            generated_tokens=16,
            output_digest=f"{agent}/{round_index}",
            timings=told if self.timings else None,
        )

    def _reader(self):
        """Basic reads on prefill engines, the others wherever the queue is shortest."""
        side = "PE" if self.system == "basic" else ""
        return min((name for name in self.snic if name.startswith(side)), key=self.snic.__getitem__)

    def _samples(self, jct_s):
        times_s = np.arange(min(2000, int(jct_s / SAMPLE_S)) + 2) * max(SAMPLE_S, jct_s / 2000)
        received = {name: np.zeros(len(times_s)) for name in self.snic}
        for start_s, end_s, reader, n_bytes in self.reads:
            received[reader] += n_bytes * np.clip((times_s - start_s) / (end_s - start_s), 0, 1)
        counts = {name: values.astype(int).tolist() for name, values in received.items()}
        return [
            SnicSample(at_s, {name: values[at] for name, values in counts.items()})
            for at, at_s in enumerate(times_s.tolist())
        ]
