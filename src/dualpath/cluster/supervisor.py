"""Starts the parts of a cluster on this host, brings back each one that ends, and ends them all.

A *part* is a process of the table: the server with its coordinator (under `dualpath serve`), an engine. A part that
ends is started again after a pause, which doubles with each end in a row up to `parts.MOST_PAUSE_S`, and is short again
once the part has been ready for `HEALTHY_S`. One that can't start at all is told to the owner as hopeless, with the
reason.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from typing import Any

from dualpath.cluster.children import Child, end_fork_server, seconds_ready, start
from dualpath.cluster.parts import CAN_NOT_RUN, Part, ReplaceError, Slot
from dualpath.spec.log import ROOT

logger = logging.getLogger(f"{ROOT}.cluster")

STOP_GRACE_S = 3.0
"""How long parts may take to leave by themselves before they are killed."""
LOOK_S = 0.2
SILENT_S = 5.0
"""How often ends are looked for that the fork server has not told; the second look kills it."""
HEALTHY_S = 30.0
MOST_FAILED_STARTS = 5


async def wait_out(
    futures: Collection["asyncio.Future[Any]"], patience_s: float = math.inf, hurry: Callable[[], None] = lambda: None
) -> None:
    """Wait until all have ended, however often this task is cancelled meanwhile; what they clean up must be done.

    From `patience_s` on, `hurry` is called again and again.
    """
    impatient_s = time.monotonic() + patience_s
    while not all(future.done() for future in futures):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(futures, timeout=None if patience_s == math.inf else LOOK_S)
        if time.monotonic() > impatient_s:
            hurry()


class Supervisor:
    """Owns the processes it has started, and ends no others. Used from one asyncio thread.

    `on_end(ticket, why)` is called when a process has ended; `on_change()` after each change of `starting`;
    `on_hopeless(why)` when a part can't start, each time that it has failed.
    """

    def __init__(
        self,
        parts: Iterable[Part],
        *,
        sweep: Callable[[], Coroutine[Any, Any, None]],
        on_end: Callable[[Child, str], None],
        on_hopeless: Callable[[str], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._slots = {part.name: Slot(part) for part in parts}
        self._sweep = sweep
        self._on_end = on_end
        self._on_hopeless = on_hopeless
        self._on_change = on_change
        self._children: dict[str, Child] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.restarts = 0
        """Processes that were started again."""

    # ── what there is ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def pids(self) -> dict[int, str]:
        """Returns the live processes: pid → name."""
        return {child.pid: child.name for child in self._children.values() if child.is_alive}

    def starting(self) -> list[dict[str, object]]:
        """Returns the parts that are not ready, and what each does, for /health."""
        rows: list[dict[str, object]] = []
        for slot in self._slots.values():
            child = slot.current
            if child is None or child.ready_s is None:
                step = slot.note if child is None else child.step
                rows.append({"name": slot.part.name, "pid": child.pid if child else None, "step": step})
        return rows

    def child(self, name: str) -> Child | None:
        """Returns the part's process; None while it has none."""
        return self._slots[name].current

    # ── starting ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Start every part, one after the other: the first fork server's import of torch takes seconds."""
        await self._sweep()
        self.spawn(self._notice_silent_ends())
        for slot in self._slots.values():
            if not self._stopping:
                await self._launch(slot)

    async def _notice_silent_ends(self) -> None:
        """The ends of engines are told by their fork server: one that hangs would hide them for ever."""
        silent: set[str] = set()
        while True:
            await asyncio.sleep(SILENT_S)
            ended = {child.ticket for child in self._children.values() if child.has_ended}
            if silent & ended:
                logger.warning(
                    "the fork server does not tell of an engine's end: it is killed, and its engines with it"
                )
                end_fork_server()
            silent = ended

    async def _launch(self, slot: Slot) -> Child:
        """Start the part's process and make it the current one. A start that fails counts as a process that ended."""
        child = Child(slot.part.name)
        slot.note = "starts"
        launching = asyncio.wrap_future(start(child, slot.part.start))
        try:
            await asyncio.shield(launching)
        except (OSError, EOFError) as error:  # the fork server has died, or the system refuses a process
            child.step = f"can't be started: {error!r}"
            self._on_missed(slot, child)
        finally:
            await wait_out([launching])  # so that no process is missed
            launching.exception()  # mark it as seen
            if child.process is not None:
                self._watch(slot, child)
        return child

    def _on_missed(self, slot: Slot, child: Child) -> None:
        child.told.close()
        if self._stopping:
            return
        logger.warning("%s %s", child.name, child.step)
        self._count_end(slot, child, f"{child.name} {child.step}")
        self.spawn(self._bring_back(slot))

    def _watch(self, slot: Slot, child: Child) -> None:
        assert child.process is not None
        slot.current = child
        self._children[child.ticket] = child
        loop = asyncio.get_running_loop()
        loop.add_reader(child.process.sentinel, self._ended, slot, child)
        loop.add_reader(child.told, self._hear, child)
        self._on_change()

    def _hear(self, child: Child) -> None:
        """Note and log what a part has told; it closes its end when it leaves."""
        try:
            while not child.told.closed and child.told.poll():
                child.step = str(child.told.recv())
                logging.getLogger(f"{ROOT}.{_kind(child.name)}").info(child.step)
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(child.told)
        self._on_change()

    def ready(self, ticket: str) -> None:
        """A part does its work now. A ticket that is nobody's is ignored."""
        child = self._children.get(ticket)
        if child is not None and child.ready_s is None:
            child.ready_s = time.monotonic()
            slot = self._slots[child.name]
            slot.failed_starts, slot.ever_ready = 0, True
            self._on_change()

    # ── ending, and coming back ─────────────────────────────────────────────────────────────────────────────────────

    def _ended(self, slot: Slot, child: Child) -> None:
        assert child.process is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(child.process.sentinel)  # it stays readable for ever
        self._hear(child)
        loop.remove_reader(child.told)
        child.told.close()
        del self._children[child.ticket]
        why = f"{child.name} (pid {child.pid}) ended with {child.end()}"
        logger.log(logging.DEBUG if self._stopping else logging.WARNING, why)
        if not self._stopping:  # else `stop` does it
            self.spawn(self._sweep())
        self._on_end(child, f"{why}: {child.step}")
        if slot.current is child:
            slot.current = None
        if slot.current is None and slot.retiring is None and not self._stopping:
            self._count_end(slot, child, f"{why}: {child.step}")
            self.spawn(self._bring_back(slot))
        self._on_change()

    def _count_end(self, slot: Slot, child: Child, why: str) -> None:
        slot.ends_in_a_row = 1 if seconds_ready(child) > HEALTHY_S else slot.ends_in_a_row + 1
        slot.failed_starts += child.ready_s is None
        refuses = child.step.startswith(CAN_NOT_RUN) and not slot.ever_ready
        if refuses or slot.failed_starts >= MOST_FAILED_STARTS:
            self._on_hopeless(why)

    async def _bring_back(self, slot: Slot) -> None:
        pause_s = slot.pause_s()
        slot.note = f"has ended and starts again in {pause_s:g} s"
        self._on_change()
        await asyncio.sleep(pause_s)
        if not self._stopping and slot.current is None:
            self.restarts += 1
            await self._launch(slot)

    # ── replacing ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def replace(
        self, name: str, retire: Callable[[Child, Child | None], Awaitable[None]], *, first: bool, timeout_s: float
    ) -> None:
        """Put a new process in the place of a part's. With `first` the new one is started before the old one ends.

        `retire(old, new)` has the old one do its last work and leave; it raises ReplaceError when it stays. `new` is
        None where it comes later. `timeout_s` bounds how long the new one takes to be ready. Raises ReplaceError.
        """
        slot = self._slots[name]
        old = slot.current
        if old is None or old.ready_s is None or slot.retiring is not None:
            raise ReplaceError(f"{name} is not serving; see the log, and try again when /health is ok")
        slot.retiring = old
        try:
            new = await self._launch(slot) if first else None
            try:
                await retire(old, new)
            except BaseException:
                slot.current = old
                if new is not None:
                    new.kill()
                raise
            await self._until(lambda: old.ticket not in self._children, timeout_s, f"the old {name} did not leave")
            new = new or await self._launch(slot)
            await self.until_ready(new, timeout_s)
        finally:
            slot.retiring = None
            if slot.current is None and not self._stopping:
                self.spawn(self._bring_back(slot))

    async def until_ready(self, child: Child, timeout_s: float, says: str | None = None) -> None:
        """Wait until it is ready, or `says` that. Raises ReplaceError when it ends before, or takes too long."""
        complaint = f"the new {child.name} is not ready: {child.step}"
        await self._until(lambda: child.is_ready(says) or child.ticket not in self._children, timeout_s, complaint)
        if not child.is_ready(says):
            raise ReplaceError(f"the new {child.name} has ended: {child.step}")

    async def _until(self, condition: Callable[[], bool], timeout_s: float, complaint: str) -> None:
        give_up_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > give_up_s:
                raise ReplaceError(f"{complaint}, after {timeout_s:.0f} s")
            await asyncio.sleep(0.02)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Own a task until `stop`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def kill(self, ticket: str) -> None:
        """Kill the process with that ticket and return when it is dead. A ticket that is nobody's is left alone."""
        child = self._children.get(ticket)
        if child is not None:
            child.kill()

    def start_no_more(self) -> None:
        """From now on nothing is started, and what ends stays down."""
        self._stopping = True

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Give parts time to leave by themselves, then kill them. No process is left when it returns."""
        self._stopping = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await wait_out(tasks, grace_s, end_fork_server)  # a start may wait for it
        for child in self._children.values():
            dismiss = self._slots[child.name].part.dismiss
            if dismiss is not None:
                dismiss(child)
        await self._all_ended(grace_s)
        for child in self._children.values():
            if child.process is not None:
                child.process.kill()
        await self._all_ended(STOP_GRACE_S)  # each is dead; its sentinel says so
        if self._children:
            end_fork_server()
            await self._all_ended(STOP_GRACE_S)
        await self._sweep()

    async def _all_ended(self, seconds: float) -> None:
        give_up_s = time.monotonic() + seconds
        while self._children and time.monotonic() < give_up_s:
            await asyncio.sleep(0.005)


def _kind(name: str) -> str:
    return name if name == "server" else f"engine {name}"
