"""Starts a cluster's engine processes on this host, notices when one ends, and ends them all.

Engines are forked from a server process that has imported torch and transformers once. The second and later ones start
in a fraction of a second and share those pages. Forking is safe because the fork server has no other threads.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.messages import EngineConfig
from dualpath.core.vocabulary import Role
from dualpath.spec.log import ROOT
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool_files import sweep_dead_pools

logger = logging.getLogger(f"{ROOT}.cluster")

MAX_ENGINES = 64
"""More processes than this would take a host's memory before they could serve."""
STOP_GRACE_S = 3.0
"""How long engines may take to leave by themselves before they are killed."""


class Supervisor:
    """Owns the engine processes it started. Used from one asyncio thread."""

    def __init__(self, config: ClusterConfig, control_address: str) -> None:
        self._config = config
        self._control_address = control_address
        self._processes: dict[int, BaseProcess] = {}
        self._names: dict[int, str] = {}
        self._told: dict[int, Connection] = {}
        self._starts = True
        self.steps: dict[int, str] = {}
        """What each engine process said last: the step of its start that it is at, or why it can't run."""

    def start(self) -> None:
        """Start every engine of the topology. Blocks until torch is imported, for seconds."""
        topology = self._config.topology
        if topology.prefill_nodes + topology.decode_nodes > MAX_ENGINES:
            raise ValueError(
                f"{topology} is more than {MAX_ENGINES} engines on one host; start fewer, or let "
                "engines of other hosts join with --join-address"
            )
        self._sweep()
        logger.info("starts %d engines; torch is imported once for all", topology.prefill_nodes + topology.decode_nodes)
        for role, count in ((Role.PREFILL, topology.prefill_nodes), (Role.DECODE, topology.decode_nodes)):
            for rank in range(count):
                if self._starts:
                    self._start_engine(role, f"{role.value}-{rank}")

    def start_no_more(self) -> None:
        """Let `start`, on its thread, end after the engine that it is starting. Nothing happens when it has ended."""
        self._starts = False

    def _start_engine(self, role: Role, name: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"dualpath.cluster.engines.{name}" for name in ("fork_server", "main")])
        cluster = self._config.without_secrets()
        config = EngineConfig(role=role, coordinator=self._control_address, cluster=cluster, name=name)
        told, telling = context.Pipe(duplex=False)
        process = context.Process(target=engine_entry, args=(config, telling), name=f"dualpath-{name}", daemon=True)
        # `fork_server` ignores them; one that came before that would end it with a traceback. The tracker, which is
        # started first, unblocks them.
        resource_tracker.ensure_running()
        former = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        telling.close()
        assert process.pid is not None
        self._processes[process.pid] = process
        self._names[process.pid] = name
        self._told[process.pid] = told
        self.steps[process.pid] = "starts"

    @property
    def pids(self) -> dict[int, str]:
        """Returns the live engine processes: pid → name, such as ``decode-1``."""
        return {pid: self._names[pid] for pid, process in self._processes.items() if process.is_alive()}

    async def watch(self, on_exit: Callable[[int, str], None]) -> None:
        """Until cancelled, call ``on_exit(pid, why)`` for every engine process that ends."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Queue[int] = asyncio.Queue()
        watched = dict(self._processes)

        def tell(pid: int) -> None:
            loop.remove_reader(watched[pid].sentinel)  # it stays readable for ever
            ended.put_nowait(pid)

        for pid, process in watched.items():
            loop.add_reader(process.sentinel, tell, pid)
            loop.add_reader(self._told[pid], self._hear, pid)
        try:
            while True:
                pid = await ended.get()
                process = self._processes.pop(pid)
                process.join(1.0)
                self._hear(pid)
                why = f"{self._names[pid]} (pid {pid}) ended with {_exit(process.exitcode)}"
                logger.warning(why)
                self._sweep()
                on_exit(pid, f"{why}: {self.steps.pop(pid)}")
        finally:
            for pid, process in watched.items():
                loop.remove_reader(process.sentinel)
                loop.remove_reader(self._told[pid])

    def _hear(self, pid: int) -> None:
        """Note and log what an engine has told; it closes its end when it leaves."""
        told = self._told[pid]
        try:
            while not told.closed and told.poll():
                self.steps[pid] = told.recv()
                logging.getLogger(f"{ROOT}.engine {self._names[pid]}").info(self.steps[pid])
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(told)

    def kill(self, pid: int) -> None:
        """Kill the process and return when it is dead. A pid that is not ours is left alone."""
        process = self._processes.get(pid)
        if process is not None and process.is_alive():
            os.kill(pid, signal.SIGKILL)
            process.join(5.0)

    def stop(self) -> None:
        """Give engines `STOP_GRACE_S` to leave by themselves, then kill them."""
        deadline = time.monotonic() + STOP_GRACE_S
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
        for pid in list(self._processes):
            self.kill(pid)
        self._processes.clear()
        for told in self._told.values():
            told.close()
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed engines of any cluster with this transport have left behind."""
        sweep_dead_pools()
        TRANSPORTS.get(self._config.transport).sweep()


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        hint = ", as the system does when memory is short" if code == -signal.SIGKILL else ""
        return f"signal {signal.Signals(-code).name}{hint}"
    return f"exit code {code}"


def engine_entry(config: EngineConfig, telling: Connection) -> None:
    """Run one engine in this process; its steps go to the supervisor, as long as that lives."""
    from dualpath.cluster.engines.main import run_engine

    def tell(step: str) -> None:
        with contextlib.suppress(OSError):
            telling.send(step)

    run_engine(config, tell)
