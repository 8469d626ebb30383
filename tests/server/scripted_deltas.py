"""Answers whose message parts a test writes down, so that what writers make of them needs no model and no parser."""

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from fake_cluster import FakeGenerator, says

from dualpath.server import service
from dualpath.server.chat.deltas import Delta
from dualpath.server.generation import Piece

CONTENT = [[Delta("content", "Hel")], [Delta("content", "lo")]]
AGENT_TURN = [
    [Delta("reasoning", "I must ")],
    [Delta("reasoning", "look.")],
    [Delta("content", "Looking"), Delta("content", ":")],
    [],
    [Delta("call", "read_file", 0, "call_1")],
    [Delta("arguments", '{"path": "a', 0)],
    [Delta("arguments", '.py"}', 0), Delta("call", "apply_patch", 1, "call_2")],
    [Delta("arguments", '{"input": "*** Begin', 1)],
    [Delta("arguments", ' Patch"}', 1)],
]
"""Reasoning, text, and calls of two tools, the second of which a test may declare as a custom one."""


def scripted(
    monkeypatch: pytest.MonkeyPatch,
    steps: list[list[Delta]],
    *,
    finish_reason: str = "stop",
    cached_tokens: int = 0,
) -> FakeGenerator:
    """A cluster that makes one token for each step; piece *i* of its answer brings the deltas of step *i*."""

    async def run(*arguments: Any) -> AsyncGenerator[Piece, None]:
        i = 0
        async for piece in original(*arguments):
            yield msgspec.structs.replace(piece, deltas=steps[i] if i < len(steps) else [])
            i += 1

    original = service.run_request
    monkeypatch.setattr(service, "run_request", run)
    cluster = FakeGenerator(says("x" * len(steps), finish_reason=finish_reason, cached_tokens=cached_tokens))
    cluster.max_model_len_tokens = 4096  # tools take room
    return cluster


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the names and data of a stream's events."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        events.append((name.removeprefix("event: "), msgspec.json.decode(data.removeprefix("data: "))))
    return events
