"""A simulation's result: a record of the question, the answer, and the simulation's own cost."""

import msgspec
import numpy as np

from dualpath.core.vocabulary import Role
from dualpath.lab.sim.costs import Calibration
from dualpath.lab.sim.simulator import Simulator

EARLY_SHARE = 0.05
"""Share of a task in which the paper looks at attention balance."""


class Distribution(msgspec.Struct, frozen=True):
    """Distribution over turns, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class SimulationResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Latencies are of turns that ended in the second half of an open-ended run, otherwise of all turns."""

    cluster: str
    model: str
    trace: str
    system: str
    agents: int
    agents_per_s: float | None
    """Arrival rate; None: all agents start at once."""
    seed: int
    calibration: Calibration
    simulated_s: float
    """Until the last token of the last agent (offline: the JCT), or until the requested end."""
    agents_finished: int
    agent_jct_mean_s: float
    turns: int
    """Number of finished turns."""
    failed: dict[str, int]
    retries: int
    turns_per_s: float
    ttft_s: Distribution
    ttst_s: Distribution
    tpot_s: Distribution
    latency_s: Distribution
    turns_in_system: float
    """Mean over the whole run."""
    mean_prompt_tokens: float
    hit_share: float
    """Hit tokens over prompt tokens."""
    generated_tokens: int
    snic_busy: dict[str, float]
    """By role: share of the run in which its nodes' storage NICs were reading."""
    snic_read_bytes: list[int]
    """Bytes by node."""
    snic_unread_bytes: int
    """Bytes of hit KV that stayed in storage, because the windows of their layers had passed them."""
    snic_max_over_mean: float
    """Balance of all nodes' reads: mean over windows of `balance_window_s`."""
    balance_window_s: float
    attention_max_over_mean: float
    """Balance within groups of prefill engines: mean over the steps of the first 5 % of the run."""
    prefill_busy: float
    events: int
    cpu_s: float
    turns_per_cpu_s: float
    peak_rss_bytes: int
    scheduler: dict[str, int]
    """Core's own statistics."""


def distribution(values: "np.ndarray[tuple[int, ...], np.dtype[np.floating]]") -> Distribution:
    """Returns zeros if there are no values."""
    if not len(values):
        return Distribution(0.0, 0.0, 0.0, 0.0, 0.0)
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
    return Distribution(float(np.mean(values)), p50, p90, p99, float(np.max(values)))


def snic_balance(simulator: Simulator) -> float:
    """Max over mean of the nodes' reads, each over its SNIC's rate: mean over windows weighted by bytes read; 1 if
    nothing was read."""
    windows = np.array(list(simulator.storage.windows.values()), dtype=np.float64)
    if not windows.size or not windows.sum():
        return 1.0
    rates = np.array(simulator.machine.snic_bytes_per_s)
    windows /= rates / rates[0]
    return float(windows.max(axis=1).sum() / windows.mean(axis=1).sum())


def attention_balance(simulator: Simulator) -> float:
    """Max over mean of attention time in a group's step: mean over early steps; 1 if there are none."""
    until_ns = simulator.events.now * EARLY_SHARE
    ratios = [
        step.attention_peak_ns / step.attention_mean_ns
        for step in simulator.prefill.steps
        if step.start_ns < until_ns and step.attention_mean_ns
    ]
    return sum(ratios) / len(ratios) if ratios else 1.0


def snic_busy(simulator: Simulator, role: Role) -> float:
    nodes = {facts.node for facts in simulator.machine.of_role(role)}
    spent_ns = sum(simulator.storage.busy_ns[node] for node in nodes)
    return spent_ns / len(nodes) / max(1, simulator.events.now)
