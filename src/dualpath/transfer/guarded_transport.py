"""`GuardedTransport`: a transport whose every failure is one that its contract names, whatever its code does.

A transport may be another package's. An exception that `transport.py` does not name, a panic of native code among them,
and a result that is no `Server`, `Channel` or Future, are mistakes in it. Each becomes an error of the contract, one
line that names the transport and the method. Reads and writes do not pass through here. Deadlines are the caller's.
"""

import logging
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dualpath.core.vocabulary import TrafficClass
from dualpath.spec.bounds import MAX_ADDRESS_CHARS
from dualpath.spec.log import ROOT
from dualpath.spec.registry import misfit
from dualpath.transfer import GUIDE, TRANSPORTS
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import Channel, Server, TransferCause, TransferError, Transport

logger = logging.getLogger(f"{ROOT}.transport")

T = TypeVar("T")


class TransportMistake(ValueError):  # noqa: N818 (it is the transport's, not the caller's)
    """A transport does what its contract rules out. The message is one line."""


class _WrongResultError(Exception):
    """A method gave what is not of the protocol."""


class GuardedTransport:
    """Implements `Transport`. `name` is that of --transport."""

    def __init__(self, name: str, genuine: Transport | None = None) -> None:
        """Raises UnknownNameError when there is no transport of that name."""
        self._name = name
        self._genuine = TRANSPORTS.get(name) if genuine is None else genuine

    def serve(self, pool: BufferPool, traffic: TrafficManager, *, host: str, name: str, key: bytes) -> Server:
        """Raises ValueError or OSError; TransportMistake is one."""
        with self._only("serve", ValueError, OSError):
            server = self._genuine.serve(pool, traffic, host=host, name=name, key=key)
            _check(server, Server)
            return _GuardedServer(self, server)

    def connect(
        self,
        address: str,
        traffic: TrafficManager,
        *,
        traffic_class: TrafficClass,
        peer_tag: str,
        key: bytes,
        max_ops_in_flight: int = 64,
        timeout_s: float = 5.0,
    ) -> Channel:
        """Raises ValueError or TransferError."""
        try:
            with self._only("connect", ValueError, TransferError):
                channel = self._genuine.connect(
                    address,
                    traffic,
                    traffic_class=traffic_class,
                    peer_tag=peer_tag,
                    key=key,
                    max_ops_in_flight=max_ops_in_flight,
                    timeout_s=timeout_s,
                )
                _check(channel, Channel)
                return channel
        except TransportMistake as mistake:
            raise TransferError(TransferCause.PROTOCOL, str(mistake)) from mistake

    def sweep(self) -> list[str]:
        """Raises OSError or TransportMistake."""
        with self._only("sweep", OSError):
            return list(self._genuine.sweep())

    def complaint(self, method: str, what: str) -> str:
        """Returns one line: which transport's method does what, and where to read about it."""
        return " ".join(f"transport {self._name!r}: its {method} {what}; see {GUIDE}".split())

    @contextmanager
    def _only(self, method: str, *known: type[Exception]) -> Iterator[None]:
        try:
            yield
        except known:
            raise
        except BaseException as error:  # native code's panics are no Exception; no signal arrives on these threads
            raise TransportMistake(self.complaint(method, _said(error))) from error


class _GuardedServer:
    """Implements `Server`. What goes wrong here is logged, and costs no more than the contract lets it."""

    def __init__(self, transport: GuardedTransport, genuine: Server) -> None:
        self.address = genuine.address
        if not isinstance(self.address, str):
            raise _WrongResultError(f"a server whose address is {_kind(self.address)}, not a str")
        if len(self.address) > MAX_ADDRESS_CHARS:
            raise _WrongResultError(
                f"a server whose address has {len(self.address)} characters; at most {MAX_ADDRESS_CHARS} are sent"
            )
        self._transport = transport
        self._genuine = genuine
        self._told: set[str] = set()

    @property
    def refused_connections(self) -> int:
        """0 when the server does not say."""
        return self._ask("refused_connections", lambda: min(max(int(self._genuine.refused_connections), 0), 1 << 53), 0)

    def quiesce(self, peer_tag: str) -> "Future[None]":
        """Without proof, and a mistake is none, the future stays open: pages stay in quarantine."""
        proof: Future[None] = Future()
        proof.set_running_or_notify_cancel()

        def on_end(ended: "Future[None]") -> None:
            error = CancelledError() if ended.cancelled() else ended.exception()
            if error is None:
                proof.set_result(None)
            elif isinstance(error, TransferError):
                proof.set_exception(error)
            else:
                self._tell("quiesce", f"ended without proof: {error!r}")

        self._ask("quiesce", lambda: _future(self._genuine.quiesce(peer_tag)).add_done_callback(on_end), None)
        return proof

    def close(self) -> None:
        self._ask("close", self._genuine.close, None)

    def _ask(self, method: str, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except BaseException as error:  # as in `_only`
            self._tell(method, _said(error))
            return otherwise

    def _tell(self, method: str, what: str) -> None:
        if method not in self._told:  # a beat asks every second
            self._told.add(method)
            logger.error("%s", self._transport.complaint(f"server's {method}", what))


def _future(result: object) -> "Future[None]":
    if not isinstance(result, Future):
        raise _WrongResultError(f"{_kind(result)}, which is no concurrent.futures.Future")
    return result


def _check(result: object, protocol: type) -> None:
    if fault := misfit(result, protocol):
        raise _WrongResultError(f"{_kind(result)}, which is no {protocol.__name__}: it {fault}")


def _kind(result: object) -> str:
    return "None" if result is None else f"a {type(result).__name__}"


def _said(error: BaseException) -> str:
    """Returns what a method did, and if it raised, where."""
    if isinstance(error, _WrongResultError):
        return f"returned {error}"
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if at.filename == __file__ else f" ({Path(at.filename).name}:{at.lineno})"
    return f"raised {type(error).__name__}: {error}{where}"
