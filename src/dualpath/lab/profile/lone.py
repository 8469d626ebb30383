"""Measures the time of a request and of a token besides steps, by lone, tiny requests to an idle 1P1D cluster."""

import asyncio
import statistics
import tempfile
from pathlib import Path

from dualpath.client.replay import ReplayOptions, replay
from dualpath.lab.experiments.conditions import SERVE, Bench, Conditions
from dualpath.lab.experiments.local_cluster import LocalLauncher
from dualpath.lab.facts.step_times import StepTimes
from dualpath.traces.trajectory import Round, Trajectory

PROMPT_TOKENS, GENERATE_TOKENS = 16, 16
REQUESTS = 24
WARM_UP = 4
"""First requests, which are not counted."""


def measure_lone(model: Path, store: Path, serve: tuple[str, ...], times: StepTimes) -> tuple[float, float]:
    """Returns nanoseconds of (a request up to its first token, each later token) beyond steps by `times`.

    They are lower quartiles, because other jobs only make requests later. Starts `dualpath serve` with the options
    `serve`, its store in a new directory under `store`. Raises LaunchError, ReplayError.
    """
    with tempfile.TemporaryDirectory(prefix="profile-", dir=store) as folder:
        ttft_s, tpot_s = asyncio.run(_ask(model, Path(folder), serve))
    prefill_ns = times.prefill_ns(0, PROMPT_TOKENS)
    decode_ns = times.decode_ns(1, PROMPT_TOKENS + GENERATE_TOKENS / 2)
    return max(0.0, ttft_s * 1e9 - prefill_ns), max(0.0, tpot_s * 1e9 - decode_ns)


async def _ask(model: Path, folder: Path, serve: tuple[str, ...]) -> tuple[float, float]:
    unlimited = Conditions(snic_bytes_per_s=None, cnic_bytes_per_s=None)
    launcher = LocalLauncher(unlimited, Bench(model=model, serve_command=(*SERVE, *serve)), logs=folder, work=folder)
    agent = Trajectory(
        id="lone",
        # This agent forgets everything, so every prompt is new and short.
        rounds=tuple(
            Round(append_tokens=PROMPT_TOKENS, generate_tokens=GENERATE_TOKENS, keep_tokens=0) for _ in range(REQUESTS)
        ),
    )
    async with launcher.cluster("profile", "1P1D", "dualpath", folder / "store", limited=False) as cluster:
        result = await cluster.run(replay(cluster.url, [agent], ReplayOptions(token_ids_below=16)))
    if result.failures:
        raise OSError(f"a request to an idle cluster failed: {result.failures[0].message}")
    turns = result.turns[WARM_UP:]
    tpot_s = [turn.tpot_s for turn in turns if turn.tpot_s is not None]
    return _quartile([turn.ttft_s for turn in turns]), _quartile(tpot_s)


def _quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4)[0]
