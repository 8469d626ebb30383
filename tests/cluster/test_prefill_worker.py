"""The prefill engine under messages in every order, and with decode engines that are gone, hang or come back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dualpath.cluster import messages as m
from dualpath.core.vocabulary import Cause, Leg, Role, Side
from dualpath.kv import PosixStore
from dualpath.spec import metrics
from dualpath.spec.sampling import SamplingParams
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import Channel, TransferCause, TransferError
from dualpath.transfer.transports.framed.server import FramedServer
from dualpath.transfer.transports.shm import SharedMemoryTransport

from .engine_bench import Bench, bench
from .test_token_equality import appended

Checkpoint = Callable[[str], Path]
PROMPT = appended(0, 200)


@asynccontextmanager
async def decode_buffer(engine: Bench, where: Path) -> AsyncIterator[FramedServer]:
    """A decode engine as far as a prefill engine sees it: a buffer with a server."""
    layout = engine.host.layout
    pool = BufferPool.create(where.name, layout.full_block_bytes, 32)
    server = FramedServer(
        SharedMemoryTransport(), pool, TrafficManager(), f"shm:{where}.sock", engine.host.config.cluster.secret.data_key
    )
    try:
        yield server
    finally:
        server.close()
        pool.close()


async def becomes(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        await asyncio.sleep(0.01)
    assert holds()


def start_prefill(
    engine: Bench, request: int, address: str, attempt: int = 0, prompt: list[int] = PROMPT, leg: Leg | None = None
) -> None:
    hit_tokens = leg.blocks * 64 if leg else 0
    engine.worker.handle(
        m.StartPrefill(
            request=request,
            attempt=attempt,
            hit_tokens=hit_tokens,
            miss_token_ids=prompt[hit_tokens:],
            legs=[leg] if leg else [],
            decode_engine=1,
            decode_address=address,
            decode_pages=list(range(4 * attempt, 4 * attempt + 4)),
            sampling=SamplingParams(max_tokens=4, temperature=0.0),
            generated_tokens=0,
        )
    )


def on_bench(checkpoint: Checkpoint, store: Path, work: Callable[[Bench], object], **settings: object) -> None:
    async def run() -> None:
        async with bench(checkpoint("qwen3"), store, Role.PREFILL, **settings) as engine:
            await work(engine)  # type: ignore[misc]
            engine.still_serves()
            engine.nothing_held()

    asyncio.run(run())


def test_stale_messages_are_dropped_and_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A prompt whose leg is not here can't be computed; one that was started already is not started again."""

    async def work(engine: Bench) -> None:
        start_prefill(engine, 0, "shm:/nowhere", leg=Leg(Side.PE, 0, 1))
        engine.worker.handle(m.AbortAttempt(0, 0))
        await engine.hears(m.Released)
        async with decode_buffer(engine, tmp_path / "de") as server:
            start_prefill(engine, 1, server.address)
            start_prefill(engine, 1, server.address)
            await engine.hears(m.PrefillDone)
        await asyncio.sleep(0.05)
        assert len(engine.said(m.PrefillDone)) == 1
        assert engine.host.counters[metrics.ENGINE_STALE_MESSAGES()] == 2

    on_bench(checkpoint, tmp_path, work)


def test_abort_right_after_each_message(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Before any task has begun, while reading, connecting, and in a batch: released once, nothing more is said."""
    leg = Leg(Side.PE, 0, 2)

    async def work(engine: Bench) -> None:
        store = PosixStore(tmp_path, durable=False)
        parent = engine.space.root
        for key in engine.keys(PROMPT)[:2]:
            store.write(engine.space, key, parent, bytes(engine.host.layout.full_block_bytes))
            parent = key
        async with decode_buffer(engine, tmp_path / "de") as server:
            for request in range(4):
                engine.worker.handle(m.LoadLeg(request, 0, leg, 128, engine.space, engine.keys(PROMPT)[:2]))
                if request >= 1:
                    await engine.hears(m.Loaded, request)
                    start_prefill(engine, request, server.address, leg=leg)
                if request >= 2:
                    await asyncio.sleep(0)  # on its way to the compute thread
                if request == 3:
                    await asyncio.sleep(0.02)
                engine.worker.handle(m.AbortAttempt(request, 0))
                released = await engine.hears(m.Released, request + 1)
                assert (released.request, released.quiet) == (request, True)
            await asyncio.sleep(0.1)
            assert len(engine.said(m.Released)) == 4

    on_bench(checkpoint, tmp_path, work)


def test_an_engine_that_loses_its_coordinator_lets_go_of_everything(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Reading, loaded, and in a batch: all is free and disconnected when `abandon` ends, and the engine goes on."""
    leg = Leg(Side.PE, 0, 2)

    async def work(engine: Bench) -> None:
        store = PosixStore(tmp_path, durable=False)
        parent = engine.space.root
        for key in engine.keys(PROMPT)[:2]:
            store.write(engine.space, key, parent, bytes(engine.host.layout.full_block_bytes))
            parent = key
        async with decode_buffer(engine, tmp_path / "de") as server:
            engine.worker.handle(m.LoadLeg(0, 0, leg, 128, engine.space, engine.keys(PROMPT)[:2]))
            await engine.hears(m.Loaded)
            engine.worker.handle(m.LoadLeg(1, 0, leg, 128, engine.space, engine.keys(PROMPT)[:2]))
            start_prefill(engine, 2, server.address)
            await asyncio.sleep(0)
            channels = engine.worker._channels  # type: ignore[union-attr]
            await asyncio.wait_for(engine.worker.abandon(), 20.0)
            engine.nothing_held()
            assert channels.get(server.address) is None
            done = len(engine.said(m.PrefillDone))
            start_prefill(engine, 0, server.address)  # of the next epoch, whose ids begin anew
            await engine.hears(m.PrefillDone, done + 1)

    on_bench(checkpoint, tmp_path, work)


def test_a_dead_decode_engine_fails_its_own_requests_only(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async def work(engine: Bench) -> None:
        async with decode_buffer(engine, tmp_path / "de") as server:
            start_prefill(engine, 0, f"shm:{tmp_path}/dead.sock")
            start_prefill(engine, 1, "")
            start_prefill(engine, 2, server.address)
            assert (await engine.hears(m.PrefillDone)).request == 2
            failed = [await engine.hears(m.AttemptFailed, n) for n in (1, 2)]  # in either order
            assert {failure.request: failure.cause for failure in failed} == {
                0: Cause.TRANSFER_FAILED,
                1: Cause.COMPUTE_FAILED,
            }
            for request in (0, 1):
                engine.worker.handle(m.AbortAttempt(request, 0))
                await engine.hears(m.Released, request + 1)

    on_bench(checkpoint, tmp_path, work)


def test_a_decode_engine_that_hangs_does_not_hold_up_others(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its connection takes as long as it takes, off the compute thread; requests for it wait together, once."""
    import threading

    hanging = threading.Event()
    asked: list[str] = []

    class Hanging(SharedMemoryTransport):
        def connect(self, address: str, *arguments: object, **options: object) -> Channel:  # type: ignore[override]
            asked.append(address)
            if address.endswith("hangs.sock"):
                hanging.wait(20.0)
                raise TransferError(TransferCause.PEER_CLOSED, "nobody answers")
            return super().connect(address, *arguments, **options)  # type: ignore[arg-type]

    async def work(engine: Bench) -> None:
        engine.host.transport = Hanging()
        async with decode_buffer(engine, tmp_path / "de") as server:
            start_prefill(engine, 0, f"shm:{tmp_path}/hangs.sock")
            start_prefill(engine, 1, f"shm:{tmp_path}/hangs.sock")
            start_prefill(engine, 2, server.address)
            assert (await engine.hears(m.PrefillDone)).request == 2
            assert not engine.said(m.AttemptFailed)
            engine.worker.handle(m.AbortAttempt(1, 0))
            hanging.set()
            assert (await engine.hears(m.AttemptFailed)).request == 0
            assert (await engine.hears(m.Released)).request == 1
            engine.worker.handle(m.AbortAttempt(0, 0))
            await engine.hears(m.Released, 2)
            assert sorted(asked) == sorted([server.address, f"shm:{tmp_path}/hangs.sock"])

    on_bench(checkpoint, tmp_path, work)


def test_a_lost_decode_engine_is_disconnected_and_a_new_one_at_its_address_is_not(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async def work(engine: Bench) -> None:
        for request in range(2):
            async with decode_buffer(engine, tmp_path / "de") as server:
                start_prefill(engine, request, server.address)
                assert (await engine.hears(m.PrefillDone, request + 1)).request == request
                engine.worker.handle(m.PeerLost(1, server.address))
                await becomes(lambda: server.statistics().connections_open == 0)

    on_bench(checkpoint, tmp_path, work)


def test_it_connects_to_a_decode_engine_that_joins_before_any_prompt(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async def work(engine: Bench) -> None:
        async with decode_buffer(engine, tmp_path / "de") as server:
            engine.worker.handle(m.PeerJoined(1, server.address))
            await becomes(lambda: server.statistics().connections_open == 1)
            start_prefill(engine, 0, server.address)
            await engine.hears(m.PrefillDone)
            assert server.statistics().connections_accepted == 1

    on_bench(checkpoint, tmp_path, work)


def test_one_that_cannot_be_connected_to_when_it_joins_is_tried_again_by_its_first_prompt(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(engine: Bench) -> None:
        engine.worker.handle(m.PeerJoined(1, f"shm:{tmp_path}/de.sock"))
        await becomes(lambda: "can't connect to engine 1" in caplog.text)
        assert "its first prompt will try again" in caplog.text
        async with decode_buffer(engine, tmp_path / "de") as server:
            start_prefill(engine, 0, server.address)
            await engine.hears(m.PrefillDone)

    with caplog.at_level(logging.INFO, logger="dualpath"):
        on_bench(checkpoint, tmp_path, work)


def test_one_that_is_lost_while_it_is_being_connected_to_is_disconnected_then(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    import threading

    lost = threading.Event()

    class Slow(SharedMemoryTransport):
        def connect(self, *arguments: object, **options: object) -> Channel:  # type: ignore[override]
            lost.wait(20.0)
            return super().connect(*arguments, **options)  # type: ignore[arg-type]

    async def work(engine: Bench) -> None:
        engine.host.transport = Slow()
        async with decode_buffer(engine, tmp_path / "de") as server:
            engine.worker.handle(m.PeerJoined(1, server.address))
            await asyncio.sleep(0)  # it asks for its connection
            engine.worker.handle(m.PeerLost(1, server.address))
            await asyncio.sleep(0)
            lost.set()
            await becomes(lambda: server.statistics().connections_accepted == 1)
            await becomes(lambda: server.statistics().connections_open == 0)

    on_bench(checkpoint, tmp_path, work)


def test_two_attempts_of_a_request_at_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The lost one may still be in a batch when the next one comes to the same engine."""

    async def work(engine: Bench) -> None:
        async with decode_buffer(engine, tmp_path / "de") as server:
            start_prefill(engine, 0, server.address, attempt=0)
            start_prefill(engine, 0, server.address, attempt=1)
            engine.worker.handle(m.AbortAttempt(0, 0))
            assert (await engine.hears(m.PrefillDone)).attempt == 1
            assert (await engine.hears(m.Released)).attempt == 0

    on_bench(checkpoint, tmp_path, work)


def test_a_transfer_that_fails_half_way_is_told(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late bytes may still be on their way: whoever frees the pages must disconnect us first."""
    monkeypatch.setattr("dualpath.cluster.agent.layer_transfers.TRANSFER_DEADLINE_NS", 1)

    async def work(engine: Bench) -> None:
        async with decode_buffer(engine, tmp_path / "de") as server:
            start_prefill(engine, 0, server.address)
            assert (await engine.hears(m.AttemptFailed)).cause is Cause.TRANSFER_FAILED
            engine.worker.handle(m.AbortAttempt(0, 0))
            assert (await engine.hears(m.Released)).quiet is False

    on_bench(checkpoint, tmp_path, work)


def test_a_transfer_that_ended_with_its_connection_is_quiet(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disconnecting once more would only harm what has been begun since."""

    async def work(engine: Bench) -> None:
        async with decode_buffer(engine, tmp_path / "de") as server:
            start_prefill(engine, 0, server.address)
            await engine.hears(m.PrefillDone)
            channel = engine.worker._channels.get(server.address)  # type: ignore[union-attr]
            real = engine.worker._transfers  # type: ignore[union-attr]

            def transfers(*arguments: object) -> object:
                channel.close()  # between joining the batch and moving its bytes
                monkeypatch.setattr(engine.worker._channels, "get", lambda _: channel)  # type: ignore[union-attr]
                return real(*arguments)  # type: ignore[arg-type]

            with monkeypatch.context() as patch:
                patch.setattr(engine.worker, "_transfers", transfers)
                start_prefill(engine, 1, server.address)
                assert (await engine.hears(m.AttemptFailed)).cause is Cause.TRANSFER_FAILED
            engine.worker.handle(m.AbortAttempt(1, 0))
            assert (await engine.hears(m.Released)).quiet is True

    on_bench(checkpoint, tmp_path, work)


def test_a_batch_that_cannot_be_computed_fails_each_of_its_requests(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: Bench) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("out of memory")

        async with decode_buffer(engine, tmp_path / "de") as server:
            with monkeypatch.context() as patch:
                patch.setattr(engine.compute._prefill, "run", broken)  # type: ignore[union-attr]
                start_prefill(engine, 0, server.address)
                failed = await engine.hears(m.AttemptFailed)
            assert (failed.cause, "out of memory" in failed.detail) == (Cause.COMPUTE_FAILED, True)
            engine.worker.handle(m.AbortAttempt(0, 0))
            assert (await engine.hears(m.Released)).quiet is True
            start_prefill(engine, 1, server.address)
            await engine.hears(m.PrefillDone)

    on_bench(checkpoint, tmp_path, work)


def test_a_store_that_cannot_be_opened_fails_the_load_without_blame(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")

    async def work(engine: Bench) -> None:
        engine.worker.handle(m.LoadLeg(0, 0, Leg(Side.PE, 0, 2), 128, engine.space, engine.keys(PROMPT)[:2]))
        assert (await engine.hears(m.LoadFailed)).faults == []
        engine.worker.handle(m.AbortAttempt(0, 0))
        await engine.hears(m.Released)

    on_bench(checkpoint, tmp_path / "file", work)
