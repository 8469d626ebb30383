"""Engines that others can't reach are refused when they join, not when their first request fails."""

import asyncio
from pathlib import Path

import pytest

from dualpath.cluster.coordinator.reachability import why_unreachable
from dualpath.core.vocabulary import Role

from .fake_engine import head, join_message

FAR, NEAR = "10.77.0.2", "127.0.0.1"


@pytest.mark.parametrize(
    ("data_address", "peer_address", "fits"),
    [
        ("tcp://127.0.0.1:41325", FAR, False),
        ("tcp://[::1]:41325", FAR, False),
        ("tcp://localhost:41325", "fd00::2", False),
        ("tcp://127.0.0.1:41325", f"::ffff:{FAR}", False),
        ("tcp://127.0.0.1:41325", NEAR, True),
        ("tcp://127.0.0.1:41325", f"::ffff:{NEAR}", True),
        ("tcp://127.0.0.1:41325", "", True),
        ("tcp://127.0.0.1:41325", ":0:0:4711", True),  # a Unix socket's
        ("tcp://10.77.0.2:41325", FAR, True),
        ("tcp://node-2:41325", FAR, True),
        ("tcp://[nonsense", FAR, True),
        ("metadata of a fabric", FAR, True),
    ],
)
def test_a_loopback_data_address_is_for_engines_that_join_from_this_host(
    data_address: str, peer_address: str, fits: bool
) -> None:
    join = join_message(Role.DECODE, data_address=data_address, transport="tcp")
    why = why_unreachable(join, "tcp", peer_address, [])
    assert why is None if fits else f"its data address {data_address} can't be reached from other hosts" in str(why)
    assert fits or "start it with --data-host" in str(why)


@pytest.mark.parametrize(("own", "cluster"), [("tcp", "tcp-authenticated"), ("shm", "tcp"), ("", "tcp")])
def test_all_move_kv_alike(own: str, cluster: str) -> None:
    join = join_message(Role.DECODE, transport=own)
    assert f"start it with --transport {cluster}" in str(why_unreachable(join, cluster, NEAR, []))
    assert why_unreachable(join_message(Role.DECODE, transport=cluster), cluster, NEAR, []) is None


def test_shared_memory_is_for_one_host_however_the_engine_joins() -> None:
    """Containers of a host have one kernel, and may share memory; a kernel that does not say who it is, may be any."""
    here = [join_message(Role.PREFILL, kernel="a"), join_message(Role.PREFILL)]
    for kernel, peer_address, fits in (("a", FAR, True), ("", FAR, True), ("b", FAR, False), ("b", "", False)):
        why = why_unreachable(join_message(Role.DECODE, kernel=kernel), "shm", peer_address, here)
        assert (why is None) == fits
        assert fits or "within one host" in str(why)
    assert why_unreachable(join_message(Role.DECODE, kernel="b"), "shm", FAR, []) is None  # the coordinator moves no KV


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "ipc://{}/join"])
def test_the_coordinator_learns_from_where_an_engine_joins(tmp_path: Path, address: str) -> None:
    async def run() -> None:
        async with head(tmp_path, control_address=address.format(tmp_path), transport="tcp") as cluster:
            joins = {"transport": "tcp", "data_address": "tcp://127.0.0.1:9"}
            await cluster.new(Role.PREFILL).join(**joins)
            told = cluster.coordinator._links.sender_address
            assert told == NEAR if address.startswith("tcp") else told not in ("", NEAR)

    asyncio.run(run())
