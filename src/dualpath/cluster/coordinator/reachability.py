"""Whether the engines of a cluster can reach one that asks to join, by what it says and from where it comes."""

from collections.abc import Iterable
from urllib.parse import urlsplit

from dualpath.cluster import messages as m
from dualpath.spec.loopback import is_loopback

_ONE_HOST = "shm"


def why_unreachable(join: m.Join, transport: str, peer_address: str, others: Iterable[m.Join]) -> str | None:
    """Returns why KV can't move between it and the `others`; None when nothing speaks against it.

    `transport` is the cluster's own, `peer_address` the numeric address from which it joins; empty, or no address, when
    that is not known or it has come through a Unix socket.
    """
    if join.transport != transport:
        return (
            f"this cluster moves KV by {transport} and the engine by {join.transport or 'what it does not say'}; "
            f"start it with --transport {transport}"
        )
    if transport == _ONE_HOST:
        kernels = {other.kernel for other in (join, *others)} - {""}
        if len(kernels) > 1:
            return (
                f"this cluster moves KV by {_ONE_HOST}, within one host, and the engine is on another, {join.host}; "
                "start `dualpath serve` and all engines with --transport tcp-authenticated, or tcp"
            )
    elif is_loopback(_host(join.data_address)) and is_loopback(peer_address) is False:
        return (
            f"its data address {join.data_address[:128]} can't be reached from other hosts, and it joins from "
            f"{peer_address}; start it with --data-host and the address at which the others reach it"
        )
    return None


def _host(data_address: str) -> str:
    """Returns the host of a ``scheme://host:port``; other addresses are for their transports alone."""
    try:
        return urlsplit(data_address).hostname or ""
    except ValueError:
        return ""
