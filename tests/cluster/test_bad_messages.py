"""Whatever a member sends that is wrong is counted and refused, at both ends, and harms nobody."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.cluster import messages as m
from dualpath.core.vocabulary import Cause, Role, Side
from dualpath.server.metrics import ServerMetrics
from dualpath.spec import metrics
from dualpath.spec.metrics import of_engine
from dualpath.spec.topology import Topology

from .fake_engine import FakeEngine, head, join_message
from .test_request_life import PROMPT, Pair, with_pair

KEY = bytes(16)


def packed(kind: str, **fields: object) -> bytes:
    return msgspec.msgpack.encode({"type": kind} | fields)


def nested(levels: int) -> bytes:
    return b"\x82\xa4type\xa9Heartbeat\xa4more" + b"\x91" * levels + b"\xc0"


def bad_messages() -> Iterator[tuple[str, bytes]]:
    block = {"root": KEY, "key": KEY, "parent": KEY, "physical_bytes": 1}
    gauges = {"type": "Heartbeat", "gauges": {}}
    yield "not msgpack", b"\xff not msgpack"
    yield "nothing", b""
    yield "not UTF-8", b"\x81\xa4type\xa9\xed\xa0\x80artbeat"
    yield "not UTF-8 in a key", b"\x82\xa4type\xa9Heartbeat\xa6gauges\x81\xa3\xed\xa0\x80\x01"
    yield "nested", nested(100_000)
    yield "of no kind", packed("Nonsense")
    yield "the other side's", m.encoder.encode(m.Shutdown("go"))
    yield "a key too short", packed("Stored", blocks=[block | {"key": b"five!"}])
    yield "a root too short", packed("Stored", blocks=[block | {"root": b"five!"}])
    yield "a parent too long", packed("Stored", blocks=[block | {"parent": bytes(17)}])
    yield "fewer bytes than none", packed("Stored", blocks=[block | {"physical_bytes": -1}])
    yield "a fault's key", packed("LoadFailed", request=0, attempt=0, side="pe", faults=[{"key": b"", "fault": "x"}])
    yield "a negative page", packed("Prepared", request=0, attempt=0, pages=[-1])
    yield "a negative request", packed("Finished", request=-1, attempt=0, finish_reason="stop")
    yield "a token below none", packed("PrefillDone", request=0, attempt=0, draw={"token_id": -1})
    yield "a log line", packed("LoadFailed", request=0, attempt=0, side="pe", faults=[{"key": KEY, "fault": "a\nb"}])
    for value in (math.nan, math.inf, -math.inf, 1e300, "3", None):
        yield f"a gauge of {value}", msgspec.msgpack.encode(gauges | {"gauges": {"dualpath_engine_attempts": value}})
    for name in ("a\n", "a" * 600, "\u00e9", "dualpath_engine_attempts\n# HELP"):
        yield f"a gauge called {name[:9]!r}", msgspec.msgpack.encode(gauges | {"gauges": {name: 1.0}})
    yield "too many gauges", msgspec.msgpack.encode(gauges | {"gauges": {str(n): 1.0 for n in range(5_000)}})


@pytest.mark.parametrize(
    ("what", "said"), list(bad_messages()), ids=lambda given: given if isinstance(given, str) else ""
)
def test_no_bytes_raise_anything_else(what: str, said: bytes) -> None:
    with pytest.raises(m.BadMessageError):
        m.from_engine([said])
    if what != "the other side's":
        with pytest.raises(m.BadMessageError):
            m.to_engine([said])


@settings(deadline=None)
@given(frames=st.lists(st.binary(max_size=200), max_size=4))
def test_random_frames_are_no_messages(frames: list[bytes]) -> None:
    for decoded in (m.from_engine, m.to_engine):
        with pytest.raises(m.BadMessageError):
            decoded(frames)


def test_a_member_that_talks_nonsense_is_counted_and_its_cluster_serves_on(tmp_path: Path) -> None:
    async def run() -> None:
        async with head(tmp_path) as cluster:
            prefill, decode = await cluster.new(Role.PREFILL).join(), await cluster.new(Role.DECODE).join()
            said = [bytes_ for _, bytes_ in bad_messages()]
            for one in said:
                prefill.say(one)
            await prefill._socket.send_multipart([b"a", b"b", b"c"])
            await prefill._socket.send_multipart([b"", m.encoder.encode(m.Leave("forged"))])
            await cluster.becomes("dualpath_malformed_messages_total", len(said) + 2)
            decode.beat()
            await decode.hears(m.HeartbeatAck)
            assert len(cluster.coordinator.health()["engines"]) == 2  # type: ignore[arg-type]

    asyncio.run(run())


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(
        [metrics.NIC_BYTES("snic", "rx", "low", "node"), metrics.ENGINE_ATTEMPTS(), "vllm:num_requests_running"]
    )
    | st.text(max_size=40),
    value=st.floats() | st.integers(-(2**63), 2**64 - 1),
)
def test_every_figure_that_is_believed_can_be_shown(name: str, value: float) -> None:
    try:
        heartbeat = m.from_engine([msgspec.msgpack.encode({"type": "Heartbeat", "gauges": {name: value}})])
    except m.BadMessageError:
        return
    assert isinstance(heartbeat, m.Heartbeat)
    shown = {of_engine(sample, 0, "prefill"): figure for sample, figure in heartbeat.gauges.items()}
    text = ServerMetrics("model").exposition(shown).decode()
    assert all(line.startswith("#") or len(line.rsplit(" ", 1)) == 2 for line in text.splitlines())
    assert text.count("# TYPE dualpath_unknown_series ") == 1


# ── About whom ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def foreign(pair: Pair, n: int) -> None:
    await pair.cluster.becomes("dualpath_foreign_messages_total", n)


def test_an_engine_can_not_speak_of_another_engines_requests(tmp_path: Path) -> None:
    """Its tokens went to the client: now they are counted, and the answer is that of the request's own engines."""

    async def work(pair: Pair) -> None:
        forgers: list[FakeEngine] = [await pair.cluster.new(role).join() for role in Role]
        mine = {Role.PREFILL: pair.prefill, Role.DECODE: pair.decode}
        pair.ask()
        prepare = await _first_hears(m.PrepareDecode, [pair.decode, forgers[1]])
        if prepare not in pair.decode.heard:
            mine[Role.DECODE], forgers[1] = forgers[1], pair.decode
        request, others = prepare.request, 0

        async def forge(*messages: m.FromEngine) -> None:
            nonlocal others
            for message in messages:
                for forger in forgers:
                    forger.say(message)
                    others += 1
            await foreign(pair, others)

        forged = m.Draw(99)
        await forge(m.Prepared(request, 0, [0, 1, 2, 3]), m.PrefillDone(request, 0, forged))
        await forge(m.AttemptFailed(request, 0, Cause.COMPUTE_FAILED, "x"), m.Refused(request, 0, "no"))
        mine[Role.DECODE].say(m.Prepared(request, 0, [0, 1, 2, 3]))
        start = await _first_hears(m.StartPrefill, [pair.prefill, forgers[0]])
        if start not in pair.prefill.heard:
            mine[Role.PREFILL], forgers[0] = forgers[0], pair.prefill
        await forge(m.PrefillDone(request, 0, forged), m.Tokens([m.StepTokens(request, 0, forged)]))
        await forge(m.Finished(request, 0, "stop"), m.BufferFreed(request, 0, 4), m.LoadFailed(request, 0, Side.PE, []))
        mine[Role.PREFILL].say(m.PrefillDone(request, 0, m.Draw(50)))
        await mine[Role.DECODE].hears(m.StartDecode)
        for token in (51, 52, 53):
            mine[Role.DECODE].say(m.Tokens([m.StepTokens(request, 0, m.Draw(token))]))
        mine[Role.DECODE].say(m.BufferFreed(request, 0, 4))
        mine[Role.DECODE].say(m.Finished(request, 0, "length"))
        await pair.client
        assert pair.token_ids == [50, 51, 52, 53]

    with_pair(tmp_path, work, topology=Topology(2, 2))


async def _first_hears(kind: type[m.PrepareDecode] | type[m.StartPrefill], engines: list[FakeEngine]):  # type: ignore[no-untyped-def]
    async with asyncio.timeout(10.0):
        while True:
            for engine in engines:
                if found := engine.all(kind):
                    return found[0]
            await asyncio.sleep(0.002)


def test_an_engine_can_not_report_what_can_not_be(tmp_path: Path) -> None:
    """Too few pages, a page twice, a token that the model has not, scores that don't fit, a second first token."""

    async def work(pair: Pair) -> None:
        pair.ask(prompt_logprobs=1)
        prepare = await pair.decode.hears(m.PrepareDecode)
        request, block = prepare.request, m.BlockFaultReport(bytes(16), "missing")
        for pages in ([], [0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3, 4]):
            pair.decode.say(m.Prepared(request, 0, pages))
        pair.decode.say(m.LoadFailed(request, 0, Side.DE, [block]))
        await foreign(pair, 5)
        pair.decode.say(m.Prepared(request, 0, [0, 1, 2, 3]))
        await pair.prefill.hears(m.StartPrefill)
        pair.prefill.say(m.PromptLogprobs(request, 0, [[1], [2]], [[0.0]], [1]))
        pair.prefill.say(m.PromptLogprobs(request, 0, [[1, 2]], [[0.0]], [1]))
        pair.prefill.say(m.PrefillDone(request, 0, m.Draw(256)))
        pair.prefill.say(m.Stored([m.StoredBlock(KEY, KEY, KEY, 1)]))
        await foreign(pair, 9)
        for token in (50, 60):
            pair.prefill.say(m.PrefillDone(request, 0, m.Draw(token)))
        await pair.decode.hears(m.StartDecode)
        pair.tokens(request, 0, 256, 51, 52, 53, 54)
        await foreign(pair, 12)
        pair.decode.say(m.BufferFreed(request, 0, 4))
        pair.decode.say(m.Finished(request, 0, "length"))
        await pair.client
        assert pair.token_ids == [50, 51, 52, 53]
        assert len(PROMPT) == 200

    with_pair(tmp_path, work)


def test_what_is_held_of_a_join_is_bounded() -> None:
    for change in ({"host": "h" * 300}, {"name": "a\nb"}, {"buffer_blocks": -1}, {"data_address": "x" * 70_000}):
        with pytest.raises(m.BadMessageError):
            m.from_engine([m.encoder.encode(join_message(Role.PREFILL, **change))])
    assert isinstance(m.from_engine([m.encoder.encode(join_message(Role.PREFILL))]), m.Join)
