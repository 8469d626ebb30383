"""What a request and a token take besides steps: lone, tiny requests to an idle 1P1D cluster over HTTP."""

import asyncio
import statistics
import tempfile
from pathlib import Path

from dualpath.client.replay import ReplayOptions, replay
from dualpath.lab.experiments.launcher import SERVE, LocalLauncher
from dualpath.lab.facts.step_times import StepTimes
from dualpath.traces.trajectory import Round, Trajectory

PROMPT_TOKENS, GENERATE_TOKENS = 16, 16
REQUESTS = 24
WARM_UP = 4
"""Requests at first that are not counted."""


def measure_lone(model: Path, store: Path, serve: tuple[str, ...], times: StepTimes) -> tuple[float, float]:
    """Nanoseconds of (a request up to its first token, each later token) beyond steps by `times`.

    Lower quartiles: others on the machine only ever make them later.
    Starts `dualpath serve` with the options `serve`, its store in a new folder of `store`. Raises ClusterError,
    ReplayError.
    """
    with tempfile.TemporaryDirectory(prefix="profile-", dir=store) as folder:
        ttft_s, tpot_s = asyncio.run(_ask(model, Path(folder), serve))
    prefill_ns = times.prefill_ns(0, PROMPT_TOKENS)
    decode_ns = times.decode_ns(1, PROMPT_TOKENS + GENERATE_TOKENS / 2)
    return max(0.0, ttft_s * 1e9 - prefill_ns), max(0.0, tpot_s * 1e9 - decode_ns)


async def _ask(model: Path, folder: Path, serve: tuple[str, ...]) -> tuple[float, float]:
    launcher = LocalLauncher(
        model=model,
        snic_bytes_per_s=None,
        cnic_bytes_per_s=None,
        logs=folder,
        ready_file=folder / "ready.json",
        serve_command=(*SERVE, *serve),
    )
    agent = Trajectory(
        id="lone",
        # An agent that forgets everything: every prompt is new and short.
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
