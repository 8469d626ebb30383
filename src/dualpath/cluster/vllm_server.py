"""A vLLM server as a part of a supervisor's table: a process of ours that starts it, listens to it and ends it.

vLLM's processes start others, which outlive it when it is killed. So this process leads a session of its own, in which
all of them are, and ends them all before itself: when the server ends, and when it is told to leave (`LEAVE`, which it
also gets when the supervisor dies). When this process is killed, the server dies with it, and the supervisor ends the
session (`children.Child`).
"""

import contextlib
import http.client
import logging
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import msgspec

from dualpath.cluster.attachment import LEAVE
from dualpath.cluster.children import SIGNALS_OF_THE_PARENT, end_with_parent
from dualpath.cluster.parts import CAN_NOT_RUN
from dualpath.cluster.sessions import end_session
from dualpath.cluster.vllm_log import reason_in, step_of, without_agent
from dualpath.spec.log import ROOT, start_log
from dualpath.spec.private_files import private_opener

logger = logging.getLogger(f"{ROOT}.vllm")

SERVES = "joins"
"""The step at which HTTP answers; the connector attaches by itself (`node.JOINS`)."""
LEAVE_S = 2.0
"""How long vLLM has to end by itself: less than a supervisor waits."""
LOOK_S = 0.5
LOG_BYTES = 64 << 20
"""A log of this size becomes the former one (``.1``), which is replaced."""
_TAIL_LINES = 400
_SHOWN_LINES = 20
_LONGEST_LINE = 8192
_TAKEN = "address already in use"


class VllmServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that a server's process starts with."""

    name: str
    command: list[str]
    environment: dict[str, str]
    """Set beside what is inherited."""
    host: str
    port: int
    log: str
    """The file that its output is appended to."""
    log_format: str = "text"


class _LeaveError(Exception):
    """Told to leave."""


def run_vllm(config: VllmServerConfig, tell: Callable[[str], None]) -> None:
    """Run a server until it ends or LEAVE comes. Exits with code 1 when it has ended by itself, and tells why."""
    start_log(config.log_format)
    server = _Server(config, tell)
    try:
        signal.signal(LEAVE, _leave)
        why = server.run()
    except _LeaveError:
        signal.signal(LEAVE, signal.SIG_IGN)
        server.leave()
        return
    finally:
        end_session(os.getpid())
    logger.warning("the end of %s:\n%s", config.log, server.shown())
    tell(f"{why}; its log: {config.log}")
    raise SystemExit(1)


def _as_a_child_of(parent: int) -> None:
    """In the new process, before it becomes vLLM: what this one ignores would stay ignored."""
    for number in SIGNALS_OF_THE_PARENT:
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(parent)


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise _LeaveError


class _Server:
    def __init__(self, config: VllmServerConfig, tell: Callable[[str], None]) -> None:
        self._config = config
        self._tell = tell
        self._process: subprocess.Popen[bytes] | None = None
        self._log = _open(config.log)
        self._partial = b""
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._serves = False
        self._refused = ""
        """Why the agent will not have it."""

    def run(self) -> str:
        """Returns why it has ended."""
        config, parent = self._config, os.getpid()
        self._say("imports vLLM")
        try:
            self._process = process = subprocess.Popen(
                config.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | config.environment,
                preexec_fn=lambda: _as_a_child_of(parent),
            )
        except OSError as error:
            return f"{CAN_NOT_RUN}{config.command[0]} can't be started: {error.strerror}"
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while process.poll() is None and not self._refused:
                if selector.select(LOOK_S) and not self._read(process.stdout.fileno()):
                    time.sleep(LOOK_S)  # it has closed its output, which stays readable
                self._look_whether_it_serves()
        self._read(process.stdout.fileno())
        return f"{CAN_NOT_RUN}{self._refused}" if self._refused else self._why(process.returncode)

    def leave(self) -> None:
        """Have it end; what does not end in time is killed with the session."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LEAVE_S)

    def shown(self) -> str:
        return "\n".join(list(self._tail)[-_SHOWN_LINES:])

    def _say(self, step: str) -> None:
        self._tell(step)

    def _read(self, descriptor: int) -> bool:
        """Take what it has written. Returns False at the end."""
        while True:
            try:
                got = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                return True
            if not got:
                return False
            self._log.write(got)
            self._log.flush()
            if self._log.tell() > LOG_BYTES:
                self._log.close()
                Path(self._config.log).replace(f"{self._config.log}.1")
                self._log = _open(self._config.log)
            *lines, self._partial = (self._partial + got).split(b"\n")
            self._partial = self._partial[-_LONGEST_LINE:]
            for line in lines:
                self._hear(line[:_LONGEST_LINE].decode(errors="replace"))

    def _hear(self, line: str) -> None:
        self._tail.append(line)
        step = None if self._serves else step_of(line)
        if step is not None:
            self._say(step)
        alone = without_agent(line)
        if alone is not None:
            why, for_good = alone
            self._say(f"has no agent: {why}")
            self._refused = why if for_good else ""

    def _look_whether_it_serves(self) -> None:
        if self._serves:
            return
        connection = http.client.HTTPConnection(self._config.host, self._config.port, timeout=LOOK_S)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                self._serves = True
                self._say(SERVES)

    def _why(self, code: int) -> str:
        """One that ends by itself before it serves would do so again, unless another program was faster at its port."""
        if code < 0:
            hint = ", as the system does when memory is short" if code == -signal.SIGKILL else ""
            return f"vLLM was ended by signal {signal.Signals(-code).name}{hint}"
        reason = reason_in(self._tail) or f"it ended with exit code {code}"
        again = self._serves or _TAKEN in reason.lower()
        return f"vLLM has ended: {reason}" if again else f"{CAN_NOT_RUN}vLLM: {reason}"


def _open(path: str) -> BinaryIO:
    return open(path, "ab", opener=private_opener)
