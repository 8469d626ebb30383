"""Chooses the calibration with which a cluster is simulated.

`FITTED` holds the constants fitted to the paper's figures for its own nodes (docs/design/simulator.md lists them and
their effects). If a cluster file states its own efficiencies, they replace the fitted effective compute and share of
the storage NIC.
"""

import msgspec

from dualpath.lab.facts.cluster import ClusterSpec, Efficiency
from dualpath.lab.sim.costs import Calibration

FITTED = Calibration()


def calibration_for(cluster: ClusterSpec) -> Calibration:
    """Returns `FITTED`, with the cluster's own efficiencies if it states any."""
    stated, assumed = cluster.efficiency, Efficiency()
    changed: dict[str, float] = {}
    if stated.compute != assumed.compute:
        changed["prefill_flop_per_s"] = cluster.prefill_flop_per_s
    if stated.snic != assumed.snic:
        changed["snic_efficiency"] = stated.snic
    return msgspec.structs.replace(FITTED, **changed)
