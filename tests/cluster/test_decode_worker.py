"""The decode engine under messages in every order, failures of its peers and of its disk."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dualpath.cluster import messages as m
from dualpath.cluster.attachment import SequenceStep, Steps
from dualpath.cluster.engines.decode import DecodeCompute
from dualpath.core.vocabulary import Leg, Role, Side
from dualpath.kv import PosixStore, StoreWriteError
from dualpath.model import StepOutput
from dualpath.spec import metrics

from .engine_bench import Bench, bench
from .test_token_equality import appended

pytestmark = pytest.mark.slow

Checkpoint = Callable[[str], Path]


def on_bench(checkpoint: Checkpoint, store: Path, work: Callable[[Bench], object], **settings: object) -> None:
    async def run() -> None:
        async with bench(checkpoint("qwen3"), store, Role.DECODE, **settings) as engine:
            await work(engine)  # type: ignore[misc]
            engine.still_serves()
            engine.nothing_held()

    asyncio.run(run())


def test_warming_up_leaves_nothing_behind(checkpoint: Checkpoint, tmp_path: Path) -> None:
    prompt = appended(0, 130)

    async def work(engine: Bench) -> None:
        assert isinstance(engine.compute, DecodeCompute)
        free_blocks = engine.compute.gauges()
        engine.compute.warm_up()
        assert engine.compute.gauges() == free_blocks
        engine.prepare(0, prompt)
        await engine.hears(m.Prepared)
        engine.start(0, prompt)
        assert (await engine.hears(m.Finished)).request == 0
        assert engine.host.counters[metrics.DECODE_STEPS()] == len(engine.said(m.Tokens))

    on_bench(checkpoint, tmp_path, work)


def test_messages_of_unknown_attempts_are_dropped_and_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    async def work(engine: Bench) -> None:
        prompt = appended(0, 130)
        engine.worker.handle(m.LoadLeg(5, 0, Leg(Side.DE, 0, 1), 64, engine.space, engine.keys(prompt)[:1]))
        engine.start(5, prompt)
        await asyncio.sleep(0.05)
        engine.worker.handle(m.AbortAttempt(5, 0))
        assert (await engine.hears(m.Released)).request == 5
        assert engine.host.counters[metrics.ENGINE_STALE_MESSAGES()] == 2

    on_bench(checkpoint, tmp_path, work)


def test_abort_right_after_each_message(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Without a turn of the loop in between, so that no task has begun: everything is given back, once."""
    prompt = appended(0, 200)

    async def work(engine: Bench) -> None:
        store = PosixStore(tmp_path, durable=False)
        parent = engine.space.root
        for key in engine.keys(prompt)[:2]:
            store.write(engine.space, key, parent, bytes(engine.host.layout.full_block_bytes))
            parent = key
        for request in range(3):
            engine.prepare(request, prompt, hit_tokens=128)
            if request >= 1:
                leg = Leg(Side.DE, 0, 2)
                engine.worker.handle(m.LoadLeg(request, 0, leg, 128, engine.space, engine.keys(prompt)[:2]))
            if request == 2:
                await engine.hears(m.Loaded)
                engine.start(request, prompt)
            engine.worker.handle(m.AbortAttempt(request, 0))
            assert (await engine.hears(m.Released, request + 1)).request == request
        await asyncio.sleep(0.1)
        assert len(engine.said(m.Released)) == 3
        assert not engine.said(m.Finished)

    on_bench(checkpoint, tmp_path, work)


def test_a_peer_is_lost_while_a_leg_is_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The abort waits for the lost peer's connection, the read for its NIC: pages are freed once, after both."""
    prompt = appended(0, 200)

    async def work(engine: Bench) -> None:
        engine.prepare(0, prompt, hit_tokens=192)
        with engine.peer(engine.host.link.tag(3)):
            leg = Leg(Side.DE, 0, 3)
            engine.worker.handle(m.LoadLeg(0, 0, leg, 192, engine.space, engine.keys(prompt)[:3]))
            await asyncio.sleep(0)  # the read is under way, and fails at once: there is no block
            engine.worker.handle(m.AbortAttempt(0, 0, lost_peer=3))
            await engine.hears(m.Released)
        await asyncio.sleep(0.1)
        assert len(engine.said(m.Released)) == 1

    on_bench(checkpoint, tmp_path, work)


def test_pages_that_a_lost_peer_may_still_touch_are_quarantined(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that hangs over shared memory can't be proven quiet: its pages are nobody's until it is."""
    monkeypatch.setattr("dualpath.cluster.agent.decode.QUIET_TIMEOUT_S", 0.05)
    prompt = appended(0, 200)

    async def work(engine: Bench) -> None:
        from concurrent.futures import Future

        engine.prepare(0, prompt)
        quiet: Future[None] = Future()
        monkeypatch.setattr(engine.host.server, "quiesce", lambda *_, **__: quiet)
        engine.worker.handle(m.AbortAttempt(0, 0, lost_peer=3))
        for _ in range(200):
            await asyncio.sleep(0.01)
            if engine.host.pool.statistics().quarantined_pages:
                break
        assert engine.host.pool.statistics().quarantined_pages == 4
        assert not engine.said(m.Released)  # core counts the blocks as held
        quiet.set_result(None)
        await engine.hears(m.Released)

    on_bench(checkpoint, tmp_path, work)


def test_an_engine_that_loses_its_coordinator_lets_go_of_everything(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Prepared, reading, decoding: all is free when `abandon` ends, every peer is disconnected, the memory stays."""
    prompt = appended(0, 200)

    async def work(engine: Bench) -> None:
        engine.worker.handle(m.PeerJoined(3, "shm:/nowhere"))
        for request in range(3):
            engine.prepare(request, prompt)
        engine.worker.handle(m.LoadLeg(1, 0, Leg(Side.DE, 0, 2), 128, engine.space, engine.keys(prompt)[:2]))
        engine.start(2, prompt, max_tokens=3000)
        await engine.hears(m.Tokens)
        with engine.peer(engine.host.link.tag(3)) as peer:
            await asyncio.wait_for(engine.worker.abandon(), 20.0)
            engine.nothing_held()
            async with asyncio.timeout(20.0):
                while peer.is_open:
                    await asyncio.sleep(0.01)
        said = len(engine.said(m.Finished))
        engine.prepare(0, prompt)  # of the next epoch, whose ids begin anew
        engine.start(0, prompt)
        await engine.hears(m.Finished, said + 1)

    on_bench(checkpoint, tmp_path, work)


def test_it_lets_go_of_nothing_that_a_peer_may_still_touch(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no coordinator to say that a prefill engine has stopped: each of this epoch must be proven quiet."""
    monkeypatch.setattr("dualpath.cluster.agent.decode.QUIET_TIMEOUT_S", 0.05)
    prompt = appended(0, 200)

    async def work(engine: Bench) -> None:
        from concurrent.futures import Future

        quiet: dict[str, Future[None]] = {engine.host.link.tag(peer): Future() for peer in (3, 5)}
        for peer in (3, 5):
            engine.worker.handle(m.PeerJoined(peer, "shm:/nowhere"))
        engine.prepare(0, prompt)
        monkeypatch.setattr(engine.host.server, "quiesce", quiet.__getitem__)
        letting_go = asyncio.create_task(engine.worker.abandon())
        for tag in sorted(quiet):
            await asyncio.sleep(0.2)
            statistics = engine.host.pool.statistics()
            assert statistics.quarantined_pages == 4 and not letting_go.done()
            quiet[tag].set_result(None)
        await asyncio.wait_for(letting_go, 20.0)

    on_bench(checkpoint, tmp_path, work)


def test_a_step_that_ends_after_its_sequence_was_released(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """An abort may release a sequence before the step that it took part in is reported: its share is dropped."""

    async def work(engine: Bench) -> None:
        engine.worker.on_steps(Steps([SequenceStep(99, m.Draw(1))]))
        assert not engine.said(m.Tokens)

    on_bench(checkpoint, tmp_path, work)


def test_a_failed_step_fails_its_requests_and_stores_nothing_more(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV that made a step fail may be damaged: it must not reach storage, nor may the attempt speak again."""
    prompt = appended(0, 130)

    async def work(engine: Bench) -> None:
        assert isinstance(engine.compute, DecodeCompute)
        real_step = engine.compute._engine.step
        fail = True

        def step() -> list[StepOutput]:
            if fail:
                raise RuntimeError("the device is on fire")
            return real_step()

        monkeypatch.setattr(engine.compute._engine, "step", step)
        engine.prepare(0, prompt)
        engine.start(0, prompt, max_tokens=200, ignore_eos=True)
        failed = await engine.hears(m.AttemptFailed)
        assert "on fire" in failed.detail
        fail = False
        stored = len(engine.said(m.Stored))
        engine.prepare(1, prompt[:70])
        engine.start(1, prompt[:70], max_tokens=100, ignore_eos=True)
        await engine.hears(m.Finished)
        assert {step.request for tokens in engine.said(m.Tokens) for step in tokens.step} == {1}
        engine.worker.handle(m.AbortAttempt(0, 0))
        await engine.hears(m.Released)
        stored_of_1 = [b for s in engine.said(m.Stored)[stored:] for b in s.blocks if b.key in engine.keys(prompt)[1:]]
        assert not stored_of_1

    on_bench(checkpoint, tmp_path, work)


def test_the_event_loop_never_waits_for_a_nic(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is paced (prompt copies, blocks on their way to storage) is paced on another thread."""
    prompt = appended(0, 130)
    threads: list[int] = []

    async def work(engine: Bench) -> None:
        traffic = engine.host.traffic
        real = traffic.local_copy

        def local_copy(n_bytes: int) -> None:
            threads.append(threading.get_ident())
            real(n_bytes)

        monkeypatch.setattr(traffic, "local_copy", local_copy)
        engine.prepare(0, prompt)
        engine.start(0, prompt, max_tokens=140, ignore_eos=True)
        await engine.hears(m.Finished)
        assert len(threads) == 3 + 2  # three prompt blocks in, two generated blocks out
        assert threading.get_ident() not in threads

    on_bench(checkpoint, tmp_path, work, cnic_bytes_per_s=10**9)


def test_storage_that_cannot_be_written_or_opened(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation goes on; nothing is reported as stored; the counter says so."""
    prompt = appended(0, 200)
    (tmp_path / "file").write_text("no directory")

    async def work(engine: Bench) -> None:
        engine.prepare(0, prompt)
        engine.start(0, prompt, max_tokens=70, ignore_eos=True)
        assert (await engine.hears(m.Finished)).finish_reason == "length"
        assert not engine.said(m.Stored)
        assert engine.host.counters[metrics.STORE_WRITE_ERRORS()] == 1
        engine.prepare(1, prompt, hit_tokens=64)
        engine.worker.handle(m.LoadLeg(1, 0, Leg(Side.DE, 0, 1), 64, engine.space, engine.keys(prompt)[:1]))
        failed = await engine.hears(m.LoadFailed)
        assert failed.faults == []  # no block is to blame, and none may be set aside
        engine.worker.handle(m.AbortAttempt(1, 0))
        await engine.hears(m.Released)

    on_bench(checkpoint, tmp_path / "file", work)

    def no_space(*_: object) -> int:
        raise StoreWriteError(bytes(16), tmp_path, OSError(28, "No space left on device"))

    async def work_without_space(engine: Bench) -> None:
        monkeypatch.setattr(PosixStore, "write", no_space)
        engine.prepare(0, prompt)
        engine.start(0, prompt, max_tokens=70, ignore_eos=True)
        await engine.hears(m.Finished)
        assert not engine.said(m.Stored)
        assert engine.host.counters[metrics.STORE_WRITE_ERRORS()] == 1

    on_bench(checkpoint, tmp_path / "store", work_without_space)


@pytest.mark.parametrize("prompt_tokens", [1, 63, 64, 65, 128])
@pytest.mark.parametrize("max_tokens", [1, 2, 66, 130])
def test_exactly_the_full_blocks_are_stored(
    checkpoint: Checkpoint, tmp_path: Path, prompt_tokens: int, max_tokens: int
) -> None:
    """Of prompt and generated tokens together, but for the last token, whose KV was never computed."""
    prompt = appended(0, prompt_tokens)

    async def work(engine: Bench) -> None:
        engine.prepare(0, prompt)
        engine.start(0, prompt, max_tokens=max_tokens, ignore_eos=True)
        await engine.hears(m.Finished)
        tokens = [11, *(step.draw.token_id for message in engine.said(m.Tokens) for step in message.step)]
        assert len(tokens) == max_tokens
        stored = [block.key for message in engine.said(m.Stored) for block in message.blocks]
        assert stored == engine.keys((prompt + tokens)[:-1])
        freed = sum(message.blocks for message in engine.said(m.BufferFreed))
        assert freed == -(-prompt_tokens // 64)

    on_bench(checkpoint, tmp_path, work)


@pytest.mark.parametrize(
    ("first_token", "min_tokens", "reason"), [(11, 0, "stop"), (11, 1, "length"), (12, 0, "length")]
)
def test_the_first_token_may_be_the_last(
    checkpoint: Checkpoint, tmp_path: Path, first_token: int, min_tokens: int, reason: str
) -> None:
    prompt = appended(0, 64)

    async def work(engine: Bench) -> None:
        engine.prepare(0, prompt)
        stop = (11,) if first_token == 11 else (13,)
        engine.start(0, prompt, max_tokens=1, min_tokens=min_tokens, stop_token_ids=stop)
        assert (await engine.hears(m.Finished)).finish_reason == reason
        assert not engine.said(m.Tokens)
        assert len(engine.said(m.Stored)) == 1

    on_bench(checkpoint, tmp_path, work)
