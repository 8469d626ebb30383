"""`DataPlanes`: makes an engine's buffer, its CNIC and its data server, off the main thread and within a deadline."""

import asyncio
import logging
import uuid
from functools import partial
from typing import NamedTuple

from dualpath.cluster.attachment import Attach
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.deadline_threads import AbandonedError, Call, DeadlineThreads, LateError
from dualpath.core.vocabulary import Role
from dualpath.spec.log import ROOT
from dualpath.transfer.guarded_transport import GuardedTransport, TransportMistake
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import Nic, TrafficManager
from dualpath.transfer.transport import Server

logger = logging.getLogger(f"{ROOT}.agent")

SERVE_S = 60.0
"""How long a transport's `serve` may take: a fabric registers the whole buffer."""
SLOW_S = 5.0
"""From then on it is said what is waited for."""
SERVE_THREADS = 4
STAGING_BLOCKS = 4
"""Pages beside a decode engine's buffer, through which generated blocks go to storage; each is held for one write."""


class DataPlane(NamedTuple):
    """Of one engine."""

    pool: BufferPool
    traffic: TrafficManager
    transport: GuardedTransport
    server: Server

    def close(self) -> None:
        self.server.close()
        self.pool.close()


class DataPlanes:
    """Of a node: all share its SNIC. Used from the main asyncio thread. Raises UnknownNameError."""

    def __init__(self, config: ClusterConfig, snic: Nic) -> None:
        self._config = config
        self._snic = snic
        self._transport = GuardedTransport(config.transport)
        self._threads = DeadlineThreads(SERVE_THREADS, "serve", SERVE_S, most_hung=SERVE_THREADS)

    async def open(self, facts: Attach) -> DataPlane:
        """Raises ValueError or OSError when there is no room for a buffer, or the transport can't serve it."""
        pool = await asyncio.to_thread(make_pool, facts, self._config.buffer_bytes)
        served: list[DataPlane] = []
        serving = self._threads.submit(partial(self._serve, pool, served))
        slow = asyncio.get_running_loop().call_later(SLOW_S, self._say_slow)
        try:
            await serving.future
        except BaseException as error:
            await serving.let_go()
            for plane in served:  # this task was cancelled just then
                plane.server.close()
            pool.close()
            if isinstance(error, LateError):
                raise TransportMistake(
                    self._transport.complaint("serve", f"hangs ({error}; it was given {SERVE_S:g} s)")
                ) from error
            raise
        finally:
            slow.cancel()
        return served[0]

    def _serve(self, pool: BufferPool, served: list[DataPlane], call: Call[None]) -> None:
        """On a thread of its own."""
        transport, config = self._transport, self._config
        traffic = TrafficManager(
            snic=self._snic, cnic_bytes_per_s=config.cnic_rate, copies_pass_cnic=config.copies_pass_cnic
        )
        name, key = uuid.uuid4().hex[:12], config.secret.data_key
        server = transport.serve(pool, traffic, host=config.data_host, name=name, key=key)
        try:
            call.hand_over(lambda: served.append(DataPlane(pool, traffic, transport, server)))
        except AbandonedError:
            server.close()
            raise

    def _say_slow(self) -> None:
        what = f"has not returned after {SLOW_S:g} s, and may take {SERVE_S:g} s"
        logger.warning("%s", self._transport.complaint("serve", what))

    def close(self) -> None:
        self._threads.close(0.0)


def make_pool(facts: Attach, buffer_bytes: int) -> BufferPool:
    """Take an engine's buffer, which may be seconds of work. Raises ValueError when it does not hold a block, OSError
    when memory is short."""
    block_bytes = facts.layout.full_block_bytes
    blocks = buffer_bytes // block_bytes
    if blocks < 1:
        raise ValueError(f"--buffer {buffer_bytes} does not hold a Full Block of this model, {block_bytes} bytes")
    if facts.role is Role.DECODE:
        blocks += STAGING_BLOCKS
    return BufferPool.create("buffer", block_bytes, blocks)
