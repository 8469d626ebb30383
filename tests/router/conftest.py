"""A fake vLLM server, and one that refuses connections."""

import socket
from collections.abc import Iterator

import pytest
from fake_vllm import FakeVllm, running


@pytest.fixture
def vllm() -> FakeVllm:
    return FakeVllm()


@pytest.fixture
def url(vllm: FakeVllm) -> Iterator[str]:
    with running(vllm) as address:
        yield address


@pytest.fixture
def nowhere() -> Iterator[str]:
    """The address of a server that has gone."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused, and nobody else gets the port
        yield f"http://127.0.0.1:{held.getsockname()[1]}"
