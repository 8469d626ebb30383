"""Whatever a client sends: an answer that says what was wrong, no failure of the server, and the right answer after it.

`DUALPATH_FUZZ_REQUESTS=10000` sends so many instead of those that a test run has time for.
"""

import concurrent.futures
import logging
import os
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_cluster import FakeGenerator, running_server, says
from raw_http import connect, post, read_all
from schema_fuzz import ENDPOINTS, Endpoint, sample

from dualpath.server import ServerLimits

REQUESTS = int(os.environ.get("DUALPATH_FUZZ_REQUESTS", "1500"))
SEED = int(os.environ.get("DUALPATH_FUZZ_SEED", "1"))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    limits = ServerLimits(head_timeout_s=1.0, keep_alive_s=5.0, body_timeout_s=1.0)
    with running_server(FakeGenerator(says("ok")), limits=limits) as url:
        yield url


def assert_right_answer(url: str) -> None:
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "seed": 1, "return_token_ids": True})
    assert (response.status_code, response.json()["choices"][0]["text"]) == (200, "ok")


def wrong(client: httpx.Client, url: str, endpoint: Endpoint, what: str, body: bytes) -> str | None:
    """Send one request. Returns what is wrong with its answer."""
    response = client.post(url + endpoint.path, content=body, headers={"Content-Type": "application/json"})
    if response.status_code >= 500:
        return f"{endpoint.path}, {what}: {response.status_code} {response.text[:300]}"
    if response.status_code >= 400:
        error = response.json()["error"]
        named = error["type"] if endpoint.path.startswith("/v1/messages") else error["code"]
        if not (isinstance(error["message"], str) and named and len(response.content) < 10_000):
            return f"{endpoint.path}, {what}: {response.text[:300]}"
    elif '"internal_error"' in response.text:
        return f"{endpoint.path}, {what}: {response.text[-300:]}"
    return None


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: f"{e.path}-{'-'.join(e.smallest)}")
def test_every_field_with_every_value(url: str, endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    with httpx.Client(timeout=60) as client, concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert client.post(url + endpoint.path, json=endpoint.smallest).status_code == 200
        asked = sample(endpoint, REQUESTS // len(ENDPOINTS), SEED)
        found = list(threads.map(lambda one: wrong(client, url, endpoint, *one), asked))
    assert [one for one in found if one is not None] == []
    assert_right_answer(url)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def mutated(draw: random.Random) -> bytes:
    """Returns requests, cut, doubled, with bytes changed, or something else in the middle."""
    body = b'{"prompt": "a", "max_tokens": 2}'
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    seeds = [
        post("/v1/completions", body),
        post("/v1/completions", body, close=False) * 2 + post("/v1/completions", body),
        post("/v1/completions", body, b"Connection: Upgrade", b"Upgrade: h2c"),
        post("/v1/completions", body, b"Expect: 100-continue"),
        chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 3,
        b"HEAD /health HTTP/1.0\r\n\r\n",
        b"GET /v1/models/%e2%98%83%00%ff?x=%zz HTTP/1.1\r\n\r\n",
    ]
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        match draw.randrange(6):
            case 0:
                del data[at:]
            case 1:
                data[at] = draw.randrange(256)
            case 2:
                data[at:at] = draw.randbytes(draw.randrange(20))
            case 3:
                data[at:at] = draw.choice([b"\r\n", b"\r\n\r\n", b"\x00", b": ", b"Content-Length: 99999999999\r\n"])
            case 4:
                data[at:at] = data[: draw.randrange(len(data))]
            case 5:
                data[at:at] = b"a" * draw.choice([100, 70_000, 300_000])
        if not data:
            data += b"\x00"
    return bytes(data)


def test_garbage_on_connections(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The server answers or closes, and what it answers is no failure of its own."""
    draw = random.Random(SEED)

    def send(data: bytes) -> str | None:
        with connect(url, timeout_s=30) as connection:
            try:
                for start in range(0, len(data), 50_000):
                    connection.sendall(data[start : start + 50_000])
            except (BrokenPipeError, ConnectionResetError):
                pass
            try:
                received = read_all(connection)
            except TimeoutError:
                return f"{data[:300]!r}: left open"
        if any(line.startswith(b"HTTP/1.1 5") and b" 503 " not in line for line in received.split(b"\r\n")):
            return f"{data[:300]!r}: {received[:300]!r}"
        return None

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        found: list[Any] = list(threads.map(send, [mutated(draw) for _ in range(REQUESTS // 10)]))
    assert [one for one in found if one is not None] == []
    assert_right_answer(url)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
