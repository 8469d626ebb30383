"""What requests share that are answered together: a prefill batch, decode steps, and the messages that bring tokens.

A lone request tells what a step of one costs. Here several like it ask at once, and engines' counters in /metrics tell
how many batches and steps that made.
"""

import asyncio
import statistics
import time

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from dualpath.calibration.kinds import CHOIR, SINGERS
from dualpath.calibration.process_clocks import Clocks
from dualpath.experiment.launcher import LaunchedCluster
from dualpath.workload import ReplayOptions, Trajectory, replay

REPEATS = 4
REPORTED_S = 0.6
"""Longer than engines take to report what they have counted."""
COUNTERS = ("dualpath_prefill_batches", "dualpath_decode_steps")
TIMEOUT_S = 10.0


class Together(msgspec.Struct, frozen=True, kw_only=True):
    """All requests of one choir together. CPU nanoseconds of the server, and of engines' main and compute threads."""

    server_ns: float
    prefill_main_ns: float
    prefill_compute_ns: float
    decode_main_ns: float
    decode_compute_ns: float
    batches: float
    steps: float


async def measure_choir(cluster: LaunchedCluster, clocks: Clocks, idle: list[float]) -> Together:
    """Medians of a few; `idle` is what each clock runs a second anyway.

    Raises ClusterError, ReplayError, RuntimeError.
    """
    sung = [await _sung(cluster, clocks, idle, seed) for seed in range(1 + REPEATS)]
    fields = zip(*map(msgspec.structs.astuple, sung[1:]), strict=True)  # the first warms up
    return Together(**dict(zip(Together.__struct_fields__, map(statistics.median, fields), strict=True)))


async def _sung(cluster: LaunchedCluster, clocks: Clocks, idle: list[float], seed: int) -> Together:
    once = CHOIR.trajectory().rounds[:1]
    singers = [Trajectory(id=f"calibrate-choir-{number}", rounds=once) for number in range(SINGERS)]
    counted = await _counters(cluster.url)
    earlier, since_s = clocks(), time.perf_counter()
    await cluster.run(replay(cluster.url, singers, ReplayOptions(seed=seed)))
    took_s = time.perf_counter() - since_s
    _, *spent = (after - was - share * took_s for after, was, share in zip(clocks(), earlier, idle, strict=True))
    made = (after - was for after, was in zip(await _counters(cluster.url), counted, strict=True))
    return Together(**dict(zip(Together.__struct_fields__, (*spent, *made), strict=True)))


async def _counters(url: str) -> list[float]:
    """Over all engines, once they have reported."""
    await asyncio.sleep(REPORTED_S)
    metrics = f"{url.removesuffix('/v1')}/metrics"
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:
            answer = (await client.get(metrics)).raise_for_status()
    except httpx.HTTPError as error:
        raise RuntimeError(f"{metrics} can't be read: {error or type(error).__name__}") from error
    totals = dict.fromkeys(COUNTERS, 0.0)
    for family in text_string_to_metric_families(answer.text):
        if family.name in totals:
            totals[family.name] += sum(sample.value for sample in family.samples)
    return [totals[name] for name in COUNTERS]
