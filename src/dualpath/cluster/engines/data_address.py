"""Where an engine's data server listens, and how socket files of dead engines are found.

The socket file of a killed process stays behind. Its kernel object does not: connecting to the file is refused at once,
which no living server does, whatever state it is in.
"""

import errno
import os
import socket
import tempfile
from pathlib import Path

from dualpath.cluster.config import ClusterConfig

_PATTERN = "dualpath-*.sock"


def data_bind_address(cluster: ClusterConfig, name: str) -> str:
    """The address to listen at: a socket file of this process, or any port of the configured host."""
    if cluster.transport == "shm":
        return f"shm:{tempfile.gettempdir()}/dualpath-{os.getpid()}-{name}.sock"
    host = f"[{cluster.data_host}]" if ":" in cluster.data_host else cluster.data_host
    return f"tcp://{host}:0"


def sweep_dead_sockets(directory: Path | None = None) -> list[Path]:
    """Remove socket files whose server has died; the paths removed. Living ones are never touched."""
    removed = []
    for path in sorted((directory or Path(tempfile.gettempdir())).glob(_PATTERN)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)
                removed.append(path)
    return removed
