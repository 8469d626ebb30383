"""Items with agents that arrive one by one: the rate that a system takes within its SLO, and its latencies."""

from concurrent.futures import ThreadPoolExecutor

from dualpath.lab.paper.rows import Row, row
from dualpath.lab.paper.runner import Runner

DS660B, DS27B = "ds660b-2p4d", "ds27b-1p1d"
CAPACITY_STEP = 0.1
"""Relative width to which a capacity is narrowed."""
AT_660B = 0.4
WORKING_SET_S = 5400.0
"""Duration of a run. Agents of many turns take an hour; until then, turns of short agents weigh too much."""


def capacity(runner: Runner, preset: str, system: str, guess: float) -> float:
    """Returns the agents per second up to which the SLO holds: steps from `guess` to either side, then bisection."""
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
    """Agents per second within TTFT 4 s and TPOT 50 ms, Ours over Basic."""
    searches = [(DS660B, "basic", 0.4), (DS660B, "dualpath", 0.7), (DS27B, "basic", 0.5), (DS27B, "dualpath", 0.9)]
    with ThreadPoolExecutor(len(searches) if runner.parallel else 1) as threads:
        found = list(threads.map(lambda search: capacity(runner, *search), searches))
    rows = []
    for name, theirs, (basic, ours) in (("DS 660B", 2.25, found[:2]), ("DS 27B", 1.67, found[2:])):
        note = f"{ours:.2f} and {basic:.2f} agents a second"
        rows.append(row("online", f"{name}: APS of Ours over Basic", theirs, ours / basic, note=note))
    return rows


def scale_online(runner: Runner) -> list[Row]:
    """Latencies at 0.4 agents per second on 2P4D, and at 22 times both."""
    small = runner.online(DS660B, "dualpath", AT_660B).result
    large = runner.online("ds660b-44p88d", "dualpath", AT_660B * 22).result
    small_ttft = "fits the lag of an engine's loop"
    small_tpot = "fits the fixed part of a decode step"
    return [
        row("scale-online", "2P4D, 0.4 APS: TTFT, s", 1.739, small.ttft_s.mean, "fitted", small_ttft),
        row("scale-online", "2P4D, 0.4 APS: TTST, s", 0.228, small.ttst_s.mean),
        row("scale-online", "2P4D, 0.4 APS: TPOT, s", 0.039, small.tpot_s.mean, "fitted", small_tpot),
        row("scale-online", "44P88D, 8.8 APS: TTFT, s", 1.847, large.ttft_s.mean),
        row("scale-online", "44P88D, 8.8 APS: TTST, s", 0.194, large.ttst_s.mean),
        row("scale-online", "44P88D, 8.8 APS: TPOT, s", 0.036, large.tpot_s.mean),
        row("scale-online", "TTFT, 44P88D over 2P4D", 1.847 / 1.739, large.ttft_s.mean / small.ttft_s.mean),
    ]


def working_set(runner: Runner) -> list[Row]:
    """KV of the agents in the system, DS 660B, as the paper counts it: arrivals x stay x half the final context."""
    rows = []
    for agents_per_s, theirs in ((0.1, 69.0), (0.45, 681.0)):
        outcome = runner.online(DS660B, "dualpath", agents_per_s, WORKING_SET_S)
        tokens = agents_per_s * outcome.agent_s * outcome.mean_total_tokens / 2
        note = f"agents stay {outcome.agent_s:,.0f} s"
        rows.append(
            row(
                "working-set", f"{agents_per_s:g} APS, GB", theirs, tokens * outcome.kv_bytes_per_token / 1e9, note=note
            )
        )
    return rows
