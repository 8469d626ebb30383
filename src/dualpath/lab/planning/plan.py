"""`plan`: plans a cluster and a workload given by name. The command line and notebooks call the same function."""

from collections.abc import Sequence
from pathlib import Path

from dualpath.lab.facts.cluster import ClusterSpec
from dualpath.lab.facts.profile import Profile, find_cluster
from dualpath.lab.planning.capacity import CapacityPlan, plan_capacity
from dualpath.lab.planning.turn_load import TurnLoad, trajectory_load, turn_load
from dualpath.results.online import Slo
from dualpath.traces.limits import TraceLimits
from dualpath.traces.paper import PAPER_TRACES, fitted_table
from dualpath.traces.sources import load_source, paper_row


def plan(
    cluster: str | Path | ClusterSpec,
    trace: str | Sequence[str] = "64K",
    *,
    model: str | None = None,
    profile: Path | Profile | None = None,
    slo: Slo | None = None,
    agents_per_s: float | None = None,
    max_context_tokens: int | None = None,
) -> CapacityPlan:
    """Returns what `cluster` can do for the agents of `trace`, and what limits it; rates are upper bounds.

    `cluster` is a preset, a TOML file or a record; `trace` what `load_source` takes; `agents_per_s` the rate of the
    working set (default: the dual-path upper bound). Raises ClusterError, ModelConfigError, ProfileError, TraceError,
    PlanError, which are ValueErrors whose message says why.
    """
    load = load_of([trace] if isinstance(trace, str) else trace, max_context_tokens)
    return plan_capacity(find_cluster(cluster, model, profile), load, slo, agents_per_s)


def load_of(names: Sequence[str], max_context_tokens: int | None = None, seed: int = 0) -> TurnLoad:
    """`names` is one of ``32K``, ``48K``, ``64K``, or files that `dualpath.traces.sources` reads.

    `max_context_tokens` ends recorded agents before the first turn beyond it. Raises TraceError.
    """
    row = paper_row(names)
    if row is not None:
        return turn_load(f"the paper's {row} trace", fitted_table(PAPER_TRACES[row], seed=seed))
    trajectories = load_source(names, TraceLimits(max_context_tokens=max_context_tokens)).trajectories
    name = Path(names[0]).name if len(names) == 1 else f"{len(trajectories)} sessions"
    return trajectory_load(name, trajectories)
