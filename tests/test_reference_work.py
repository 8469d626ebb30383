"""The reference work: its mean, and what becomes of its process."""

import asyncio

import psutil
import pytest

from dualpath.reference_work import ReferenceWork, reference_work


async def left_after(what) -> ReferenceWork:
    async with reference_work() as meanwhile:
        assert meanwhile.mean_ns is None
        children = psutil.Process().children()  # other tests may have left some
        (process,) = [child for child in children if "dualpath.reference_work" in child.cmdline()]
        await what(process)
    assert not process.is_running()
    return meanwhile


def test_its_mean_is_known_when_it_is_left():
    async def wait(_):
        await asyncio.sleep(0.2)

    mean_ns = asyncio.run(left_after(wait)).mean_ns
    assert mean_ns is not None and 1_000 < mean_ns < 1e9


def test_a_process_that_has_ended_is_left_for_asyncio_to_reap(monkeypatch):
    """Killing it would reap it, and asyncio warns of a child that it can't find."""
    killed = []
    monkeypatch.setattr(asyncio.subprocess.Process, "kill", killed.append)

    async def nothing(_): ...

    asyncio.run(left_after(nothing))
    assert not killed


def test_a_killed_process_leaves_no_mean():
    async def kill(process):
        process.kill()

    assert asyncio.run(left_after(kill)).mean_ns is None


def test_an_error_beside_it_gets_through_and_the_process_ends():
    seen: list[psutil.Process] = []

    async def fail(process):
        seen.append(process)
        raise ValueError("beside it")

    with pytest.raises(ValueError, match="beside it"):
        asyncio.run(left_after(fail))
    assert not seen[0].is_running()
