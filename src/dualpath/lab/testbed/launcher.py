"""Starts clusters inside a testbed: the usual `dualpath serve` and `dualpath engine`, each in its node's namespace.

::

    storage   nginx, serving the store's directory      ◄─ HTTP over snic0 ─┐
    head      dualpath serve --join-address …           ◄─ control over mgmt0 ─┤
    pe0, de0… dualpath engine --transport tcp --data-host <address of cnic0>  ─┘

The kernel keeps the rates, not the engines. These still count every byte by NIC, direction and class.
"""

import asyncio
import os
import secrets
import signal
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from dualpath.cluster.vllm_settings import KEY_VARIABLE
from dualpath.lab.experiments.local_cluster import (
    ClusterProcess,
    LaunchedCluster,
    LaunchError,
    log_path,
    log_tail,
)
from dualpath.lab.testbed import iproute, network
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.iproute import inside
from dualpath.lab.testbed.network import Testbed
from dualpath.lab.testbed.object_server import PORT, ObjectServer
from dualpath.lab.testbed.plan import Node, Rates
from dualpath.spec.topology import Topology

CONTROL_PORT = 5555
HTTP_PORT = 8000
ENGINE_GRACE_S = 5.0
"""Time that engines have to leave after their coordinator, and what their killed parents leave has after that."""
Result = TypeVar("Result")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class TestbedLauncher:
    """A `ClusterLauncher` whose NICs are the testbed's. `options` are added to those of all processes."""

    __test__ = False
    links: Literal["emulated", "kernel"] = "kernel"

    def __init__(
        self,
        testbed: Testbed,
        *,
        model: Path,
        rates: Rates,
        logs: Path,
        work: Path,
        options: Sequence[str] = (),
        engine_arguments: Sequence[str] = (),
        port: int = HTTP_PORT,
        start_timeout_s: float = 240.0,
    ) -> None:
        self.testbed = testbed
        self.model = model
        self.rates = rates
        self.logs = logs
        self.work = work
        self.options = tuple(options)
        self.engine_arguments = tuple(engine_arguments)
        self.port = port
        self.start_timeout_s = start_timeout_s

    def cluster(
        self, name: str, topology: str, system: str, store: Path, limited: bool
    ) -> AbstractAsyncContextManager[LaunchedCluster]:
        """See `ClusterLauncher.cluster`. Logs are ``NAME.log`` and, for each engine, ``NAME-pe0.log``."""
        return TestbedCluster(self, name, topology, system, store, self.rates if limited else Rates())


class TestbedCluster:
    """An async context. Entering sets rates, starts object server, coordinator and engines; leaving ends them."""

    __test__ = False

    def __init__(
        self, launcher: TestbedLauncher, name: str, topology: str, system: str, store: Path, rates: Rates
    ) -> None:
        self.name = name
        self._launcher = launcher
        self._store = store
        self._rates = rates
        self._plan = launcher.testbed.plan
        self._options = (
            *("--model", str(launcher.model.resolve())),
            *("--store", f"http://{self._plan.node('storage').address('storage')}:{PORT}"),
            *("--topology", topology),
            *("--system", system),
            *("--transport", "tcp"),
            *("--cluster-secret-file", str(launcher.work / "secret")),
            *launcher.options,
        )
        self._vllm_key = secrets.token_hex(16)
        self._engines = list(_engines(self._plan.nodes, topology))
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._exits: asyncio.Task[LaunchError] | None = None
        self._serve = ClusterProcess(
            name,
            self._serve_command(),
            launcher.work / "ready.json",
            self._log(),
            launcher.start_timeout_s,
            _environment(self._vllm_key),
        )
        self._stack = AsyncExitStack()

    @property
    def url(self) -> str:
        """See `LaunchedCluster.url`."""
        return self._serve.url

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """See `LaunchedCluster.run`; an engine that ends counts as the cluster's end."""
        return await self._unless_an_engine_ends(self._serve.run(work))

    async def __aenter__(self) -> "TestbedCluster":
        """Raises LaunchError."""
        self._launcher.work.mkdir(parents=True, exist_ok=True)
        secret = self._launcher.work / "secret"
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        server = ObjectServer(
            self._store,
            self._launcher.work / "nginx",
            address=self._plan.node("storage").address("storage"),
            prefix=inside(self._plan.node("storage").namespace),
        )
        try:
            await asyncio.to_thread(network.set_rates, self._launcher.testbed, self._rates)
            await asyncio.to_thread(server.__enter__)
        except TestbedError as error:
            raise LaunchError(f"{self.name}: {error}") from error
        self._stack.push_async_callback(asyncio.to_thread, server.__exit__)
        self._stack.push_async_callback(self._end_engines)
        for node, role in self._engines:
            await self._start_engine(node, role)
        self._exits = asyncio.create_task(self._first_exit())
        await self._unless_an_engine_ends(self._stack.enter_async_context(self._serve))

    async def _unless_an_engine_ends(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Returns `work`'s result. If an engine ends first, cancels `work` and raises LaunchError."""
        assert self._exits is not None, "the cluster has been entered"
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({working, self._exits}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise self._exits.result()
            return working.result()
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _start_engine(self, node: Node, role: str) -> None:
        command = (
            *inside(node.namespace),
            *(sys.executable, "-m", "dualpath", "engine", "--role", role, "--rank", node.name[2:]),
            *("--coordinator", f"tcp://{self._plan.node('head').address('management')}:{CONTROL_PORT}"),
            *("--data-host", node.address("compute")),
            *self._options,
            *(self._vllm_options(node) if "vllm" in self._options else ()),
            *self._launcher.engine_arguments,
        )
        with self._log(node.name).open("wb") as log:
            self._processes[node.name] = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(self._vllm_key),
            )

    def _vllm_options(self, node: Node) -> tuple[str, ...]:
        """The router is not in the compute network."""
        return ("--vllm-host", node.address("management"), "--vllm-logs", str(self._launcher.logs))

    async def _first_exit(self) -> LaunchError:
        """Waits until an engine has ended; returns the error to raise."""
        waits = {asyncio.create_task(process.wait()): name for name, process in self._processes.items()}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        ended = next(iter(done))
        name = waits[ended]
        return LaunchError(
            f"{self.name}: engine {name} ended by itself, exit code {ended.result()}.{log_tail(self._log(name))}"
        )

    async def _end_engines(self) -> None:
        """Waits for engines that their coordinator has dismissed; ends those that do not leave."""
        if self._exits is not None:
            self._exits.cancel()
        processes = list(self._processes.values())
        with suppress(TimeoutError):
            async with asyncio.timeout(ENGINE_GRACE_S if self._serve.url else 0):
                for process in processes:
                    await process.wait()
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        await self._clear_nodes()

    async def _clear_nodes(self) -> None:
        """A killed engine's fork server and agent end by themselves, a little later; kill them if they do not."""
        give_up_s = time.monotonic() + ENGINE_GRACE_S
        for node, _ in self._engines:
            while left := await asyncio.to_thread(iproute.pids, node.namespace):
                if time.monotonic() > give_up_s:
                    for pid in left:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.05)

    def _serve_command(self) -> tuple[str, ...]:
        head = self._plan.node("head")
        return (
            *inside(head.namespace),
            *(sys.executable, "-m", "dualpath", "serve", "--host", head.address("management")),
            *("--port", str(self._launcher.port)),
            *("--join-address", f"tcp://{head.address('management')}:{CONTROL_PORT}"),
            *("--ready-file", str(self._launcher.work / "ready.json")),
            *self._options,
        )

    def _log(self, engine: str = "") -> Path:
        return log_path(self._launcher.logs, f"{self.name} {engine}".strip())


def _environment(vllm_key: str) -> Mapping[str, str]:
    """Returns the environment without proxies, which would get the object server's requests."""
    kept = {name: value for name, value in os.environ.items() if name.lower() not in _PROXIES}
    return kept | {KEY_VARIABLE: vllm_key}


def _engines(nodes: Sequence[Node], topology: str) -> Iterator[tuple[Node, str]]:
    """Yields the nodes that `topology` takes, and their roles. Raises LaunchError if there are too few."""
    by_name = {node.name: node for node in nodes}
    size = Topology.parse(topology)
    for kind, role, count in (("pe", "prefill", size.prefill_nodes), ("de", "decode", size.decode_nodes)):
        for rank in range(count):
            if f"{kind}{rank}" not in by_name:
                needed = f"{kind}{rank}, which {topology} needs: dualpath testbed up {topology}"
                raise LaunchError(f"the testbed has no {needed}")
            yield by_name[f"{kind}{rank}"], role
