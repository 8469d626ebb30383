"""A machine with round figures, and agents and result files for it."""

from typing import Any, Literal

import msgspec

from dualpath.calibration import simulated
from dualpath.core.batching import AttentionCost
from dualpath.prediction.machine import (
    ControlCost,
    DecodeCost,
    EngineLimits,
    MachineRates,
    MoveCost,
    PrefillCost,
    StorageCost,
    TransportCost,
)
from dualpath.prediction.setup import RunSetup
from dualpath.report.result_file import Configuration, ResultFile, Run, Workload
from dualpath.spec.cluster_setup import ClusterSetup
from dualpath.workload import AgentMix, Round, Trajectory, generate_trajectories

REFERENCE_NS = 400_000.0
MS = 1_000_000
LAYERS, KV_BYTES = 4, 16_384
BLOCK_BYTES = 64 * KV_BYTES

FREE_MOVE = MoveCost(byte_ns=0, chunk_ns=0)
FREE_CONTROL = ControlCost(**dict.fromkeys(ControlCost.__struct_fields__, 0.0))
BUSY_CONTROL = ControlCost(
    client_request_ns=0.5 * MS,
    client_prompt_token_ns=100,
    client_token_ns=0.1 * MS,
    request_ns=2 * MS,
    prompt_token_ns=500,
    message_ns=0.1 * MS,
    tokens_message_ns=0.2 * MS,
    token_ns=0.1 * MS,
    prefill_request_ns=1 * MS,
    decode_request_ns=2 * MS,
    decode_step_ns=0.2 * MS,
    decode_token_ns=0.1 * MS,
    hop_ns=0.2 * MS,
)


def machine(**changes: Any) -> MachineRates:
    """Steps that cost round sums; everything else is free unless `changes` says otherwise."""
    plain = MachineRates(
        description="a test's",
        model="test",
        layers=LAYERS,
        kv_bytes_per_token=KV_BYTES,
        dtype="float32",
        threads=1,
        cores=2,
        side_by_side=1.0,
        oversubscribed_error=0.0,
        slowdown=1.0,
        others_cores=0.0,
        attention=AttentionCost(0.0, 0.001, 1_000.0, 1_000.0),
        prefill_tokens_per_s=40_000.0,
        prefill=PrefillCost(fixed_ns=1 * MS, item_ns=0, token_ns=0.05 * MS, cached_pair_ns=0, new_pair_ns=0),
        decode=DecodeCost(fixed_ns=5 * MS, request_ns=1 * MS, context_token_ns=0, longest_token_ns=0),
        local_copy=FREE_MOVE,
        fill=FREE_MOVE,
        copy_out=FREE_MOVE,
        transports={"shm": TransportCost(pull=FREE_MOVE, put=FREE_MOVE)},
        storage=StorageCost(read_ns=0, write_ns=0, write_wait_ns=0, read_threads=2, write_threads=2),
        control=FREE_CONTROL,
        limits=EngineLimits(
            max_batch_tokens=8192,
            max_batch_kv_tokens=32_768,
            max_batch_requests=16,
            device_layers=3,
            buffer_bytes=2**30,
            hbm_bytes=2**30,
        ),
        reference_ns=REFERENCE_NS,
        fits={},
        measured_s=0.0,
    )
    return msgspec.structs.replace(plain, **changes)


def busy_machine(**changes: Any) -> MachineRates:
    """A machine on which nothing is free."""
    costs: dict[str, Any] = {
        "local_copy": MoveCost(byte_ns=0.1, chunk_ns=50_000),
        "fill": MoveCost(byte_ns=0.1, chunk_ns=50_000),
        "copy_out": MoveCost(byte_ns=0.1, chunk_ns=50_000),
        "transports": {
            "shm": TransportCost(
                pull=MoveCost(byte_ns=0.1, chunk_ns=100_000, operation_ns=100_000),
                put=MoveCost(byte_ns=0.1, chunk_ns=100_000, operation_ns=100_000),
            )
        },
        "storage": StorageCost(
            read_ns=0.2 * MS, write_ns=2 * MS, write_wait_ns=5 * MS, read_threads=2, write_threads=2
        ),
        "control": BUSY_CONTROL,
        "slowdown": 1.2,
    }
    return machine(**costs | changes)


def agent(*rounds: tuple[int, int], name: str = "a", **more: Any) -> Trajectory:
    """Rounds of (append, generate) tokens; `more` is of the last one."""
    *first, last = [Round(append_tokens=append, generate_tokens=generate) for append, generate in rounds]
    return Trajectory(id=name, rounds=(*first, msgspec.structs.replace(last, **more)))


def agents(count: int, turns: int = 3) -> tuple[Trajectory, ...]:
    mix = AgentMix(turns=turns, first_context_tokens=1500, append_tokens=64, generate_tokens=12)
    return tuple(generate_trajectories(mix, count, seed=5))


def setup(rates: MachineRates, trajectories: tuple[Trajectory, ...], **changes: Any) -> RunSetup:
    """1P1D, no rates, everything from the second round."""
    return msgspec.structs.replace(simulated.setup(rates, trajectories), **changes)


def result_file(
    crowd: tuple[Trajectory, ...],
    topologies: tuple[str, ...] = ("1P1D",),
    systems: tuple[str, ...] = ("basic", "dualpath", "oracle"),
    kind: Literal["experiment", "replay"] = "experiment",
    **run: Any,
) -> ResultFile:
    """What an experiment of these agents would have written; its measured figures are made up."""
    cluster = ClusterSetup(
        layers=LAYERS,
        kv_bytes_per_token=KV_BYTES,
        snic_bytes_per_s=40_000_000,
        cnic_bytes_per_s=400_000_000,
        compute_quota_s=0.3,
        threads=1,
        cores=2,
        dtype="float32",
        transport="shm",
    )
    runs = [
        Run(
            **{
                "topology": topology,
                "system": system,
                "cluster": cluster,
                "trajectories": "agents",
                "first_round": 1,
                "jct_s": 10.0,
                "hit_rate": 0.9,
                "turns": 6,
                "errors": 0,
                "snic_bytes": {"PE0": 5},
                **dict.fromkeys(("ratio_to_basic", "ideal_ratio", "ratio_to_ideal", "snic_max_over_avg")),
                **{f"{name}_{p}_s": 1.0 for name in ("ttft", "ttst", "tpot") for p in ("p50", "p99")},
                **run,
            }
        )
        for topology in topologies
        for system in systems
    ]
    return ResultFile(
        kind=kind,
        name="test",
        trajectories={"agents": list(crowd)},
        runs=runs,
        configuration=Configuration(
            model="test",
            topologies=list(topologies),
            systems=list(systems),
            snic_bytes_per_s=40_000_000,
            cnic_bytes_per_s=400_000_000,
            repeats=1,
            seed=3,
            machine="another",
        ),
        command="dualpath experiment test",
        workload=Workload(
            source="generated",
            agents=len(crowd),
            turns=6,
            prompt_tokens=1,
            append_tokens=1,
            generate_tokens=1,
            max_context_tokens=1,
            warm_up="",
        ),
    )
