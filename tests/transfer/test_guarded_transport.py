"""Whatever a transport's code does, callers get what the contract names: one line with the transport and the method."""

import logging
import re
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.guarded_transport import GuardedTransport, TransportMistake
from dualpath.transfer.transport import TransferCause, TransferError

TRANSPORT_NAMES = ("shm", "tcp")
GUIDE = "; see docs/how-to/add-a-transport.md"


class Panic(BaseException):
    """As pyo3's, of native code."""


def server(**facts):
    sound = {"address": "odd:1", "refused_connections": 3, "quiesce": lambda peer_tag: Future(), "close": lambda: None}
    return SimpleNamespace(**(sound | facts))


def odd(act):
    """A transport whose every call does `act`."""
    genuine = SimpleNamespace(serve=lambda *_, **__: act(), connect=lambda *_, **__: act(), sweep=act)
    return GuardedTransport("odd", genuine)


def raising(error):
    def act(*_):
        raise error

    return act


def serve(transport):
    return transport.serve(None, None, host="", name="", key=b"")


def connect(transport):
    return transport.connect("odd:1", None, traffic_class=TrafficClass.LOW, peer_tag="", key=b"")


@pytest.mark.parametrize("error", [RuntimeError("my fabric\nis down"), TypeError("x"), Panic("odd"), SystemExit(3)])
def test_an_exception_beyond_the_contract_names_transport_method_and_place(error) -> None:
    what = " ".join(f"raised {type(error).__name__}: {error}".split())
    where = r" \(test_guarded_transport.py:\d+\)"
    for method, call in (("serve", serve), ("sweep", GuardedTransport.sweep)):
        line = re.escape(f"transport 'odd': its {method} {what}") + where + re.escape(GUIDE)
        with pytest.raises(TransportMistake, match=f"^{line}$") as told:
            call(odd(raising(error)))
        assert told.value.__cause__ is error
    with pytest.raises(TransferError, match=re.escape(f"protocol: transport 'odd': its connect {what}")) as failed:
        connect(odd(raising(error)))
    assert failed.value.cause is TransferCause.PROTOCOL


def test_what_the_contract_names_is_passed_on() -> None:
    cases = [
        (serve, ValueError("no host")),
        (serve, OSError(98, "in use")),
        (connect, ValueError("'x' is not an address of transport odd")),
        (connect, TransferError(TransferCause.PEER_CLOSED, "nobody answers")),
        (GuardedTransport.sweep, OSError(13, "no permission")),
    ]
    for call, error in cases:
        with pytest.raises(type(error)) as told:
            call(odd(raising(error)))
        assert told.value is error


@pytest.mark.parametrize(
    ("result", "complaint"),
    [
        (None, "returned None, which is no Server: it has no address and no refused_connections and no quiesce"),
        (SimpleNamespace(**(vars(server()) | {"close": 1})), "which is no Server: it has no close"),
        (server(quiesce=lambda: None), r"no Server: it can't be called as quiesce\(peer_tag\): too many positional"),
        (server(address=12345), "returned a server whose address is a int, not a str"),
        (server(address=None), "returned a server whose address is None, not a str"),
        (server(address="x" * 2_000_000), "returned a server whose address has 2000000 characters; at most 65536"),
    ],
)
def test_what_is_no_server_is_refused(result, complaint: str) -> None:
    with pytest.raises(TransportMistake, match=f"^transport 'odd': its serve .*{complaint}.*{GUIDE}$") as told:
        serve(odd(lambda: result))
    assert len(str(told.value)) < 400


def test_a_server_that_does_not_count_refusals_is_refused() -> None:
    without = vars(server())
    del without["refused_connections"]
    with pytest.raises(TransportMistake, match="no Server: it has no refused_connections;"):
        serve(odd(lambda: SimpleNamespace(**without)))


@pytest.mark.parametrize("result", [None, server()])
def test_what_is_no_channel_fails_the_connection(result) -> None:
    with pytest.raises(TransferError, match=r"its connect returned .*, which is no Channel: it has no is_open and no"):
        connect(odd(lambda: result))


def test_a_sweep_that_gives_no_list() -> None:
    with pytest.raises(TransportMistake, match="its sweep raised TypeError: 'NoneType' object is not iterable;"):
        odd(lambda: None).sweep()


def test_a_servers_mistakes_are_logged_once_and_are_no_proof_of_quiet(caplog: pytest.LogCaptureFixture) -> None:
    broken = server(refused_connections="many", quiesce=raising(KeyError("pe0")), close=raising(RuntimeError("no")))
    guarded = serve(odd(lambda: broken))
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            assert guarded.refused_connections == 0
            assert not guarded.quiesce("pe0").done(), "pages stay in quarantine"
            guarded.close()
    starts = [message.partition(" raised")[0] for message in caplog.messages]
    assert starts == [f"transport 'odd': its server's {what}" for what in ("refused_connections", "quiesce", "close")]


def test_a_quiesce_that_gives_no_future_proves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    guarded = serve(odd(lambda: server(quiesce=lambda peer_tag: None)))
    assert not guarded.quiesce("pe0").done()
    assert "its server's quiesce returned None, which is no concurrent.futures.Future" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("no"), Panic("no"), None])
def test_a_quiesce_that_ends_otherwise_proves_nothing(error, caplog: pytest.LogCaptureFixture) -> None:
    ends: Future[None] = Future()
    quiet = serve(odd(lambda: server(quiesce=lambda peer_tag: ends))).quiesce("pe0")
    if error is None:
        ends.cancel()
    else:
        ends.set_exception(error)
    assert not quiet.done()
    assert "its server's quiesce ended without proof" in caplog.text


def test_a_server_that_closes_before_the_proof_says_so() -> None:
    ends: Future[None] = Future()
    quiet = serve(odd(lambda: server(quiesce=lambda peer_tag: ends))).quiesce("pe0")
    ends.set_exception(TransferError(TransferCause.PEER_CLOSED, "closed"))
    assert isinstance(quiet.exception(), TransferError)


@pytest.mark.parametrize("act", [raising(Panic("no")), lambda: 10**400])
def test_no_number_and_no_panic_of_a_server_ends_a_beat(act) -> None:
    class Odd:
        address, quiesce, close = "odd:1", staticmethod(lambda peer_tag: Future()), staticmethod(lambda: None)
        broken = False

        @property
        def refused_connections(self) -> int:
            return act() if self.broken else 0

    genuine = Odd()
    guarded = serve(odd(lambda: genuine))
    genuine.broken = True
    assert 0.0 <= float(guarded.refused_connections) < 1e16


def test_a_sound_one_is_as_it_was(pair) -> None:
    """Ours pass through it, too, and their channels are their own."""
    genuine, pair.transport = pair.transport, GuardedTransport(pair.kind)
    pair.serve()
    channel = pair.connect()
    assert type(channel) is genuine.channel, "reads and writes do not pass through the guard"
    pair.server.quiesce("pe0").result(30)
    assert pair.server.refused_connections == 0
    swept = pair.transport.sweep()  # others' leftovers, if any
    assert not any(pair.server.address.endswith(path) for path in swept)


class Wrong:
    """Its `serve` takes no `host`."""

    def serve(self, pool, traffic) -> None: ...
    def connect(self, *args, **named) -> None: ...
    def sweep(self) -> None: ...


WRONG = Wrong()


def test_a_method_that_does_not_take_its_arguments_is_refused_by_name() -> None:
    asked = r"can't be called as serve\(pool, traffic, \*, host, name, key\): got an unexpected keyword argument 'host'"
    with pytest.raises(ValueError, match=f"{__name__}:WRONG is no transport: it {asked}{GUIDE}"):
        TRANSPORTS.get(f"{__name__}:WRONG")
