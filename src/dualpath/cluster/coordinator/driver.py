"""Drives core's scheduler: gives it inputs with the time, passes on its commands, sets its timer, keeps the journal.

There is no policy here: core decides which engine, which path, when to retry and when to give up. When an input or a
command raises, that is a bug in the driver or in core, and the state can no longer be trusted. The driver then reports
the exception to `on_broken`, which stops the cluster.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from dualpath.cluster.config import ClusterConfig
from dualpath.core.ledger import Holding
from dualpath.core.policy import SECOND_NS, Constants, Limits
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import Command, EngineId
from dualpath.kv.layout import KVLayout
from dualpath.spec.private_files import private_opener

if TYPE_CHECKING:
    from dualpath.core.journal import JournaledScheduler

logger = logging.getLogger(__name__)

UNLIMITED_BYTES_PER_S = 10**12
"""The rate for α when the SNIC has no limit: no read queue is ever long."""


def scheduler_constants(config: ClusterConfig, layout: KVLayout, prefill_tokens_per_s: float) -> Constants:
    """Returns the constants: α from the SNIC's rate, in tokens deep in a hit; β from a measured prefill rate."""
    return Constants.from_rates(
        snic_tokens_per_s=(config.snic_rate or UNLIMITED_BYTES_PER_S) / max(1, layout.kv_bytes.whole_bytes_per_token),
        prefill_tokens_per_s=prefill_tokens_per_s,
    )


def scheduler_limits(config: ClusterConfig) -> Limits:
    """Returns limits with the configured deadline for every stage; decoding gets extra time per token."""
    deadline_ns = config.request_deadline_ns
    return Limits(
        max_waiting=config.max_waiting,
        max_attempts=config.max_attempts,
        queue_ns=deadline_ns,
        load_ns=deadline_ns,
        prefill_ns=deadline_ns,
        decode_ns=deadline_ns,
        decode_ns_per_token=deadline_ns // 100,
        release_ns=config.lease_ns * 2,
        replacement_ns=max(1, round(config.replacement_timeout_s * SECOND_NS)),
    )


AnyScheduler: TypeAlias = "Scheduler | JournaledScheduler"
Input = Callable[[AnyScheduler, int], None]
"""Calls one scheduler method with the time."""


class SchedulerDriver:
    """Used from one asyncio thread."""

    def __init__(self, on_broken: Callable[[BaseException], None], journal: str | None) -> None:
        """`journal` is a file for every input and its commands, one JSON line each. Raises OSError if it won't open."""
        self._on_broken = on_broken
        try:
            self._journal = open(journal, "wb", opener=private_opener) if journal else None  # noqa: SIM115 (closed in close)
        except OSError as error:
            message = f"the journal {journal} can't be written: {error.strerror}; give --journal a file in a folder"
            raise OSError(error.errno, message) from error
        self._scheduler: AnyScheduler | None = None
        self._carry_out: Callable[[Command], None] = lambda _: None
        self._driving = False
        self._timer: asyncio.TimerHandle | None = None
        self._wake_ns: int | None = None
        self._closed = False

    def begin(self, scheduler: Scheduler, carry_out: Callable[[Command], None]) -> None:
        """Start to drive `scheduler`. `carry_out` gets every command in order, and may make inputs itself."""
        self._carry_out = carry_out
        self._scheduler = scheduler
        if self._journal is not None:
            from dualpath.core.journal import JournaledScheduler

            self._scheduler = JournaledScheduler(scheduler, self._journal.write)

    def input(self, call: Input) -> None:
        """Make one scheduler input, carry out all commands that follow from it, then set the next timer."""
        if self._closed:
            return
        assert self._scheduler is not None
        try:
            call(self._scheduler, time.monotonic_ns())
            if self._driving:
                return  # an input made while carrying out a command: its commands come after the earlier ones
            self._driving = True
            try:
                while commands := self._scheduler.take_commands():
                    for command in commands:
                        self._carry_out(command)
            finally:
                self._driving = False
            self._arm(self._scheduler.next_wake())
        except BaseException as error:
            self._on_broken(error)
            raise

    def statistics(self) -> dict[str, int]:
        return self._scheduler.statistics() if self._scheduler is not None else {}

    def held(self) -> tuple[Holding, ...]:
        """Returns the holdings in core's ledger; empty when the cluster is idle."""
        return self._scheduler.held() if self._scheduler is not None else ()

    def is_busy(self, engine: EngineId) -> bool:
        """Returns whether an engine has anything of a request in hand; one that is lost has not."""
        if self._scheduler is None or all(facts.engine != engine for facts in self._scheduler.engines()):
            return False
        return self._scheduler.load_of(engine).seq > 0 or any(one.engine == engine for one in self.held())

    def close(self) -> None:
        """Close the journal and ignore all later inputs."""
        self._closed = True
        self._arm(None)
        if self._journal is not None:
            try:
                self._journal.close()
            except OSError as error:  # the cluster must still be ended
                logger.error("the journal's end could not be written: %s", error)

    def _arm(self, wake_ns: int | None) -> None:
        if self._timer is not None and wake_ns == self._wake_ns:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake_ns = wake_ns
        if wake_ns is not None:
            delay_s = max(0.0, (wake_ns - time.monotonic_ns()) / 1e9)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.input(lambda s, now: s.wake(now))
