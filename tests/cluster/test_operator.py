"""Pauses and updates message by message: the test speaks for the engines."""

import asyncio
from pathlib import Path

import pytest

from dualpath.cluster import messages as m
from dualpath.cluster import orders as o
from dualpath.cluster.coordinator.coordinator import Coordinator
from dualpath.cluster.generator import Control, RequestError
from dualpath.core.vocabulary import Role

from .fake_engine import FakeEngine
from .test_request_life import PROMPT, Pair, with_pair


def control_of(pair: Pair) -> Control:
    return pair.cluster.coordinator.control


async def decoding(pair: Pair, *token_ids: int, **sampling: object) -> int:
    """A request that has its first tokens. Returns its id."""
    pair.ask(**({"max_tokens": 9} | sampling))
    request = (await pair.prepare(0)).request
    await pair.prefilled(0, token_ids[0])
    await pair.decode.hears(m.StartDecode)
    pair.tokens(request, 0, *token_ids[1:])
    async with asyncio.timeout(10):
        while len(pair.token_ids) < len(token_ids):
            await asyncio.sleep(0.002)
    return request


async def ended(pair: Pair, request: int, n: int = 1) -> None:
    """The decode engine gives back what an aborted attempt held."""
    await pair.decode.hears(m.AbortAttempt, n)
    pair.decode.say(m.Released(request, 0))


async def answer(engines: list[FakeEngine], kind: type, n: int = 1, **answers: o.OrderDone) -> None:
    """Every engine carries out the n-th order of a kind, or answers what is given for its role."""
    for engine in engines:
        order = await engine.hears(kind, n)
        given = answers.get(engine.role.value)
        engine.say(
            o.OrderDone(order.order, error=given.error) if given else o.OrderDone(order.order, fingerprint="new")
        )


def test_a_kept_request_goes_on_with_its_tokens_after_the_pause(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        request = await decoding(pair, 50, 51, 52)
        pause = asyncio.create_task(control_of(pair).pause("keep"))
        await pair.decode.hears(m.AbortAttempt)
        await asyncio.sleep(0.05)
        assert not pause.done()  # an engine still has its KV
        pair.decode.say(m.Released(request, 0))
        await pause
        pair.tokens(request, 0, 99)  # late words of the engine are of no account
        assert control_of(pair).requests == 1
        await control_of(pair).resume()
        prepare = await pair.decode.hears(m.PrepareDecode, 2)
        assert (prepare.request, prepare.attempt, prepare.prompt_tokens) == (request + 1, 0, 203)
        pair.decode.say(m.Prepared(prepare.request, 0, [0, 1, 2, 3]))
        start = await pair.prefill.hears(m.StartPrefill, 2)
        assert (start.miss_token_ids, start.generated_tokens) == ([*PROMPT, 50, 51, 52], 3)
        pair.prefill.say(m.PrefillDone(prepare.request, 0, m.Draw(53)))
        await pair.decode.hears(m.StartDecode, 2)
        pair.tokens(prepare.request, 0, *range(54, 59))
        pair.decode.say(m.Finished(prepare.request, 0, "length"))
        await pair.client
        assert pair.token_ids == list(range(50, 59))

    with_pair(tmp_path, work)


def test_aborted_requests_say_so_and_keep_what_they_have(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        request = await decoding(pair, 50, 51)
        assert control_of(pair).abort(["another"]) == 0
        assert control_of(pair).abort(None) == 1
        await pair.client
        assert (pair.token_ids, pair.got[-1].finish_reason) == ([50, 51], "abort")
        await ended(pair, request)

    with_pair(tmp_path, work)


def test_a_pause_that_waits_ends_with_the_last_request_and_holds_back_new_ones(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        request = await decoding(pair, 50, 51, max_tokens=3)
        pause = asyncio.create_task(control_of(pair).pause("wait"))
        first, pair.got = pair.client, []
        pair.ask(max_tokens=1)
        await asyncio.sleep(0.05)
        assert not pause.done() and len(pair.decode.all(m.PrepareDecode)) == 1
        pair.tokens(request, 0, 52)
        pair.decode.say(m.Finished(request, 0, "length"))
        await asyncio.gather(pause, first)
        assert control_of(pair).paused and control_of(pair).requests == 1
        await control_of(pair).resume()
        prepare = await pair.decode.hears(m.PrepareDecode, 2)
        control_of(pair).abort(None)
        pair.decode.say(m.Prepared(prepare.request, 0, [4, 5, 6, 7]))
        pair.decode.say(m.Released(prepare.request, 0))
        await pair.client
        assert pair.got[-1].finish_reason == "abort"

    with_pair(tmp_path, work)


def test_a_pause_that_can_not_be_had_opens_again(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        request = await decoding(pair, 50, max_tokens=2)
        with pytest.raises(RequestError, match="did not end within") as late:
            await control_of(pair).pause("wait")
        assert (late.value.status, control_of(pair).paused) == (504, False)
        await asyncio.gather(pair.client, return_exceptions=True)
        await pair.decode.hears(m.AbortAttempt)
        pair.decode.say(m.Released(request, 0))

    with_pair(tmp_path, work, request_deadline_ns=300_000_000, max_attempts=1)


def test_requests_wait_for_a_pause_only_so_long_and_only_so_many(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        await control_of(pair).pause("wait")
        pair.ask()
        first = pair.client
        await asyncio.sleep(0.05)
        pair.ask()
        with pytest.raises(RequestError) as many:
            await pair.client
        assert (many.value.status, many.value.code) == (429, "overloaded")
        with pytest.raises(RequestError) as late:
            await first
        assert (late.value.status, late.value.code) == (504, "deadline_exceeded")
        pair.ask()
        await asyncio.sleep(0.05)
        pair.client.cancel()  # a client that goes away leaves nothing behind
        await asyncio.gather(pair.client, return_exceptions=True)
        assert control_of(pair).requests == 0
        await control_of(pair).resume()
        assert pair.decode.all(m.PrepareDecode) == []

    with_pair(tmp_path, work, request_deadline_ns=500_000_000, max_waiting=1)


def test_an_update_reads_everywhere_first_then_pauses_then_changes(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        engines = [pair.prefill, pair.decode]
        request = await decoding(pair, 50, 51)
        before = pair.cluster.coordinator.block_key(PROMPT, 0)
        update = asyncio.create_task(control_of(pair).update_weights("/w/1", "1", "abort"))
        await pair.prefill.hears(o.ReadWeights)
        assert not pair.client.done()  # it serves while weights are read
        await answer(engines, o.ReadWeights)
        await pair.client
        await ended(pair, request)
        await answer(engines, o.UseWeights)
        await update
        assert pair.got[-1].finish_reason == "abort"
        coordinator: Coordinator = pair.cluster.coordinator
        assert (coordinator.model.weight_version, coordinator.model.path) == ("1", "/w/1")
        assert coordinator.block_key(PROMPT, 0) != before
        assert not control_of(pair).paused
        # An engine that comes with the weights of the start is refused, one with the new ones is not.
        old = pair.cluster.new(Role.DECODE)
        old.say(m.Join(**_join(Role.DECODE)))
        assert "is not the cluster's" in (await old.hears(m.Refusal)).reason
        await pair.cluster.new(Role.DECODE).join(model_fingerprint="new")

    with_pair(tmp_path, work)


def _join(role: Role) -> dict[str, object]:
    from .fake_engine import join_message

    message = join_message(role)
    return {name: getattr(message, name) for name in message.__struct_fields__}


def test_an_engine_that_can_not_read_the_weights_ends_the_update_for_all(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        engines = [pair.prefill, pair.decode]
        update = asyncio.create_task(control_of(pair).update_weights("/w/1", "1", "abort"))
        await answer(engines, o.ReadWeights, decode=o.OrderDone(0, error="OSError: no disk"))
        await answer(engines, o.DropWeights)
        with pytest.raises(RequestError, match="DE0: OSError: no disk"):
            await update
        assert pair.prefill.all(o.UseWeights) == []
        assert pair.cluster.coordinator.model.weight_version == "default"

    with_pair(tmp_path, work)


def test_an_engine_that_fails_half_way_is_lost_and_never_serves_old_beside_new(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        extra = await pair.cluster.new(Role.DECODE).join()
        engines = [pair.prefill, pair.decode, extra]
        update = asyncio.create_task(control_of(pair).update_weights("/w/1", "1", "wait"))
        await answer(engines, o.ReadWeights)
        await answer([pair.prefill, pair.decode], o.UseWeights)
        order = await extra.hears(o.UseWeights)
        extra.say(o.OrderDone(order.order, error="RuntimeError: the device is gone"))
        await update
        assert "weights" in (await extra.hears(m.Shutdown)).reason
        assert pair.cluster.coordinator.model.weight_version == "1"

    with_pair(tmp_path, work)


def test_an_engine_that_dies_while_it_is_waited_for_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        extra = await pair.cluster.new(Role.DECODE).join()
        update = asyncio.create_task(control_of(pair).update_weights("/w/1", "1", "wait"))
        await answer([pair.prefill, pair.decode], o.ReadWeights)
        await extra.hears(o.ReadWeights)
        joining = pair.cluster.new(Role.DECODE)
        joining.say(m.Join(**_join(Role.DECODE)))
        assert "being updated" in (await joining.hears(m.Refusal)).reason
        extra.say(m.Leave("its host goes down"))
        await answer([pair.prefill, pair.decode], o.UseWeights)
        await update

    with_pair(tmp_path, work)


def test_a_reset_prefix_cache_hits_nothing_of_before(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        coordinator = pair.cluster.coordinator
        keys = [coordinator.block_key(PROMPT, 0)]
        for _ in range(2):
            await control_of(pair).reset_prefix_cache()
            keys.append(coordinator.block_key(PROMPT, 0))
        assert len(set(keys)) == 3

    with_pair(tmp_path, work)


def test_an_engine_that_does_not_wake_is_lost(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        extra = await pair.cluster.new(Role.DECODE).join()
        engines = [pair.prefill, pair.decode, extra]
        sleep = asyncio.create_task(control_of(pair).sleep(("weights", "kv_cache"), True, "abort"))
        await answer(engines, o.ReleaseMemory)
        await sleep
        with pytest.raises(RequestError, match="sleeps"):
            await control_of(pair).resume()
        wake = asyncio.create_task(control_of(pair).wake(("weights", "kv_cache")))
        for engine in engines:
            order = await engine.hears(o.RestoreMemory)
            engine.say(o.OrderDone(order.order, error="" if engine is not extra else "OutOfMemoryError"))
        await wake
        assert not control_of(pair).paused
        await extra.hears(m.Shutdown)

    with_pair(tmp_path, work)
