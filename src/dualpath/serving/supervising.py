"""`dualpath serve`: a small process, without torch or HTTP, that keeps the parts of a cluster running.

It holds the sockets at which clients and engines arrive, so that nobody finds them closed while the server part, which
has the HTTP server and the coordinator, is started again. The parts are the server and this host's nodes. What
happens when one ends: `cluster.supervisor`. Why all ends: it is told to, or nobody could serve any more.
"""

import asyncio
import logging
import os
import signal
import socket
import sys

import msgspec

from dualpath.cluster.children import Child
from dualpath.cluster.cluster_secret import cluster_secret, tell_engines
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.control_address import control_listener, stop_listening
from dualpath.cluster.engine_parts import all_parts, node_parts
from dualpath.cluster.leftovers import Sweep
from dualpath.cluster.parts import CAN_NOT_RUN, Part, ReplaceError
from dualpath.cluster.preflight import settled
from dualpath.cluster.supervisor import Supervisor
from dualpath.kv import StoreError
from dualpath.server.listener import bind
from dualpath.serving import words as w
from dualpath.serving.orders_socket import RESTART, OrdersSocket
from dualpath.serving.ready_file import ReadyFile
from dualpath.serving.restarting import LAST_WORDS_S, RollingRestart, Say
from dualpath.serving.server_part import LOOK_S, SERVER, ServerPart
from dualpath.spec.log import ROOT, start_log

logger = logging.getLogger(f"{ROOT}.server")


def run(config: ClusterConfig, local_engines: bool = True) -> int:
    """Serve until SIGINT or SIGTERM. Returns the process's exit code."""
    start_log(config.log_format)
    try:
        listener = bind(config.host, config.port)
        return asyncio.run(_until_signalled(settled(config, local_engines), listener, local_engines))
    except (OSError, StoreError, ValueError) as error:
        return _refuse(error.strerror if isinstance(error, OSError) and error.strerror else str(error))


def _refuse(why: str) -> int:
    print(f"dualpath serve: {' '.join(why.split())}", file=sys.stderr, flush=True)
    return 1


async def _until_signalled(config: ClusterConfig, listener: socket.socket, local_engines: bool) -> int:
    with cluster_secret(config.cluster_secret, None if local_engines else tell_engines) as secret:
        config = msgspec.structs.replace(config, cluster_secret=secret)
        serving = SupervisedCluster(config, listener, local_engines)
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, serving.signalled)
        with serving.ready_file:
            why = await serving.run()
        for name in (signal.SIGINT, signal.SIGTERM):  # nothing is left to be stopped
            asyncio.get_running_loop().remove_signal_handler(name)
            signal.signal(name, signal.SIG_IGN)
    return _refuse(why) if why else 0


def _awaited(config: ClusterConfig) -> str:
    how = "`dualpath engine`" if config.engine == "dualpath" else "`dualpath engine --engine vllm` or `dualpath agent`"
    missing = f"{config.topology.prefill_engines} prefill and {config.topology.decode_engines} decode engines"
    return (
        f"waits at {config.control_address} for {missing}, up to {config.join_timeout_s:g} s: start {how} with "
        f"--transport {config.transport} and the same secret, model and store"
    )


class SupervisedCluster:
    """What `dualpath serve` runs. Used from one asyncio thread."""

    def __init__(self, config: ClusterConfig, listener: socket.socket, local_engines: bool) -> None:
        address, control = control_listener(config.control_address)
        self._control = control
        self.ready_file = ReadyFile(config.ready_file)
        self._config = config = msgspec.structs.replace(config, control_address=address)
        self._listener = listener
        nodes = node_parts(config, address, self._served_weights) if local_engines else []
        self._server = ServerPart(
            config, local_engines, listener, control, on_word=self._on_word, kill=lambda ticket: self._kill(ticket)
        )
        self._supervisor = Supervisor(
            [Part(SERVER, self._server.start), *all_parts(nodes)],
            sweep=Sweep(config.transport),
            on_end=self._ended,
            on_hopeless=self._hopeless,
            on_change=self._tell_table,
        )
        self._restart = RollingRestart(
            self._supervisor,
            self._server,
            nodes,
            timeout_s=config.join_timeout_s,
            patience_s=config.request_deadline_ns / 1e9,
            one_at_a_time=config.engine == "vllm",
        )
        self._orders = OrdersSocket({RESTART: self._restart_all})
        self._signals = 0
        self._stop = asyncio.Event()
        self._why = ""
        if not local_engines:
            logger.info("%s", _awaited(config))
        elif config.engine == "vllm":
            vllm = config.vllm
            logger.info(
                "starts %d servers of vLLM %s; their logs: %s", config.topology.engines, vllm.version, vllm.logs
            )

    async def run(self) -> str:
        """Returns why it can serve no more; empty when it was told to stop."""
        await self._orders.open()
        starting = self._supervisor.spawn(self._supervisor.start())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
            await stopping
        finally:
            self._orders.close()
            self._supervisor.start_no_more()
            server = self._supervisor.child(SERVER)
            if server is None or server.ready_s is None:  # nobody is served: there is nothing to wait for
                await self._supervisor.stop(0.0)
            else:
                await self._end_servers()
                await self._supervisor.stop()
            self._listener.close()
            stop_listening(self._config.control_address, self._control)
        return self._why

    def signalled(self) -> None:
        """The first signal begins the drain, the second ends it."""
        self._signals += 1
        if self._signals == 1:
            drain_s = self._config.drain_s
            logger.info("stops: running requests have %g s to end; a second signal ends them at once", drain_s)
            self._supervisor.start_no_more()
        self._say_stop()
        self._stop.set()

    def _say_stop(self) -> None:
        self._server.greeting.append(w.Stop())  # also to one that is just being started
        self._server.say_to_all(w.Stop())

    async def _end_servers(self) -> None:
        if not self._signals:
            self._say_stop()
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._config.drain_s + LAST_WORDS_S
        while self._server.runs and loop.time() < give_up_s:
            await asyncio.sleep(LOOK_S)

    async def _restart_all(self, say: Say) -> None:
        if self._signals:
            raise ReplaceError("the server is shutting down")
        await self._restart.run(say)

    # ── the parts ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _served_weights(self) -> str:
        return self._config.model if self._server.weights is None else self._server.weights[0]

    def _kill(self, ticket: str) -> None:
        self._supervisor.kill(ticket)

    def _on_word(self, child: Child, word: object) -> None:
        match word:
            case w.Joined():
                self._supervisor.ready(word.ticket)
            case w.Serving():
                self._supervisor.ready(child.ticket)
                if not self._server.has_served:
                    print(word.welcome, flush=True)
                self._server.has_served, self._server.weights = True, word.weights
                self.ready_file.write(word.facts | {"pid": os.getpid(), "orders": self._orders.name})

    def _ended(self, child: Child, _why: str) -> None:
        if child.name == SERVER:
            self._server.ended(child)
        else:
            self._server.say_to_all(w.Ended(child.ticket))

    def _hopeless(self, why: str) -> None:
        """A part can't start. If it is an engine, the server knows whether the others are enough."""
        if why.startswith(f"{SERVER} ") or not self._server.runs:
            _, refuses, reason = why.partition(f": {CAN_NOT_RUN}")
            self._why = reason if refuses else why
            self._stop.set()
        else:
            self._server.say_to_all(w.Hopeless(why))

    def _tell_table(self) -> None:
        rows = [row for row in self._supervisor.starting() if row["name"] != SERVER]
        table = w.Table(rows, self._supervisor.restarts)
        self._server.greeting = [table, *(word for word in self._server.greeting if isinstance(word, w.Stop))]
        self._server.say_to_all(table)
