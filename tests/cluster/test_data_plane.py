"""An agent over a transport that can't serve tells its engines so, in one line, and that trying again is no use."""

import asyncio
import logging
from pathlib import Path

import pytest

from dualpath.cluster import attachment as a
from dualpath.cluster.agent import data_plane
from dualpath.cluster.agent.main import NodeAgent

from . import odd_transports
from .test_node_agent import _decoder, decode_engine, on_agent, path

__all__ = ["path"]


def refusal(path: str, store: Path, transport: str) -> str:
    """Returns what the agent says to an engine that attaches."""
    told: list[a.ToEngineProcess] = []

    async def work(agent: NodeAgent) -> None:
        with decode_engine(path) as engine:
            told.append(await asyncio.to_thread(engine.receive, _decoder))
        assert not agent.members

    on_agent(path, store, work, transport=f"{odd_transports.__name__}:{transport}")
    (leave,) = told
    assert isinstance(leave, a.Leave)
    assert leave.failed
    assert leave.refused
    assert leave.reason.startswith(f"its agent can't serve it: transport '{odd_transports.__name__}:{transport}': its ")
    assert leave.reason.endswith("; see docs/how-to/add-a-transport.md")
    assert "\n" not in leave.reason
    return leave.reason


@pytest.mark.parametrize(
    ("transport", "what"),
    [
        ("RAISES", "serve raised RuntimeError: my fabric is down (odd_transports.py:"),
        ("NOTHING", "serve returned None, which is no Server"),
        ("NUMBER", "serve returned a server whose address is a int, not a str"),
    ],
)
def test_a_serve_that_makes_a_mistake(
    path: str, tmp_path: Path, transport: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert what in refusal(path, tmp_path, transport)
    assert not caplog.records, "no traceback of a task that nobody has asked"


def test_a_serve_that_hangs_is_told_and_given_up(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(data_plane, "SERVE_S", 0.4)
    monkeypatch.setattr(data_plane, "SLOW_S", 0.05)
    with caplog.at_level(logging.WARNING):
        reason = refusal(path, tmp_path, "HANGS")
    assert "its serve hangs (no answer by the deadline; it was given 0.4 s)" in reason
    (slow,) = caplog.messages
    assert "its serve has not returned after 0.05 s, and may take 0.4 s" in slow


def test_a_server_that_comes_too_late_is_closed(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_plane, "SERVE_S", 0.1)
    odd_transports.late.clear()
    odd_transports.go_on.clear()
    refusal(path, tmp_path, "HANGS")
    odd_transports.go_on.set()

    async def closed() -> None:
        async with asyncio.timeout(10.0):
            while not (odd_transports.late and not Path(odd_transports.late[0].address.partition(":")[2]).exists()):
                await asyncio.sleep(0.005)

    asyncio.run(closed())
