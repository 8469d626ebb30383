"""How an experiment gets its clusters: the protocol, and the launcher that starts them on this host."""

import sys
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from dualpath.lab.experiments.cluster_process import ClusterProcess

Result = TypeVar("Result")
SERVE = (sys.executable, "-m", "dualpath", "serve")


class LaunchedCluster(Protocol):
    """A cluster all of whose engines have joined."""

    @property
    def url(self) -> str:
        """Of its OpenAI server, ``http://host:port/v1``; ``/metrics`` is at the same host and port."""
        ...

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """`work`'s result. Raises ClusterError, cancelling `work`, if the cluster ends before it."""
        ...


class ClusterLauncher(Protocol):
    """``async with launcher.cluster(…) as cluster``. One cluster is up at a time, and gone when it is left."""

    @property
    def links(self) -> Literal["emulated", "kernel"]:
        """Who keeps the NICs' rates: the engines' traffic manager, or the kernel."""
        ...

    def cluster(
        self, name: str, topology: str, system: str, store: Path, limited: bool
    ) -> AbstractAsyncContextManager[LaunchedCluster]:
        """Entering it raises ClusterError where the cluster does not start.

        `name` is for messages and log files, `topology` like ``1P2D``; `store` is the directory its blocks are in,
        and `limited` tells whether the NICs have the rates the launcher was made with, or none.
        """
        ...


class LocalLauncher:
    """Clusters of `dualpath serve` on this host, their NICs held to the rates by the engines themselves."""

    links: Literal["emulated", "kernel"] = "emulated"

    def __init__(
        self,
        *,
        model: Path,
        snic_bytes_per_s: int | None,
        cnic_bytes_per_s: int | None,
        logs: Path,
        ready_file: Path,
        serve_command: tuple[str, ...] = SERVE,
        start_timeout_s: float = 180.0,
    ) -> None:
        self._model = model
        self._rates = (snic_bytes_per_s, cnic_bytes_per_s)
        self._logs = logs
        self._ready_file = ready_file
        self._serve_command = serve_command
        self._start_timeout_s = start_timeout_s

    def cluster(self, name: str, topology: str, system: str, store: Path, limited: bool) -> ClusterProcess:
        """See `ClusterLauncher.cluster`. Its log is ``NAME.log``, with dashes."""
        snic, cnic = self._rates if limited else (None, None)
        command = [
            *self._serve_command,
            *("--topology", topology),
            *("--model", str(self._model)),
            *("--store", str(store)),
            *("--system", system),
            *("--snic-rate", _rate(snic)),
            *("--cnic-rate", _rate(cnic)),
            *("--port", "0"),
        ]
        return ClusterProcess(name, command, self._ready_file, log_path(self._logs, name), self._start_timeout_s)


def log_path(logs: Path, name: str) -> Path:
    """Log file of the cluster `name` (``1P1D basic #2``)."""
    return logs / f"{name.replace(' ', '-').replace('#', '').replace('/', '-')}.log"


def _rate(bytes_per_s: int | None) -> str:
    return "unlimited" if bytes_per_s is None else f"{bytes_per_s}B/s"
