"""The scheduler's constants for a cluster, from its rates and limits (paper §6.1 states α and β as times)."""

from dualpath.cluster.config import ClusterConfig
from dualpath.core.policy import Constants, Limits
from dualpath.kv.layout import KVLayout

UNLIMITED_BYTES_PER_S = 10**12
"""Stands for a SNIC without a limit where α is computed: no read queue is ever long."""


def scheduler_constants(config: ClusterConfig, layout: KVLayout, prefill_tokens_per_s: float) -> Constants:
    """α from the SNIC's rate; β from the measured prefill rate of an engine."""
    return Constants.from_rates(
        snic_tokens_per_s=(config.snic_rate or UNLIMITED_BYTES_PER_S) / (layout.token_bytes * layout.layers),
        prefill_tokens_per_s=prefill_tokens_per_s,
    )


def scheduler_limits(config: ClusterConfig) -> Limits:
    """Every stage of a request's life has the configured deadline; decoding more, by the token."""
    deadline_ns = config.request_deadline_ns
    return Limits(
        max_waiting=config.max_waiting,
        max_attempts=config.max_attempts,
        queue_ns=deadline_ns,
        load_ns=deadline_ns,
        prefill_ns=deadline_ns,
        decode_ns=deadline_ns,
        decode_ns_per_token=deadline_ns // 100,
        release_ns=config.lease_ns * 2,
    )
