"""Result files for tests of what is read from them."""

from dualpath.results.build import snic_max_over_avg
from dualpath.results.file import Configuration, ResultFile, Run, SnicSample, Workload
from dualpath.results.turns import TurnResult
from dualpath.spec.timings import Timings


def turn(index=0, *, start_s=0.0, ttft_s=1.0, prompt_tokens=200, loaded_tokens=128, **stages):
    told = {"scheduling_s": 0.1, "allocation_s": 0.0, "read_s": 0.5, "prefill_s": 0.2, "prefill_engine": "PE0"} | stages
    return TurnResult(
        trajectory=f"agent-{index:04d}",
        round_index=1,
        tries=1,
        start_s=start_s,
        ttft_s=ttft_s,
        ttst_s=0.05,
        tpot_s=0.03,
        latency_s=ttft_s + 0.3,
        prompt_tokens=prompt_tokens,
        loaded_tokens=loaded_tokens,
        generated_tokens=8,
        output_digest="same",
        timings=Timings(decode_s=0.3, decode_engine="DE0", pe_read_tokens=128, de_read_tokens=0, attempts=1, **told),
    )


def run(system="basic", jct_s=10.0, topology="1P1D", **more):
    """Ratios are taken as given: how they are made is tested apart."""
    prefill, decode = int(topology[0]), int(topology[2])
    engines = [f"PE{i}" for i in range(prefill)] + [f"DE{i}" for i in range(decode)]
    snic_bytes = dict.fromkeys(engines, 10**8)
    samples = [SnicSample(float(at), dict.fromkeys(engines, 10**7 * at)) for at in range(1, 11)]
    defaults = {
        "ratio_to_basic": None,
        "ideal_ratio": None,
        "ratio_to_ideal": None,
        "turn_results": [turn(i, start_s=float(i)) for i in range(8)],
        "snic_samples": samples,
        "snic_bytes": snic_bytes,
        "snic_max_over_avg": snic_max_over_avg(system, snic_bytes),
        "hit_rate": 0.9,
        "turns": 8,
        "errors": 0,
    }
    defaults |= {f"{name}_{p}_s": 0.1 for name in ("ttft", "ttst", "tpot") for p in ("p50", "p99")}
    return Run(topology=topology, system=system, jct_s=jct_s, **(defaults | more))


def result(*runs, name="ablation"):
    return ResultFile(
        kind="experiment",
        name=name,
        runs=list(runs),
        configuration=Configuration(
            model="m",
            topologies=list(dict.fromkeys(one.topology for one in runs)),
            systems=list(dict.fromkeys(one.system for one in runs)),
            snic_bytes_per_s=40_000_000,
            cnic_bytes_per_s=None,
            repeats=1,
            seed=0,
            machine="2 cores",
        ),
        command=f"dualpath experiment {name}",
        workload=Workload(
            source="generated",
            agents=8,
            turns=8,
            prompt_tokens=1600,
            append_tokens=500,
            generate_tokens=64,
            max_context_tokens=208,
            warm_up="first turns (100 tokens) stored before the clock starts",
        ),
    )
