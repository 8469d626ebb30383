"""Answers whose message parts a test writes down, so that what writers make of them needs no model and no parser."""

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from fake_cluster import FakeGenerator, says

from dualpath.cluster.generator import GenerateRequest
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
    *answers: list[list[Delta]],
    finish_reason: str = "stop",
    cached_tokens: int = 0,
) -> FakeGenerator:
    """A cluster that gives these answers in turn, and the last one for ever.

    It makes one token for each step of an answer; piece *i* brings the deltas of step *i*.
    """
    answered = 0

    async def run(*arguments: Any) -> AsyncGenerator[Piece, None]:
        nonlocal answered
        steps = answers[min(answered, len(answers) - 1)]
        answered += 1
        i = 0
        async for piece in original(*arguments):
            yield msgspec.structs.replace(piece, deltas=steps[i] if i < len(steps) else [])
            i += 1

    def script(request: GenerateRequest) -> Any:
        text = "x" * len(answers[min(answered, len(answers)) - 1])
        return says(text, finish_reason=finish_reason, cached_tokens=cached_tokens)(request)

    original = service.run_request
    monkeypatch.setattr(service, "run_request", run)
    return FakeGenerator(script)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the names and data of a stream's events."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        events.append((name.removeprefix("event: "), msgspec.json.decode(data.removeprefix("data: "))))
    return events
