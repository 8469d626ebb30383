"""All measurements of a machine, one after another, and what they come to: `MachineRates`."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from dualpath.calibration.cluster_use import measure_cluster
from dualpath.calibration.compute import measure_compute, measure_sharing
from dualpath.calibration.control import fit_control, fit_slowdowns
from dualpath.calibration.moves import measure_moves
from dualpath.calibration.storage import measure_storage
from dualpath.core.batching import AttentionCost, Chunk
from dualpath.engine import LoadedModel, profile_attention
from dualpath.engine.step_profiling import measure_block_copies
from dualpath.prediction.machine import ControlCost, EngineLimits, MachineRates, MoveCost
from dualpath.runtime.config import ClusterConfig
from dualpath.runtime.prefill import PROBE_HIT_TOKENS, PROBE_NEW_TOKENS

TRANSPORTS = ("shm", "tcp")
MAX_OTHERS_CORES = 0.1
"""Beyond it, times of a busy cluster say more of what else ran than of the cluster."""
_NO_CONTROL = ControlCost(**dict.fromkeys(ControlCost.__struct_fields__, 0.0))


class CalibrationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. Raises ValueError for more threads than cores."""

    model: Path
    threads: int = 1
    dtype: str = "float32"
    store: Path = Path(".store")
    """On the file system of the stores to be predicted; a temporary folder is made under it."""

    def __post_init__(self) -> None:
        if self.threads > cores():
            raise ValueError(f"--threads is {self.threads}, and there are {cores()} cores")


def calibrate(options: CalibrationOptions, say: Callable[[str], None]) -> MachineRates:
    """Measure this machine. `say` is told what is being measured.

    Raises OSError, ValueError for a model that can't be used, ClusterError and ReplayError where its cluster fails.
    """
    started_s = time.perf_counter()
    say("steps of engines that compute at once")
    side_by_side, oversubscribed_error = measure_sharing(str(options.model), options.dtype, options.threads, cores())
    say("prefill batches and decode steps")
    model = LoadedModel.load(options.model, dtype=options.dtype, threads=options.threads)
    prefill, decode, fits = measure_compute(model)
    fixed_ns, ns_per_flop = profile_attention(model)
    attention = AttentionCost(fixed_ns, ns_per_flop, model.attention_flops_per_token, model.attention_flops_per_pair)
    say("copies and transfers")
    moves = {transport: measure_moves(model.layout, transport) for transport in TRANSPORTS}
    local_copy = moves["shm"][0]
    fill_ns, copy_out_ns = measure_block_copies(model)
    say("storage")
    storage = measure_storage(model.layout, options.store)
    block_bytes = model.layout.full_block_bytes
    rates = MachineRates(
        description=f"{cores()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        model=str(options.model),
        layers=model.layout.layers,
        kv_bytes_per_token=model.layout.layers * model.layout.token_bytes,
        dtype=options.dtype,
        threads=options.threads,
        cores=cores(),
        side_by_side=side_by_side,
        oversubscribed_error=oversubscribed_error,
        slowdown=1.0,
        cpu_slowdown=1.0,
        others_cores=0.0,
        attention=attention,
        prefill_tokens_per_s=1e9
        * (PROBE_HIT_TOKENS + PROBE_NEW_TOKENS)
        / (model.layout.layers * prefill.layer_ns((Chunk(0, 0, PROBE_HIT_TOKENS, PROBE_NEW_TOKENS, True),))),
        prefill=prefill,
        decode=decode,
        local_copy=local_copy,
        fill=MoveCost(byte_ns=fill_ns / block_bytes, chunk_ns=local_copy.chunk_ns),
        copy_out=MoveCost(byte_ns=copy_out_ns / block_bytes, chunk_ns=local_copy.chunk_ns),
        transports={transport: cost for transport, (_, cost) in moves.items()},
        storage=storage,
        control=_NO_CONTROL,
        limits=_limits(),
        fits=fits,
        measured_s=0.0,
    )
    del model
    say("a cluster: lone requests, then agents at once")
    used = measure_cluster(rates, options.model, options.store)
    control, control_fits = fit_control(rates, used.lone)
    rates = msgspec.structs.replace(rates, control=control)
    slowdown, cpu_slowdown = fit_slowdowns(rates, used.busy)
    if used.busy.others_cores > MAX_OTHERS_CORES:
        slowdown = cpu_slowdown  # time was lost to others
    return msgspec.structs.replace(
        rates,
        slowdown=slowdown,
        cpu_slowdown=cpu_slowdown,
        others_cores=used.busy.others_cores,
        fits=fits | control_fits,
        measured_s=time.perf_counter() - started_s,
    )


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def _limits() -> EngineLimits:
    defaults = ClusterConfig(model="", store="")
    return EngineLimits(**{name: getattr(defaults, name) for name in EngineLimits.__struct_fields__})
