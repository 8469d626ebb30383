"""All measurements of a machine, one after another, and what they come to: `MachineRates`."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from dualpath.calibration.busy import CROWDS
from dualpath.calibration.cluster_use import measure_cluster
from dualpath.calibration.compute import measure_compute, measure_sharing
from dualpath.calibration.control import fit_control
from dualpath.calibration.moves import measure_moves
from dualpath.calibration.slowdown import fit_slowdown
from dualpath.calibration.storage import measure_storage
from dualpath.core.batching import AttentionCost, Chunk
from dualpath.engine import LoadedModel, profile_attention
from dualpath.engine.step_profiling import measure_block_copies
from dualpath.prediction.machine import ControlCost, EngineLimits, MachineRates, MoveCost, PrefillCost
from dualpath.runtime.config import ClusterConfig
from dualpath.runtime.prefill import PROBE_HIT_TOKENS, PROBE_NEW_TOKENS

TRANSPORTS = ("shm", "tcp")
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
    rates = _measure_parts(options, say)
    say("a cluster: lone requests, then agents at once")
    used = measure_cluster(rates, options.model, options.store)
    rates = fit_slowdown(fit_control(rates, used.lone, used.choir), used.busy)
    return msgspec.structs.replace(rates, measured_s=time.perf_counter() - started_s)


def _measure_parts(options: CalibrationOptions, say: Callable[[str], None]) -> MachineRates:
    """All that needs no cluster; what does is left free."""
    model = LoadedModel.load(options.model, dtype=options.dtype, threads=options.threads)
    _check_length(model)
    say("steps of engines that compute at once")
    side_by_side, oversubscribed_error = measure_sharing(str(options.model), options.dtype, options.threads, cores())
    say("prefill batches and decode steps")
    prefill, decode, fits = measure_compute(model)
    say("copies and transfers")
    moves = {transport: measure_moves(model.layout, transport) for transport in TRANSPORTS}
    local_copy = moves["shm"][0]
    fill, copy_out = (
        MoveCost(byte_ns=ns / model.layout.full_block_bytes, chunk_ns=local_copy.chunk_ns)
        for ns in measure_block_copies(model)
    )
    say("storage")
    storage = measure_storage(model.layout, options.store)
    return MachineRates(
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
        others_cores=0.0,
        reference_ns=0.0,
        attention=_attention(model),
        prefill_tokens_per_s=_prompt_tokens_per_s(prefill, model.layout.layers),
        prefill=prefill,
        decode=decode,
        local_copy=local_copy,
        fill=fill,
        copy_out=copy_out,
        transports={transport: cost for transport, (_, cost) in moves.items()},
        storage=storage,
        control=_NO_CONTROL,
        limits=_limits(),
        fits=fits,
        measured_s=0.0,
    )


def _check_length(model: LoadedModel) -> None:
    needed_tokens = max(one.context_tokens for crowd in CROWDS.values() for agent in crowd for one in agent.spans())
    if model.max_length_tokens < needed_tokens:
        raise ValueError(
            f"the model takes {model.max_length_tokens} tokens, and the calibration's requests have up to "
            f"{needed_tokens}; give one that takes longer prompts"
        )


def _attention(model: LoadedModel) -> AttentionCost:
    """As a PE profiles itself when it starts."""
    fixed_ns, ns_per_flop = profile_attention(model)
    return AttentionCost(fixed_ns, ns_per_flop, model.attention_flops_per_token, model.attention_flops_per_pair)


def _prompt_tokens_per_s(prefill: PrefillCost, layers: int) -> float:
    """As a PE measures itself when it starts."""
    probe = (Chunk(0, 0, PROBE_HIT_TOKENS, PROBE_NEW_TOKENS, True),)
    return (PROBE_HIT_TOKENS + PROBE_NEW_TOKENS) * 1e9 / (layers * prefill.layer_ns(probe))


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def _limits() -> EngineLimits:
    defaults = ClusterConfig(model="", store="")
    return EngineLimits(**{name: getattr(defaults, name) for name in EngineLimits.__struct_fields__})
