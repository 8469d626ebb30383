"""What a cluster was set up as: in result files, and in what a server says of itself."""

from typing import Literal

import msgspec


class ClusterSetup(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster on one host, but for its topology and system: complete enough to simulate it."""

    layers: int
    kv_bytes_per_token: int
    """Over all layers."""
    snic_bytes_per_s: int | None
    """Each storage NIC's rate; None: not limited."""
    cnic_bytes_per_s: int | None
    compute_quota_s: float
    threads: int
    """Compute threads of an engine."""
    cores: int
    """Cores that all engines shared."""
    dtype: str
    transport: str
    links: Literal["emulated", "kernel"] = "emulated"
    """Rates kept by the traffic manager, or by the kernel between network namespaces (`dualpath testbed`)."""


class ServedCluster(msgspec.Struct, frozen=True, kw_only=True):
    """What a DualPath server says of its cluster, with the model in ``/v1/models``."""

    topology: str
    """``1P2D``: prefill and decode nodes."""
    system: str
    setup: ClusterSetup
