"""A cluster's setup, as result files and the server's ``/v1/models`` describe it."""

from typing import Literal

import msgspec

from dualpath.spec.kv_bytes import KVBytes, Window
from dualpath.spec.topology import Rates

ENGINES = ("dualpath", "vllm")
"""What computes: engines of our own, or servers of vLLM with our connector."""


class ClusterSetup(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster on one host, without its topology and system: complete enough to simulate it."""

    layers: int
    kv_bytes_per_token: int
    """Bytes over all layers, those with a window too."""
    kv_windows: tuple[Window, ...] = ()
    """How much of it is of layers that see a window."""
    snic_bytes_per_s: Rates
    """Rate of each storage NIC, or of each group's of the topology; None means unlimited."""
    cnic_bytes_per_s: Rates
    compute_quota_s: float
    threads: int
    """Compute threads of an engine."""
    cores: int
    """Cores that all engines share."""
    dtype: str
    transport: str
    links: Literal["emulated", "kernel"] = "emulated"
    """Who enforces the rates: the traffic manager, or the kernel between network namespaces (`dualpath testbed`)."""

    @property
    def kv(self) -> KVBytes:
        windows = sum(window.bytes_per_token for window in self.kv_windows)
        return KVBytes(self.kv_bytes_per_token - windows, self.kv_windows)


class ServedCluster(msgspec.Struct, frozen=True, kw_only=True):
    """A DualPath server's description of its cluster, beside the model in ``/v1/models``."""

    topology: str
    """``1P2D``: see `spec.topology`."""
    system: str
    setup: ClusterSetup
