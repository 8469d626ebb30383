"""What agents ask: trajectories, where they come from, and a client that replays them."""

from dualpath.workload.generate import AgentMix, generate_trajectories
from dualpath.workload.replay import ReplayError, ReplayOptions, replay, warm_up
from dualpath.workload.result import Percentiles, ReplayResult, TurnFailure, TurnResult
from dualpath.workload.trajectory import Round, Totals, Trajectory, totals
from dualpath.workload.weka import TraceError, WekaLimits, read_weka

__all__ = [
    "AgentMix",
    "Percentiles",
    "ReplayError",
    "ReplayOptions",
    "ReplayResult",
    "Round",
    "Totals",
    "TraceError",
    "Trajectory",
    "TurnFailure",
    "TurnResult",
    "WekaLimits",
    "generate_trajectories",
    "read_weka",
    "replay",
    "totals",
    "warm_up",
]
