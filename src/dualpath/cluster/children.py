"""Child processes of a supervisor: how one is started, what it says, and that it ends with its parent.

A child must not outlive its parent, whatever ends that, SIGKILL included. So the kernel is told to kill the child when
the *thread* that started it ends (`PR_SET_PDEATHSIG`); children are therefore started by threads that live as long as
the process. A parent that died before the child could say so is noticed by its pid.
"""

import contextlib
import ctypes
import multiprocessing
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dualpath.cluster.sessions import end_session
from dualpath.thread_names import named_threads

PARENT_VARIABLE = "_DUALPATH_PARENT_PID"
"""In the environment of every child, and of what it starts: who may be its parent."""
SIGNALS_OF_THE_PARENT = (signal.SIGINT, signal.SIGTERM)
"""A terminal, and a service manager, send them to all processes of a group. The supervisor says when children end."""
_PR_SET_PDEATHSIG = 1
_STARTERS = named_threads(4, "starter")
_ENVIRONMENT = threading.Lock()


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """From now on this process gets a signal when its parent dies; SIGKILL at once when that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def state_of(pid: int) -> str:
    """Returns the letter of a process's state, as `ps` shows it. Raises OSError when it is gone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def leave_signals_to_the_parent() -> None:
    """Ignore them; `start` has kept them blocked until here."""
    for number in SIGNALS_OF_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS_OF_THE_PARENT)


def teller(telling: Connection) -> Callable[[str], None]:
    """Returns what tells the supervisor a step, as long as that lives."""

    def tell(step: str) -> None:
        with contextlib.suppress(OSError):
            telling.send(step)

    return tell


class Child:
    """A process that was started, and its pipe: it says the step that it is at, or why it can't run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ticket = secrets.token_hex(16)
        """What proves that somebody is this child, or speaks for it."""
        self.step = "starts"
        self.ready_s: float | None = None
        """When it was ready for work, on the monotonic clock."""
        self.told, self.telling = multiprocessing.Pipe(duplex=False)
        self.process: BaseProcess | None = None
        self.leads_session = False
        """Whether a session of its own has all that it starts: it ends with this process."""

    @property
    def pid(self) -> int:
        pid = self.process.pid if self.process is not None else None
        return pid or 0

    def is_ready(self, says: str | None = None) -> bool:
        """Returns whether it is ready for work, or has said that."""
        return self.ready_s is not None or self.step == says

    @property
    def has_ended(self) -> bool:
        """Whether the kernel says so. `process` knows only what the fork server has told, if that has started it."""
        try:
            return state_of(self.pid) == "Z"
        except OSError:
            return True

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def kill(self) -> None:
        """Kill it, and return when it is dead, with its session."""
        process = self.process
        if process is not None and process.is_alive():
            process.kill()
            process.join(5.0)
        self._end_session()

    def _end_session(self) -> None:
        if self.leads_session and self.pid:
            end_session(self.pid)

    def end(self) -> str:
        """Returns how it has ended, in words. Call it once its sentinel is readable."""
        assert self.process is not None
        self.process.join(1.0)
        self._end_session()
        code = self.process.exitcode
        if code is not None and code < 0:
            hint = ", as the system does when memory is short" if code == -signal.SIGKILL else ""
            return f"signal {signal.Signals(-code).name}{hint}"
        return f"exit code {code}"


def end_fork_server() -> None:
    """Kill the fork server that does not answer, and so its engines. The next start of an engine makes another."""
    pid = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


Start = Callable[[Child], BaseProcess]
"""Starts a child's process; may block for seconds."""


def started(method: str, target: Callable[..., None], arguments: tuple[Any, ...], name: str) -> BaseProcess:
    """Start a process (`method`: ``spawn`` or ``forkserver``) with the parent's signals blocked. Runs on any thread."""
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=target, args=arguments, name=f"dualpath-{name}", daemon=True)
    with _ENVIRONMENT:
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        resource_tracker.ensure_running()  # it is started first, because it unblocks signals
        former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_THE_PARENT)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
            del os.environ[PARENT_VARIABLE]
    return process  # type: ignore[no-any-return]


def start(child: Child, how: Start) -> "Future[None]":
    """Start a child on a thread that lives as long as this process."""

    def work() -> None:
        try:
            child.process = how(child)
        finally:
            child.telling.close()

    return _STARTERS.submit(work)


def seconds_ready(child: Child) -> float:
    """Returns for how long it has been ready; 0 when it never was."""
    return 0.0 if child.ready_s is None else time.monotonic() - child.ready_s
