"""The HTTP client against a server that sends exactly what a test says, byte by byte."""

import asyncio
import contextlib

import pytest

from dualpath.client import http_client
from dualpath.client.http_client import HttpClient, HttpError

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@contextlib.asynccontextmanager
async def serving(*answers):
    """A server that gives request n the n-th of `answers`: pieces to write, None closes. Yields (url, requests)."""
    requests, left = [], list(answers)

    async def handle(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")]
                requests.append((head, await reader.readexactly(length[0]) if length else b""))
                for piece in left.pop(0):
                    if piece is None:
                        writer.close()
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.005)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


def test_pieces_come_with_their_times_and_chunks_may_be_split_anywhere():
    pieces = (CHUNKED[:20], CHUNKED[20:] + b"3\r\nab", b"c\r\n", b"2\r\nde\r\n", b"0\r\n\r\n")

    async def work():
        async with serving(pieces) as (url, _), HttpClient(url) as client:
            return await client.request("GET", "/x")

    answer = run(work())
    assert (answer.status, answer.body) == (200, b"abcde")
    assert answer.headers["content-type"] == "text/event-stream"
    times_s = [at_s for at_s, _ in answer.pieces]
    assert answer.sent_at_s <= times_s[0] and times_s == sorted(times_s) and len(set(times_s)) > 1


def test_a_request_has_its_headers_its_root_and_its_whole_body():
    async def work():
        async with (
            serving((HELLO,)) as (url, requests),
            HttpClient(f"{url}/api/", {"Authorization": "Bearer k"}) as client,
        ):
            await client.request("POST", "/v1/completions", b"x" * 500_000)
            return requests, url

    ((head, body),), url = run(work())
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /api/v1/completions HTTP/1.1"
    assert {"Authorization: Bearer k", f"Host: {url[7:]}", "Content-Length: 500000"} <= set(lines)
    assert body == b"x" * 500_000


def test_on_first_is_called_once_when_the_body_begins():
    async def work():
        seen = []
        async with serving((CHUNKED, b"1\r\na\r\n", b"1\r\nb\r\n0\r\n\r\n")) as (url, _), HttpClient(url) as client:
            await client.request("GET", "/", on_first=lambda: seen.append(1))
        return seen

    assert run(work()) == [1]


def test_a_connection_is_used_again_while_it_is_young(monkeypatch):
    async def work():
        connections = set()
        create = asyncio.get_running_loop().create_connection

        async def counted(*arguments, **named):
            made = await create(*arguments, **named)
            connections.add(made[1])
            return made

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", counted)
        async with serving((HELLO,), (HELLO,), (HELLO,)) as (url, _), HttpClient(url) as client:
            bodies = [(await client.request("GET", "/")).body for _ in range(2)]
            young = len(connections)
            monkeypatch.setattr(http_client, "KEEP_ALIVE_S", 0.0)
            bodies.append((await client.request("GET", "/")).body)
        return bodies, young, len(connections)

    assert run(work()) == ([b"hello"] * 3, 1, 2)


def test_a_connection_that_the_server_closes_is_not_used_again():
    closing = HELLO.replace(b"Content-Length", b"Connection: close\r\nContent-Length")

    async def work():
        async with serving((closing, None), (HELLO,)) as (url, _), HttpClient(url) as client:
            return [(await client.request("GET", "/")).body for _ in range(2)]

    assert run(work()) == [b"hello", b"hello"]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ((CHUNKED, b"3\r\nabc\r\n", None), "ended before the answer did"),
        ((None,), "ended before the answer did"),
        ((b"SSH-2.0-OpenSSH_9\r\n", None), "not HTTP"),
        ((CHUNKED, b"zz\r\nabc"), "not HTTP"),
    ],
)
def test_an_answer_that_breaks_off_or_is_none_is_an_error(pieces, message):
    async def work():
        async with serving(pieces) as (url, _), HttpClient(url) as client:
            await client.request("GET", "/")

    with pytest.raises(HttpError, match=message):
        run(work())


def test_an_answer_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(http_client, "MAX_BODY_BYTES", 10)
    test_an_answer_that_breaks_off_or_is_none_is_an_error((CHUNKED, b"b\r\nhello hello\r\n"), "longer than 10 bytes")


def test_a_cancelled_request_closes_its_connection():
    async def work():
        async with serving((CHUNKED,), (HELLO,)) as (url, _), HttpClient(url) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.request("GET", "/")
            return (await client.request("GET", "/")).body

    assert run(work()) == b"hello"


def test_no_server_and_no_url_say_so():
    async def work():
        async with HttpClient("http://127.0.0.1:9") as client:
            await client.request("GET", "/")

    with pytest.raises(HttpError, match=r"no connection to 127\.0\.0\.1:9"):
        run(work())
    for url in ("127.0.0.1:8000", "ftp://host", ""):
        with pytest.raises(ValueError, match="not a server's URL"):
            HttpClient(url)
