"""Which decisions a system makes, and the numbers they are made with.

A `Policy` names the alternatives; `SYSTEMS` are the combinations the paper compares (§7.2, ablation of §7.5) and one of
ours. `Constants` are the scheduler's (§6.1); `Limits` bound every queue, every state and every retry.
"""

from typing import Literal

import msgspec

SECOND_NS = 1_000_000_000
FOREVER_NS = 10**18
"""Thirty years: a limit of so long is none, and costs nothing to watch."""

Placement = Literal["paper", "round_robin"]
ReadPath = Literal["pe_only", "de_only", "shorter_queue", "alternate", "split"]


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a system does. The scheduler reads `placement` and `read_path`; its driver reads the other two."""

    placement: Placement = "paper"
    read_path: ReadPath = "shorter_queue"
    layerwise: bool = True
    """Load, compute and ship layer by layer (§5); False: load everything, compute, ship everything."""
    free_io: bool = False
    """Drivers make storage reads, host-device copies and PE-DE transfers cost nothing (§7.2, Oracle)."""


SYSTEMS: dict[str, Policy] = {
    "basic": Policy(placement="round_robin", read_path="pe_only", layerwise=False),
    "basic-layerwise": Policy(placement="round_robin", read_path="pe_only"),
    "dualpath-rr": Policy(placement="round_robin", read_path="alternate"),
    "de-only": Policy(read_path="de_only"),
    "dualpath": Policy(),
    "dualpath-split": Policy(read_path="split"),
    "oracle": Policy(free_io=True),
}
"""By name: the paper's Basic, its ablation steps, DualPath and Oracle; `de-only` and `dualpath-split` are ours."""


class Constants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scheduler's constants (§6.1)."""

    alpha_tokens: int
    """A node's read queue is short up to here: tokens its SNIC reads in 3 s."""
    beta_tokens: int
    """A PE with more unfinished tokens than this takes nothing: tokens one GPU prefills in 5 s."""
    z_factor: float = 1.05
    """A DE is high above this multiple of its group's mean load."""
    fetch_interval_ns: int = 5_000_000
    """Requests are placed at most this often."""

    def __post_init__(self) -> None:
        for name in ("alpha_tokens", "beta_tokens", "fetch_interval_ns"):
            if getattr(self, name) < 0:
                raise ValueError(f"Constants.{name} is {getattr(self, name)}; it must be 0 or more")
        if self.z_factor < 1:
            raise ValueError(f"Constants.z_factor is {self.z_factor}; below 1 even an evenly loaded engine is high")

    @classmethod
    def from_rates(
        cls, *, snic_tokens_per_s: float, prefill_tokens_per_s: float, fetch_interval_ns: int = 5_000_000
    ) -> "Constants":
        """The paper's rule: alpha is what a node's SNIC reads in 3 s, beta what a GPU prefills in 5 s."""
        return cls(
            alpha_tokens=round(3 * snic_tokens_per_s),
            beta_tokens=round(5 * prefill_tokens_per_s),
            fetch_interval_ns=fetch_interval_ns,
        )


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds: the admission queue, attempts, and the longest stay in each state (`FOREVER_NS`: no bound)."""

    max_waiting: int = 4096
    """Requests queued for placement; one more is refused as overloaded."""
    max_attempts: int = 3
    queue_ns: int = 600 * SECOND_NS
    """In QUEUED, in ALLOCATING, and in RETRYING."""
    load_ns: int = 120 * SECOND_NS
    prefill_ns: int = 300 * SECOND_NS
    decode_ns: int = 120 * SECOND_NS
    decode_ns_per_token: int = SECOND_NS
    """Added to `decode_ns` for every token the request may still generate."""
    release_ns: int = 60 * SECOND_NS
    """An Abort unanswered for longer counts as overdue; its blocks stay held."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"Limits.{name} is {getattr(self, name)}; it must be at least 1")
