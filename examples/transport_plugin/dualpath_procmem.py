"""``--transport procmem``: engines of one host read and write each other's memory through ``/proc/PID/mem``.

An example of somebody else's transport, and a small model of RDMA: truly one-sided. The server has no thread and no
socket; its address says where its pool lies in its memory, and the kernel copies while the server's process does
something else. It needs Linux and the right to trace processes of the same user (`connect` says so where it is denied).

It makes no use of the cluster's `key`: what keeps others out is the kernel's own rule that only the same user's
processes (and root's) may trace one. Any process of this user can read and write the pool.

A server can't see who is copying, so quiet is proven by locks. Each channel has a file in the server's directory and
holds a shared lock on it while it moves an operation. To disconnect it the server removes the file, which the channel
looks at before every chunk, and waits for the exclusive lock. The kernel drops the locks of the dead.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import msgspec
import numpy as np

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.pool import BufferPool, Bytes
from dualpath.transfer.traffic import DeadlineExceeded, Lane, TrafficManager
from dualpath.transfer.transport import ChannelBusy, PageRange, TransferCause, TransferError, check_operation

PREFIX = "dualpath-procmem-"
ALIVE = "alive"
CLOSE_GRACE_S = 2.0
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)
_not_quiet: list[Bytes] = []
"""Pools that a peer may still write into: kept mapped until this process ends."""


class Address(msgspec.Struct, frozen=True):
    """Where a pool lies in a process; `token` lies at `token_at`, so that no other process is taken for it."""

    procmem: Path
    pid: int
    token: str
    token_at: int
    memory_at: int
    stride_bytes: int
    page_bytes: int
    pages: int


class Channel:
    """One thread per operation in flight, each asleep in its lane or in a copy."""

    def __init__(self, to: Address, traffic: TrafficManager, traffic_class: TrafficClass, tag: str, ops: int) -> None:
        self._memory = os.open(f"/proc/{to.pid}/mem", os.O_RDWR)  # stays this process's, whoever gets its pid later
        self._lease = to.procmem / f"{quote(tag, safe='')}@{uuid.uuid4().hex}"
        try:
            if os.pread(self._memory, 16, to.token_at).hex() != to.token:
                raise ProcessLookupError("another one has its pid now")
            self._lease.touch(0o600)
        except OSError:
            os.close(self._memory)
            raise
        self._to, self._traffic, self._class, self._max_ops = to, traffic, traffic_class, ops
        self._threads = ThreadPoolExecutor(ops, "procmem")
        self._lock = threading.Lock()
        self._in_flight = 0
        self._closed = False

    @property
    def is_open(self) -> bool:
        return not self._closed and self._lease.exists()

    def read(self, remote: Sequence[PageRange], local: Sequence[Bytes], deadline_ns: int) -> "Future[int]":
        return self._post(remote, local, deadline_ns, writes_local=True)

    def write(self, remote: Sequence[PageRange], local: Sequence[Bytes], deadline_ns: int) -> "Future[int]":
        return self._post(remote, local, deadline_ns, writes_local=False)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._threads.shutdown()
        with self._lock:
            if self._memory >= 0:
                os.close(self._memory)
                self._lease.unlink(missing_ok=True)
            self._memory = -1

    def _post(
        self, remote: Sequence[PageRange], local: Sequence[Bytes], deadline_ns: int, writes_local: bool
    ) -> "Future[int]":
        future: Future[int] = Future()
        future.set_running_or_notify_cancel()
        try:
            check_operation(remote, local, self._to.page_bytes, self._to.pages, writes_local)
            with self._lock:
                if self._closed:
                    raise TransferError(TransferCause.PEER_CLOSED, "the channel was closed on this side")
                if self._in_flight >= self._max_ops:
                    raise ChannelBusy(f"{self._in_flight} operations in flight is the channel's bound; wait for one")
                self._in_flight += 1
                self._threads.submit(self._run, future, remote, local, deadline_ns, writes_local)
        except TransferError as error:
            future.set_exception(error)
        return future

    def _run(
        self,
        future: "Future[int]",
        remote: Sequence[PageRange],
        local: Sequence[Bytes],
        deadline_ns: int,
        writes_local: bool,
    ) -> None:
        error: TransferError | None = None
        try:
            with self._leased() as lease:
                for one, array in zip(remote, local, strict=True):
                    self._move(one, array, deadline_ns, writes_local, lease)
        except DeadlineExceeded as late:
            error = TransferError(TransferCause.DEADLINE, str(late))
        except OSError as broken:  # also of a lease that is gone
            error = TransferError(TransferCause.PEER_CLOSED, f"process {self._to.pid}: {broken}")
        with self._lock:
            self._in_flight -= 1
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(sum(map(len, local)))

    @contextlib.contextmanager
    def _leased(self) -> Iterator[int]:
        lease = os.open(self._lease, os.O_RDWR)
        try:
            fcntl.flock(lease, fcntl.LOCK_SH)
            yield lease
        finally:
            os.close(lease)

    def _move(self, one: PageRange, array: Bytes, deadline_ns: int, writes_local: bool, lease: int) -> None:
        lane: Lane = self._traffic.cnic.rx if writes_local else self._traffic.cnic.tx
        copy = os.preadv if writes_local else os.pwritev
        remote_at = self._to.memory_at + one.page * self._to.stride_bytes + one.offset
        moved_bytes = 0
        while moved_bytes < one.n_bytes:
            chunk = array[moved_bytes : moved_bytes + lane.chunk_bytes]
            lane.acquire(self._class, len(chunk), deadline_ns)
            if self._traffic.clock() >= deadline_ns:  # a lane without a rate does not look
                raise DeadlineExceeded(f"{moved_bytes} of a range's {one.n_bytes} bytes moved by the deadline")
            if self._closed or os.fstat(lease).st_nlink == 0:
                raise ConnectionAbortedError("the channel was closed")
            n_bytes = copy(self._memory, [chunk.data], remote_at + moved_bytes)
            if n_bytes == 0:
                raise ConnectionResetError("the process has ended")
            moved_bytes += n_bytes


class Server:
    """A directory with a lock that says that we live, and the channels' files."""

    refused_connections = 0
    """The kernel refuses, and tells nobody."""

    def __init__(self, pool: BufferPool, name: str) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)  # where Yama would let only our parents trace us
        self._home = Path(tempfile.gettempdir()) / f"{PREFIX}{os.getpid()}-{name}"
        self._home.mkdir(0o700)
        self._alive = os.open(self._home / "starting", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        (self._home / "starting").rename(self._home / ALIVE)  # never there without the lock
        self._closed = threading.Event()
        self._memory = pool.view(0)
        token = uuid.uuid4().bytes
        self._token = np.frombuffer(token, np.uint8)
        where = (self._token.ctypes.data, self._memory.ctypes.data)
        shape = (pool.stride_bytes, pool.page_bytes, pool.pages)
        address = Address(self._home, os.getpid(), token.hex(), *where, *shape)
        self.address = msgspec.json.encode(address, enc_hook=str).decode()

    def quiesce(self, peer_tag: str) -> "Future[None]":
        return self._disconnect(f"{quote(peer_tag, safe='')}@*")

    def close(self) -> None:
        if self._closed.is_set():
            return
        try:
            self._disconnect("*@*").result(CLOSE_GRACE_S)
        except TimeoutError:
            _not_quiet.append(self._memory)
        self._closed.set()
        shutil.rmtree(self._home, ignore_errors=True)
        os.close(self._alive)

    def _disconnect(self, leases: str) -> "Future[None]":
        held: list[int] = []
        for lease in self._home.glob(leases):
            with contextlib.suppress(FileNotFoundError):  # its channel was closed meanwhile
                held.append(os.open(lease, os.O_RDWR))
                lease.unlink()
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        threading.Thread(target=self._wait_quiet, args=(held, future), name="procmem quiesce", daemon=True).start()
        return future

    def _wait_quiet(self, held: list[int], future: "Future[None]") -> None:
        for lease in held:
            while not _locks(lease):
                if self._closed.wait(0.005):
                    future.set_exception(TransferError(TransferCause.PEER_CLOSED, "the server closed before"))
                    return
            os.close(lease)
        future.set_result(None)


class ProcessMemoryTransport:
    """`dualpath.transfer.transport.Transport`."""

    def serve(self, pool: BufferPool, traffic: TrafficManager, *, host: str, name: str, key: bytes) -> Server:  # noqa: ARG002
        return Server(pool, name)

    def connect(
        self,
        address: str,
        traffic: TrafficManager,
        *,
        traffic_class: TrafficClass,
        peer_tag: str,
        key: bytes,  # noqa: ARG002
        max_ops_in_flight: int = 64,
        timeout_s: float = 5.0,  # noqa: ARG002  nothing here waits
    ) -> Channel:
        if max_ops_in_flight < 1:
            raise ValueError(f"max_ops_in_flight is {max_ops_in_flight}; it must be at least 1")
        try:
            to = msgspec.json.decode(address, type=Address, dec_hook=lambda kind, text: kind(text))
        except msgspec.DecodeError as error:
            raise ValueError(f"{address!r} is not an address of transport procmem: {error}") from error
        try:
            return Channel(to, traffic, traffic_class, peer_tag, max_ops_in_flight)
        except PermissionError as error:
            hint = "this user may not trace its processes; see /proc/sys/kernel/yama/ptrace_scope"
            raise TransferError(TransferCause.PEER_CLOSED, f"cannot connect to process {to.pid}: {hint}") from error
        except OSError as error:
            raise TransferError(TransferCause.PEER_CLOSED, f"cannot connect to process {to.pid}: {error}") from error

    def sweep(self) -> list[str]:
        removed = []
        for home in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError), open(home / ALIVE) as alive:  # removed meanwhile, or another user's
                if _locks(alive.fileno()):
                    shutil.rmtree(home)
                    removed.append(str(home))
        return removed


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


TRANSPORT = ProcessMemoryTransport()
