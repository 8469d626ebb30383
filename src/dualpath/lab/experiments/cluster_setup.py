"""The cluster of a run in the words of the result file, complete enough to simulate it."""

import os

from dualpath.lab.experiments.launcher import ClusterLauncher
from dualpath.lab.experiments.settings import Settings
from dualpath.lab.facts.hf_config import ModelConfigError, from_hf_config
from dualpath.spec.cluster_setup import ClusterSetup

DTYPE, KV_DTYPE = "float32", "fp32"
THREADS = 1
COMPUTE_QUOTA_S = 0.3
"""The three as `dualpath serve` has them when it is not told."""


def cluster_setup(settings: Settings, launcher: ClusterLauncher, limited: bool) -> ClusterSetup | None:
    """None where the model's configuration says nothing that can be simulated."""
    try:
        model = from_hf_config(settings.model / "config.json")
    except ModelConfigError:
        return None
    return ClusterSetup(
        layers=model.layers,
        kv_bytes_per_token=model.kv_bytes_per_token(KV_DTYPE),
        snic_bytes_per_s=settings.snic_bytes_per_s if limited else None,
        cnic_bytes_per_s=settings.cnic_bytes_per_s if limited else None,
        compute_quota_s=COMPUTE_QUOTA_S,
        threads=THREADS,
        cores=len(os.sched_getaffinity(0)),
        dtype=DTYPE,
        transport=launcher.transport,
        links=launcher.links,
    )
