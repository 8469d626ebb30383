"""What a cluster is made of: one record, filled from the command line, sent to every engine that joins."""

import os
import re

import msgspec

from dualpath.core.policy import SYSTEMS, Policy
from dualpath.spec.cluster_setup import ClusterSetup, ServedCluster
from dualpath.transfer import TRANSPORTS

_TOPOLOGY = re.compile(r"(\d+)P(\d+)D", re.IGNORECASE)


class Topology(msgspec.Struct, frozen=True):
    """``1P2D``: one prefill node and two decode nodes (paper §2); here a node has one engine, one SNIC and one CNIC."""

    prefill_engines: int
    decode_engines: int

    @classmethod
    def parse(cls, text: str) -> "Topology":
        match = _TOPOLOGY.fullmatch(text.strip())
        if match is None or int(match[1]) < 1 or int(match[2]) < 1:
            raise ValueError(f"{text!r} is not a topology; write prefill and decode nodes like 1P1D or 1P2D")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.prefill_engines}P{self.decode_engines}D"


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `dualpath serve` decides. Rates in bytes per second, None for no limit."""

    model: str
    store: str
    topology: Topology = Topology(1, 1)
    system: str = "dualpath"
    snic_bytes_per_s: int | None = None
    cnic_bytes_per_s: int | None = None
    buffer_bytes: int = 2**30
    """PE buffer or DE buffer of each engine."""
    hbm_bytes: int = 2**30
    """Device memory for KV of each decode engine."""
    store_quota_bytes: int | None = None
    durable: bool = True
    """fsync every block before it is published."""
    transport: str = "shm"
    """How KV moves from engine to engine: a name in `dualpath.transfer.TRANSPORTS`."""
    data_host: str = "127.0.0.1"
    """Where other engines reach this host's, with a transport between hosts."""
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    quota_ns: int = 300_000_000
    """Compute quota of a prefill batch: predicted attention-layer time (paper §6.2)."""
    max_batch_tokens: int = 8192
    """New tokens in a prefill batch at most."""
    max_batch_kv_tokens: int = 32_768
    """Hit and new tokens in a prefill batch together, unless one prompt alone has more."""
    max_batch_requests: int = 16
    device_layers: int = 3
    """Layers whose KV a prefill device holds at once."""
    max_waiting: int = 1024
    """Requests waiting for engines at most; beyond that clients get 429."""
    max_attempts: int = 3
    request_deadline_ns: int = 300_000_000_000
    """Longest stay in any one stage of a request's life."""
    prefix_cache: bool = True
    """False: nothing is matched in storage (every prompt token is computed); blocks are still written."""
    lease_ns: int = 5_000_000_000
    """An engine not heard of for this long is lost."""
    heartbeat_ns: int = 200_000_000
    control_address: str = "tcp://127.0.0.1:0"
    """Where engines join; a port of 0 picks a free one."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_model_name: str | None = None
    journal: str | None = None
    """Write every scheduler input and its commands here, one JSON line each."""
    ready_file: str | None = None
    weights_version: str = ""

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise ValueError(f"unknown system {self.system!r}; choose one of {', '.join(SYSTEMS)}")
        TRANSPORTS.get(self.transport)  # raises UnknownNameError, which is a ValueError
        if self.device_layers < 3:
            raise ValueError("device_layers must be at least 3: one loading, one computing, one leaving")

    @property
    def policy(self) -> Policy:
        return SYSTEMS[self.system]

    @property
    def snic_rate(self) -> int | None:
        """The rate engines enforce: none where the policy says that I/O costs nothing (oracle)."""
        return None if self.policy.free_io else self.snic_bytes_per_s

    @property
    def cnic_rate(self) -> int | None:
        return None if self.policy.free_io else self.cnic_bytes_per_s

    def served(self, layers: int, kv_bytes_per_token: int) -> ServedCluster:
        """What clients are told, who may want to simulate it; `kv_bytes_per_token` is over all layers."""
        setup = ClusterSetup(
            layers=layers,
            kv_bytes_per_token=kv_bytes_per_token,
            snic_bytes_per_s=self.snic_rate,
            cnic_bytes_per_s=self.cnic_rate,
            compute_quota_s=self.quota_ns / 1e9,
            threads=self.threads,
            cores=len(os.sched_getaffinity(0)),
            dtype=self.dtype,
            transport=self.transport,
        )
        return ServedCluster(topology=str(self.topology), system=self.system, setup=setup)
