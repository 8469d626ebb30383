"""Items with agents that arrive one by one: how many a second a system can take within its SLO, and at what latency."""

from dualpath.paper.rows import Row, row
from dualpath.paper.runner import Runner

DS660B, DS27B = "ds660b-2p4d", "ds27b-1p1d"
CAPACITY_STEP = 0.1
"""Relative width to which a capacity is narrowed down."""
AT_660B = 0.4
WORKING_SET_S = 5400.0
"""Agents of many turns take an hour and more; until then the working set grows."""


def capacity(runner: Runner, preset: str, system: str, guess: float) -> float:
    """Agents per second up to which the SLO holds: by steps from `guess` to either side of it, then bisection."""
    good = bad = guess
    if runner.sustains(preset, system, guess):
        while runner.sustains(preset, system, bad := good * 1.3):
            good = bad
    else:
        while not runner.sustains(preset, system, good := bad / 1.3):
            bad = good
    while bad / good > 1 + CAPACITY_STEP:
        middle = (bad * good) ** 0.5
        good, bad = (middle, bad) if runner.sustains(preset, system, middle) else (good, middle)
    return good


def online(runner: Runner) -> list[Row]:
    """APS capacity within TTFT 4 s and TPOT 50 ms, Ours over Basic."""
    rows = []
    for name, preset, theirs, guesses in (("DS 660B", DS660B, 2.25, (0.4, 0.7)), ("DS 27B", DS27B, 1.67, (0.5, 0.9))):
        basic, ours = (
            capacity(runner, preset, system, guess)
            for system, guess in zip(("basic", "dualpath"), guesses, strict=True)
        )
        note = f"{ours:.2f} and {basic:.2f} agents a second"
        rows.append(row("online", f"{name}: APS of Ours over Basic", theirs, ours / basic, note=note))
    return rows


def scale_online(runner: Runner) -> list[Row]:
    """Latencies at 0.4 agents a second on 2P4D, and at 22 times both."""
    small = runner.online(DS660B, "dualpath", AT_660B)
    large = runner.online("ds660b-44p88d", "dualpath", AT_660B * 22)
    small_tpot = "fits the fixed part of a decode step"
    return [
        row("scale-online", "2P4D, 0.4 APS: TTFT, s", 1.739, small.ttft_s.mean),
        row("scale-online", "2P4D, 0.4 APS: TTST, s", 0.228, small.ttst_s.mean),
        row("scale-online", "2P4D, 0.4 APS: TPOT, s", 0.039, small.tpot_s.mean, "fitted", small_tpot),
        row("scale-online", "44P88D, 8.8 APS: TTFT, s", 1.847, large.ttft_s.mean),
        row("scale-online", "44P88D, 8.8 APS: TTST, s", 0.194, large.ttst_s.mean),
        row("scale-online", "44P88D, 8.8 APS: TPOT, s", 0.036, large.tpot_s.mean),
        row("scale-online", "TTFT, 44P88D over 2P4D", 1.847 / 1.739, large.ttft_s.mean / small.ttft_s.mean),
    ]


def working_set(runner: Runner) -> list[Row]:
    """KV of the agents in the system, DS 660B."""
    rows = []
    for agents_per_s, theirs in ((0.1, 69.0), (0.45, 681.0)):
        runner.online(DS660B, "dualpath", agents_per_s, WORKING_SET_S)
        ours = next(
            n_bytes
            for run, n_bytes in runner.working_sets.items()
            if (run.agents_per_s, run.duration_s) == (agents_per_s, WORKING_SET_S)
        )
        rows.append(row("working-set", f"{agents_per_s:g} APS, GB", theirs, ours / 1e9))
    return rows
