"""`dualpath serve` before any process is started: what it says, and what it leaves."""

import asyncio
import logging
import socket
from pathlib import Path

import pytest

from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.config import ClusterConfig
from dualpath.serving.supervising import SupervisedCluster
from dualpath.spec.topology import Topology


@pytest.mark.parametrize("local_engines", [False, True])
def test_who_waits_for_engines_says_where_and_for_how_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, local_engines: bool
) -> None:
    """Told to stop before it starts anything, it leaves no Unix socket."""
    join = tmp_path / "join"
    config = ClusterConfig(
        model="models/tiny",
        store=str(tmp_path / "store"),
        topology=Topology(1, 2),
        transport="tcp",
        control_address=f"ipc://{join}",
        cluster_secret=ClusterSecret.random(),
    )

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = SupervisedCluster(config, listener, local_engines)
            assert join.is_socket()
            serving.signalled()
            assert await serving.run() == ""

    with caplog.at_level(logging.INFO, "dualpath"):
        asyncio.run(run())
    said = f"waits at ipc://{join} for 1 prefill and 2 decode engines, up to 180 s"
    assert (said in caplog.text and "--transport tcp " in caplog.text) is not local_engines
    assert not join.exists()
