"""What agents ask: trajectories, where they come from, and a client that replays them."""

from dualpath.spec.timings import Timings
from dualpath.workload.capacity import Capacity, find_capacity
from dualpath.workload.generate import AgentMix, generate_trajectories
from dualpath.workload.journal import Journal, JournalError
from dualpath.workload.limits import TraceError, TraceLimits
from dualpath.workload.online import Arrivals, OnlineResult, Slo, Window, replay_online
from dualpath.workload.replay import ReplayError, ReplayOptions, replay, warm_up
from dualpath.workload.result import Part, Percentiles, ReplayResult, TurnFailure, TurnResult
from dualpath.workload.rollout import OnTurn, identity_of
from dualpath.workload.sources import Source, load_source
from dualpath.workload.trajectory import Round, Totals, Trajectory, totals
from dualpath.workload.weka import read_weka

__all__ = [
    "AgentMix",
    "Arrivals",
    "Capacity",
    "Journal",
    "JournalError",
    "OnTurn",
    "OnlineResult",
    "Part",
    "Percentiles",
    "ReplayError",
    "ReplayOptions",
    "ReplayResult",
    "Round",
    "Slo",
    "Source",
    "Timings",
    "Totals",
    "TraceError",
    "TraceLimits",
    "Trajectory",
    "TurnFailure",
    "TurnResult",
    "Window",
    "find_capacity",
    "generate_trajectories",
    "identity_of",
    "load_source",
    "read_weka",
    "replay",
    "replay_online",
    "totals",
    "warm_up",
]
