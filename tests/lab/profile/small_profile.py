"""A profile written by hand and a result file to simulate with it. Nothing is measured."""

import msgspec

from dualpath.lab.facts.profile import Machine, Profile
from dualpath.lab.facts.step_times import DecodeSample, PrefillSample
from dualpath.results.file import Configuration, ResultFile, Run, Workload
from dualpath.results.turns import TurnResult
from dualpath.spec.cluster_setup import ClusterSetup
from dualpath.traces.trajectory import Round, Trajectory

KV_BYTES = 16_384
RATE = 20_000_000


def small_profile(**changed):
    """A millisecond a batch, 10 us a token, 0.1 us a pair; steps of 5 ms and 1 us a context token."""
    prefill = [(cached, new, items) for cached in (0, 1000, 4000) for new in (16, 256) for items in (1, 4)]
    decode = [(batch, context) for batch in (1, 4, 16) for context in (100, 1000, 4000)]
    fields = {
        "version": 1,
        "model": "demo",
        "prefill": tuple(
            PrefillSample(cached_tokens=c, new_tokens=n, items=i, ns=prefill_ns(c, n, i)) for c, n, i in prefill
        ),
        "decode": tuple(DecodeSample(batch=b, context_tokens=c, ns=decode_ns(b, c)) for b, c in decode),
        "kv_bytes_per_token": KV_BYTES,
        "machine": Machine(cores=2, threads=1, dtype="float32"),
    }
    return Profile(**fields | changed)


def prefill_ns(cached, new, items=1):
    return 1e6 + items * (2e5 + 1e4 * new + 100 * (new * cached + new * (new + 1) / 2))


def decode_ns(batch, context):
    return 5e6 + batch * (4e5 + 1e3 * context)


def small_result(systems=("basic", "dualpath", "oracle"), topology="1P1D", rounds=4, agents=6, **cluster):
    """Agents whose first round is stored; what was measured is made up."""
    trajectories = [
        Trajectory(
            id=f"agent-{number}",
            rounds=(
                Round(append_tokens=1500 + 64 * number, generate_tokens=8),
                *(Round(append_tokens=64, generate_tokens=8) for _ in range(rounds - 1)),
            ),
        )
        for number in range(agents)
    ]
    setup = {
        "layers": 8,
        "kv_bytes_per_token": KV_BYTES,
        "snic_bytes_per_s": RATE,
        "cnic_bytes_per_s": 8 * RATE,
        "compute_quota_s": 0.3,
        "threads": 1,
        "cores": 2,
        "dtype": "float32",
        "transport": "shm",
    } | cluster
    limits = {"snic_bytes_per_s": None, "cnic_bytes_per_s": None}
    runs = [
        small_run(topology, system, ClusterSetup(**setup | (limits if system == "oracle" else {})))
        for system in systems
    ]
    return ResultFile(
        kind="demo",
        name="small",
        trajectories={"agents": trajectories},
        runs=runs,
        configuration=Configuration(
            model=".models/demo", topologies=[topology], systems=list(systems), snic_bytes_per_s=RATE,
            cnic_bytes_per_s=8 * RATE, repeats=1, seed=0, machine="none",
        ),
        command="",
        workload=Workload(
            source="made up", agents=agents, turns=agents * (rounds - 1), prompt_tokens=1, append_tokens=1,
            generate_tokens=1, max_context_tokens=1, warm_up="",
        ),
    )  # fmt: skip


def small_run(topology, system, setup):
    turn = TurnResult(
        trajectory="agent-0", round_index=1, tries=1, start_s=0.0, ttft_s=2.0, ttst_s=0.1, tpot_s=0.1, latency_s=3.0,
        prompt_tokens=1, loaded_tokens=0, generated_tokens=8, output_digest="",
    )  # fmt: skip
    nothing = dict.fromkeys(
        ("ratio_to_basic", "ideal_ratio", "ratio_to_ideal", "ttft_p50_s", "ttft_p99_s", "ttst_p50_s", "ttst_p99_s",
         "tpot_p50_s", "tpot_p99_s", "snic_max_over_avg")
    )  # fmt: skip
    return Run(
        trajectories="agents", first_round=1, cluster=setup, turn_results=[turn], topology=topology, system=system,
        jct_s=10.0, hit_rate=0.0, snic_bytes={}, turns=1, errors=0, **nothing,
    )  # fmt: skip


def written(tmp_path, document, name="profile.json"):
    """A file with the record or decoded JSON `document`."""
    path = tmp_path / name
    path.write_bytes(msgspec.json.encode(document))
    return path
