"""`dualpath engine` and `dualpath agent`: a small process that keeps the parts of one node running, which joins a
coordinator elsewhere."""

import asyncio
import logging
import signal
from collections.abc import Callable

from dualpath.cluster.attachment import LISTENS
from dualpath.cluster.children import Child
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.control_link import ABANDONED
from dualpath.cluster.engine_parts import agent_part, all_parts, one_node
from dualpath.cluster.leftovers import Sweep
from dualpath.cluster.parts import CAN_NOT_RUN, Part
from dualpath.cluster.supervisor import Supervisor
from dualpath.core.vocabulary import Role
from dualpath.spec.log import ROOT, start_log

logger = logging.getLogger(f"{ROOT}.cluster")

JOINS = "joins"
"""The step at which an engine has done all that can go wrong with its start."""
_ABANDONED = f"leaves: {ABANDONED}"
"""How the last step of an engine begins that has found no coordinator in time; a new one would find none either."""


def run_node(config: ClusterConfig, coordinator: str, role: Role, rank: int) -> int:
    """Run a node of the role, as the topology has it, until they are dismissed, or SIGINT or SIGTERM come.

    Returns the process's exit code: 1 when an engine can't run.
    """
    start_log(config.log_format)
    return asyncio.run(_Node(config, lambda: all_parts([one_node(config, coordinator, role, rank)])).run())


def run_agent_alone(config: ClusterConfig, coordinator: str, socket: str) -> int:
    """Run a node's agent, without engines of its own, until SIGINT or SIGTERM come. Returns the process's exit code."""
    start_log(config.log_format)
    return asyncio.run(_Node(config, lambda: [agent_part(config, coordinator, "agent", socket)]).run())


class _Node:
    def __init__(self, config: ClusterConfig, parts: Callable[[], list[Part]]) -> None:
        self._over = asyncio.Event()
        self._code = 0
        self._supervisor = Supervisor(
            parts(),
            sweep=Sweep(config.transport),
            on_end=self._ended,
            on_hopeless=self._hopeless,
            on_change=self._look,
        )

    async def run(self) -> int:
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, self._over.set)
        try:
            await self._supervisor.start()
            await self._over.wait()
        finally:
            await self._supervisor.stop()
        return self._code

    def _look(self) -> None:
        for row in self._supervisor.starting():
            child = self._supervisor.child(str(row["name"]))
            if child is not None and child.step in (JOINS, LISTENS):
                self._supervisor.ready(child.ticket)

    def _ended(self, child: Child, _why: str) -> None:
        """An engine that has ended by itself, and well, was dismissed: the node is not needed any more."""
        if child.step.startswith((CAN_NOT_RUN, _ABANDONED)):
            self._hopeless(f"{child.name} {child.step}")
        elif child.process is not None and child.process.exitcode == 0:
            self._supervisor.start_no_more()
            self._over.set()

    def _hopeless(self, why: str) -> None:
        logger.error("%s", why)
        self._code = 1
        self._over.set()
