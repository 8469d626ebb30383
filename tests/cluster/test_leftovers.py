"""A sweep over somebody else's transport: what goes wrong is a warning, and it ends."""

import asyncio
import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from dualpath.cluster import leftovers
from dualpath.cluster.leftovers import Sweep
from dualpath.transfer import TRANSPORTS


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(leftovers, "SWEEP_S", 0.1)
    odd = SimpleNamespace(sweep=list)
    monkeypatch.setitem(TRANSPORTS._known, "odd", odd)
    return odd


def swept(times: int = 1) -> None:
    async def run() -> None:
        sweep = Sweep("odd")
        for _ in range(times):
            await sweep()

    asyncio.run(run())


def raises() -> Any:
    raise RuntimeError("sweep broke")


def test_one_that_raises_is_a_warning_once(transport: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    transport.sweep = raises
    swept(times=3)
    (message,) = caplog.messages
    assert "may stay: transport 'odd': its sweep raised RuntimeError: sweep broke (test_leftovers.py:" in message
    assert message.endswith("; see docs/how-to/add-a-transport.md")
    assert caplog.records[0].levelno == logging.WARNING


def test_one_that_gives_nothing_is_a_warning(transport: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    transport.sweep = lambda: None
    swept()
    assert "its sweep raised TypeError: 'NoneType' object is not iterable" in caplog.text


def test_one_that_hangs_is_a_warning_and_holds_up_nobody_again(
    transport: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def hangs() -> None:
        begun.release()
        go_on.wait()

    transport.sweep = hangs
    swept(times=3)
    (message,) = caplog.messages
    assert "transport 'odd': its sweep hangs, and may take 0.1 s" in message
    assert begun.acquire(blocking=False)
    assert not begun.acquire(blocking=False), "no thread is spent on it while it hangs"
    go_on.set()


def test_the_loop_goes_on_meanwhile(transport: SimpleNamespace) -> None:
    """So a signal is handled."""
    go_on = threading.Event()
    transport.sweep = lambda: [str(go_on.wait(10.0))]

    async def run() -> None:
        sweeping = asyncio.ensure_future(Sweep("odd")())
        await asyncio.sleep(0)
        assert not sweeping.done()
        go_on.set()
        await sweeping

    asyncio.run(run())
