"""Which calibration a cluster is simulated with.

`FITTED` holds the constants fitted to the paper's figures for its own nodes (docs/design/simulator.md says which, and
what follows from them). A cluster file that states its own efficiencies is taken at its word: they replace the fitted
effective compute and the share of the storage NIC.
"""

import msgspec

from dualpath.lab.facts.cluster import ClusterSpec, Efficiency
from dualpath.lab.sim.costs import Calibration

FITTED = Calibration()


def calibration_for(cluster: ClusterSpec) -> Calibration:
    """`FITTED`, but for what the cluster states itself."""
    stated, assumed = cluster.efficiency, Efficiency()
    changed: dict[str, float] = {}
    if stated.compute != assumed.compute:
        changed["prefill_flop_per_s"] = cluster.prefill_flop_per_s
    if stated.snic != assumed.snic:
        changed["snic_efficiency"] = stated.snic
    return msgspec.structs.replace(FITTED, **changed)
