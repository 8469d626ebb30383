"""The small parts: configuration, causes, links, a live request, socket files, supervision."""

import asyncio

import pytest

from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.driver import UNLIMITED_BYTES_PER_S, scheduler_constants, scheduler_limits
from dualpath.cluster.coordinator.links import EngineLinks
from dualpath.cluster.coordinator.live_request import LiveRequest
from dualpath.cluster.coordinator.refusals import request_error
from dualpath.cluster.generator import GenerateRequest, RequestError
from dualpath.cluster.messages import Draw, Shutdown
from dualpath.core.vocabulary import Cause, Role
from dualpath.kv.keys import namespace
from dualpath.spec.sampling import SamplingParams

from .fake_engine import LAYOUT, join_message


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [({"system": "fast"}, "unknown system"), ({"transport": "rdma"}, "unknown transport"), ({"device_layers": 2}, "3")],
)
def test_settings_that_cannot_be(setting: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ClusterConfig(model="m", store="s", **setting)  # type: ignore[arg-type]


def test_rates_are_lifted_where_io_is_free() -> None:
    rates = {"snic_bytes_per_s": 1000, "cnic_bytes_per_s": 2000}
    bound = ClusterConfig(model="m", store="s", system="dualpath", **rates)  # type: ignore[arg-type]
    free = ClusterConfig(model="m", store="s", system="oracle", **rates)  # type: ignore[arg-type]
    assert (bound.snic_rate, bound.cnic_rate) == (1000, 2000)
    assert (free.snic_rate, free.cnic_rate) == (None, None)
    token_bytes = LAYOUT.kv_bytes.bytes_per_token
    assert scheduler_constants(bound, LAYOUT, 100.0).alpha_tokens == round(3 * 1000 / token_bytes)
    assert scheduler_constants(free, LAYOUT, 100.0).alpha_tokens == round(3 * UNLIMITED_BYTES_PER_S / token_bytes)
    assert scheduler_constants(free, LAYOUT, 100.0).beta_tokens == 500
    assert scheduler_limits(bound).release_ns == 2 * bound.lease_ns


def test_settings_for_engines_have_no_keys() -> None:
    config = ClusterConfig(model="m", store="s", api_keys=("secret",), max_waiting=9)
    assert config.without_api_keys() == ClusterConfig(model="m", store="s", max_waiting=9)
    known = ClusterConfig(model="m", store="s", max_waiting=9, cluster_secret=ClusterSecret.random())
    assert known.without_secrets() == config.without_api_keys()


def test_every_cause_has_an_answer() -> None:
    asked = GenerateRequest(prompt_token_ids=[1] * 10, sampling=SamplingParams(max_tokens=3))
    errors = {cause: request_error(cause, asked, 99) for cause in Cause}
    status = {cause: error.status for cause, error in errors.items()}
    assert status.pop(Cause.OVERLOADED) == 429
    assert status.pop(Cause.TOO_LARGE) == 400
    assert status.pop(Cause.TIMEOUT) == 504
    assert set(status.values()) == {503}
    assert errors[Cause.LOAD_FAILED].code == "load_failed"
    assert all(error.retry_after_s for cause, error in errors.items() if cause is not Cause.TOO_LARGE)
    too_large = errors[Cause.TOO_LARGE]
    assert too_large.code == "context_length_exceeded"
    assert "This model's maximum context length is 99 tokens. However, you requested 13 tokens (10 in" in str(too_large)


def live_request(**sampling: object) -> LiveRequest:
    params = SamplingParams(**({"max_tokens": 3, "stop_token_ids": (5,)} | sampling))  # type: ignore[arg-type]
    asked = GenerateRequest(prompt_token_ids=[1, 2], sampling=params)
    live = LiveRequest(asked, arrived_ns=0)
    live.enter(4, namespace("m", "", LAYOUT))
    return live


def test_a_live_request_knows_why_it_ended() -> None:
    async def run() -> None:
        live = live_request(min_tokens=1)
        live.begin(0, [1, 2], [], 0)
        assert live.reason is None
        live.emit(Draw(5))
        assert live.reason is None  # within min_tokens
        live.emit(Draw(5))
        assert live.reason == "stop"
        live = live_request()
        live.begin(0, [1, 2], [], 0)
        for token in (1, 2, 3):
            live.emit(Draw(token, [(token, -0.5), (9, -1.0)]))
        assert live.reason == "length"
        first = live.events.get_nowait()
        assert [(entry.token_id, entry.logprob) for entry in first.logprobs[0]] == [(1, -0.5), (9, -1.0)]  # type: ignore
        live.end(RequestError(503, "x", "y"))
        assert not live.is_current(0)

    asyncio.run(run())


def test_a_second_attempt_asks_for_what_is_left() -> None:
    async def run() -> None:
        live = live_request()
        live.begin(0, [1, 2], [], 0)
        live.emit(Draw(7))
        facts = live.begin(1, [1, 2, 7], [], 0)
        assert (facts.prompt_tokens, facts.max_new_tokens, facts.attempt) == (3, 2, 1)
        assert live.generated_before == 1
        assert live.is_current(1)
        assert not live.is_current(0)

    asyncio.run(run())


def test_links_count_what_cannot_be_delivered_and_name_a_bad_address() -> None:
    async def run() -> None:
        links = EngineLinks(ClusterSecret.random())
        with pytest.raises(OSError, match="can't listen for engines at 'nonsense'"):
            links.bind("nonsense")
        assert links.bind("tcp://127.0.0.1:0").startswith("tcp://127.0.0.1:")
        link = links.expect(b"gone", join_message(Role.DECODE))
        assert links.by_engine == {}
        engine = links.admit(link)
        links.send(engine, Shutdown("x"))
        links.send(99, Shutdown("no such engine"))
        await asyncio.sleep(0.01)
        assert links.unroutable_messages == 1
        links.forget(link)
        links.forget(link)
        assert links.link_of(b"gone") is None
        links.close()

    asyncio.run(run())


def test_extended_leases_never_reach_into_the_future() -> None:
    """An engine heard just now is not owed the time of a hold-up before."""
    import time

    async def run() -> None:
        links = EngineLinks(ClusterSecret.random())
        link = links.expect(b"one", join_message(Role.DECODE))
        links.extend_leases(60_000_000_000)
        assert link.last_heard_ns <= time.monotonic_ns()
        links.close()

    asyncio.run(run())


def test_transports_are_found_by_name() -> None:
    for name, complaint in (
        ("rdma", r"unknown transport 'rdma'; choose from shm, tcp"),
        ("no_such_package:IT", r"transport 'no_such_package:IT' .*can't be loaded: ModuleNotFoundError: No module"),
        ("dualpath.transfer:TRANSPORTS", "is no transport: it has no serve and no connect and no sweep"),
        ("dualpath.transfer.transports.tcp:TcpTransport", "is a class; name an object of it"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ClusterConfig(model="m", store="s", transport=name)
