"""The scheduler's settings: the rules it decides by, their constants, and its bounds.

A `Policy` names the rules; `systems` lists the named policies. `Constants` are the scheduler's numbers (§6.1);
`Limits` bound every queue, every state and the number of attempts.
"""

import msgspec

SECOND_NS = 1_000_000_000
QUOTA_NS = 300_000_000
"""The compute quota of a prefill batch (§6.2)."""
FOREVER_NS = 10**18
"""Thirty years: a limit this long means no limit, and costs nothing to watch."""


class PolicyError(ValueError):
    """A rule has decided something that can't be. The message names the rule."""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rules by name, so that a policy is data: journals and messages carry it. Names may be ``module:attribute``."""

    placement: str = "paper"
    """Who prefills and who decodes: a name in `placement.PLACEMENTS`."""
    read_path: str = "shorter_queue"
    """Whose storage NIC reads: a name in `read_path.READ_PATHS`."""
    layerwise: bool = True
    """Load, compute and ship layer by layer (§5); False: load everything, compute, ship everything."""
    free_io: bool = False
    """Drivers make storage reads, host-device copies and PE-DE transfers cost nothing (§7.2, Oracle)."""


class Constants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scheduler's constants (§6.1)."""

    alpha_tokens: int
    """A node's read queue up to this length is short. Tokens its SNIC reads in 3 s."""
    beta_tokens: int
    """A PE with more unfinished tokens than this gets no new request. Tokens one GPU prefills in 5 s."""
    z_factor: float = 1.05
    """A DE above this multiple of its group's mean load is *high* (see `placement`)."""
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
    """Longest stay in QUEUED, in ALLOCATING, and in RETRYING."""
    load_ns: int = 120 * SECOND_NS
    prefill_ns: int = 300 * SECOND_NS
    decode_ns: int = 120 * SECOND_NS
    decode_ns_per_token: int = SECOND_NS
    """Added to `decode_ns` for every token the request may still generate."""
    release_ns: int = 60 * SECOND_NS
    """An Abort unanswered for longer counts as overdue; its blocks stay held."""
    replacement_ns: int = 30 * SECOND_NS
    """How long requests wait for a new PE or DE, once the last one is lost, before they fail."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"Limits.{name} is {getattr(self, name)}; it must be at least 1")
