"""The paper's evaluation by item: the names that `dualpath paper` takes."""

from collections.abc import Callable, Sequence

from dualpath.lab.paper import facts, offline, online
from dualpath.lab.paper.rows import Row
from dualpath.lab.paper.runner import Runner

ITEMS: dict[str, Callable[[Runner], list[Row]]] = {
    "cache-compute": facts.cache_compute,
    "pd-range": facts.pd_range,
    "offline": offline.offline,
    "append-scaling": offline.append_scaling,
    "ablation": offline.ablation,
    "balance": offline.balance,
    "pd-sweep": offline.pd_sweep,
    "online": online.online,
    "working-set": online.working_set,
    "scale-online": online.scale_online,
    "scale-offline": offline.scale_offline,
    "scheduler-cpu": offline.scheduler_cpu,
}
"""Items by name, in the order of a full run: the largest simulations come last."""

SENSITIVITY = "sensitivity"
"""The one item that has no rows: `paper.sensitivity`."""


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown name."""
    known = [*ITEMS, SENSITIVITY]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no item {unknown[0]!r}; choose from {', '.join(known)}")
