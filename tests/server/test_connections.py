"""What a connection may do: bounds, deadlines, offers of other protocols, and what is no HTTP at all."""

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_cluster import FakeGenerator, running_server, says
from raw_http import answer, answers, connect, error_code, exchange, post, read_all

from dualpath.cluster.generator import GeneratedTokens
from dualpath.server import ServerLimits

BODY = b'{"prompt": "a", "max_tokens": 2}'
ASK = post("/v1/completions", BODY)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(FakeGenerator(says("ok"))) as url:
        yield url


def assert_serves(url: str) -> None:
    status, body = answer(exchange(url, ASK))
    assert (status, body["choices"][0]["text"]) == (200, "ok")


# ── offers of another protocol ──────────────────────────────────────────────────────────────────────────────────────

H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")


@pytest.mark.parametrize("offer", [H2C, (b"Connection: upgrade", b"Upgrade: websocket"), (b"Upgrade: TLS/1.3",)])
def test_a_request_that_offers_an_upgrade_is_answered_as_it_is(url: str, offer: tuple[bytes, ...]) -> None:
    """Java's HttpClient sends its first request so, body and all, and goes on with HTTP/1.1 when nobody takes it up."""
    first = post("/v1/completions", BODY, *offer, close=False)
    received = answers(exchange(url, first + first, ASK))
    assert [(status, body["choices"][0]["text"]) for status, body in received] == [(200, "ok")] * 3


def test_the_body_may_come_later_than_the_offer_and_in_chunks(url: str) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%b\r\nTransfer-Encoding: chunked\r\n\r\n" % b"\r\n".join(H2C)
    with connect(url) as connection:
        for part in (head[:50], head[50:], b"10\r\n" + BODY[:16], b"\r\n10\r\n" + BODY[16:] + b"\r\n0\r\n\r\n"):
            connection.sendall(part)
        connection.sendall(ASK)
        assert [status for status, _ in answers(read_all(connection))] == [200, 200]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_with_http2(url: str) -> None:
    command = ["curl", "-sS", "--http2", "-H", "Content-Type: application/json", "-d", BODY, f"{url}/v1/completions"]
    assert '"text":"ok"' in subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("request_bytes", "error"),
    [
        (b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000, (431, "headers_too_large")),
        (b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", (431, "headers_too_large")),
        (b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 300 + b"\r\n", (431, "headers_too_large")),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", (414, "target_too_long")),
        (b"GET /health?" + b"a" * 20_000, (414, "target_too_long")),
        (b"\x16\x03\x01\x02\x00\x01", (400, "invalid_http")),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, "invalid_http")),
        (b"FOO /health HTTP/1.1\r\n\r\n", (400, "invalid_http")),
        (b"GET /health HTTP/9.9\r\n\r\n", (400, "invalid_http")),
        (b"GET /health HTTP/1.1\r\nno header\r\n\r\n", (400, "invalid_http")),
        (b"GET /\xff HTTP/1.1\r\n\r\n", (400, "invalid_http")),
        (b"OPTIONS * HTTP/1.1\r\nConnection: close\r\n\r\n", (404, "not_found")),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", (405, "method_not_allowed")),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n", (400, "invalid_http")),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na", (400, "invalid_http")),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", (400, "invalid_http")),
    ],
)
def test_what_is_no_request_gets_a_json_error_and_the_end(
    url: str, request_bytes: bytes, error: tuple[int, str]
) -> None:
    assert error_code(exchange(url, request_bytes)) == error
    assert_serves(url)


def test_headers_without_end_are_not_kept(url: str) -> None:
    """Before the key is checked: whoever can connect could fill the memory."""
    sent = 0
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        try:
            while sent < 2**26:
                sent += connection.send(b"a" * 65536)
        except (BrokenPipeError, ConnectionResetError):
            pass
        else:
            assert error_code(read_all(connection)) == (431, "headers_too_large")
    assert_serves(url)


def test_headers_after_a_chunked_body_are_bounded_and_ignored(url: str) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    chunked = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    assert answer(exchange(url, head + chunked + b"Content-Encoding: gzip\r\n\r\n"))[0] == 200
    assert error_code(exchange(url, head + chunked + b"X: " + b"a" * 400_000)) == (431, "headers_too_large")


def test_requests_in_line_on_one_connection_are_bounded(url: str) -> None:
    never = threading.Event()
    cluster = FakeGenerator(lambda request: [never, *says("ok")(request)])
    limits = ServerLimits(max_pipelined=3)
    with running_server(cluster, limits=limits) as own, connect(own) as connection:
        connection.sendall(post("/v1/completions", BODY, close=False) * 9)
        while not cluster.open:
            threading.Event().wait(0.005)
        never.set()
        statuses = [status for status, _ in answers(read_all(connection))]
        assert 200 in statuses
        assert len(statuses) < 9


def test_a_client_that_leaves_while_its_next_request_waits_ends_both() -> None:
    never = threading.Event()
    cluster = FakeGenerator(lambda request: [GeneratedTokens(token_ids=[65]), never])
    with running_server(cluster) as url:
        with connect(url) as connection:
            connection.sendall(post("/v1/completions", BODY, close=False) * 2)
            while not cluster.open:
                threading.Event().wait(0.005)
        assert cluster.all_closed.wait(10)
    assert len(cluster.requests) == 1


def test_connections_are_bounded_and_the_place_is_given_back() -> None:
    with running_server(FakeGenerator(says("ok")), limits=ServerLimits(max_connections=2)) as url:
        first, second = connect(url), connect(url)
        with first, second:
            first.sendall(post("/v1/completions", BODY, close=False))
            assert first.recv(12) == b"HTTP/1.1 200"
            third = exchange(url)
            assert error_code(third) == (503, "overloaded")
            assert b"retry-after: 1\r\n" in third
        while answer(exchange(url, ASK))[0] != 200:
            threading.Event().wait(0.01)


# ── deadlines ───────────────────────────────────────────────────────────────────────────────────────────────────────

QUICK = ServerLimits(head_timeout_s=0.3, keep_alive_s=0.3, body_timeout_s=0.3)


@pytest.fixture(scope="module")
def quick_url() -> Iterator[str]:
    with running_server(FakeGenerator(says("ok")), limits=QUICK) as url:
        yield url


def drip(connection: socket.socket, data: bytes) -> bytes:
    """Send a byte now and then until the server ends it. Returns what it said."""
    connection.settimeout(0.05)
    received = b""
    for i in range(600):
        try:
            connection.sendall(data[i % len(data)].to_bytes())
            if chunk := connection.recv(65536):
                received += chunk
            else:
                return received
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            return received
    raise AssertionError("a connection that drips is not closed")


def test_a_silent_connection_is_closed(quick_url: str) -> None:
    assert exchange(quick_url) == b""
    with connect(quick_url) as connection:
        connection.sendall(post("/v1/completions", BODY, close=False))
        assert [status for status, _ in answers(read_all(connection))] == [200]


def test_headers_that_drip_are_given_up(quick_url: str) -> None:
    with connect(quick_url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        assert error_code(drip(connection, b"a")) == (408, "head_timeout")
    with connect(quick_url) as connection:  # the second on its connection, too
        connection.sendall(post("/v1/completions", BODY, close=False) + b"GET /health HTTP/1.1\r\nX: ")
        (status, _), (late, _) = answers(drip(connection, b"a"))
        assert (status, late) == (200, 408)


def test_empty_lines_keep_no_connection_open(quick_url: str) -> None:
    with connect(quick_url) as connection:
        connection.sendall(post("/v1/completions", BODY, close=False))
        assert [status for status, _ in answers(drip(connection, b"\r\n"))] == [200]


def test_a_body_that_nobody_reads_keeps_no_connection_open(quick_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualpath.server.connection._LINGER_S", 0.3)
    with connect(quick_url) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        assert error_code(drip(connection, b"a")) == (404, "not_found")


# ── answers that reach the client ───────────────────────────────────────────────────────────────────────────────────


def test_whoever_sends_too_much_still_reads_why() -> None:
    """Closing while the client sends would take the answer from it."""
    limits = ServerLimits(max_body_bytes=1000)
    with running_server(FakeGenerator(says("ok")), api_keys={"k"}, limits=limits) as url, httpx.Client() as client:
        huge = b"a" * 2**23
        for key, status in (("wrong", 401), ("k", 413)):
            for content in (huge, iter([huge] * 2)):
                headers = {"Authorization": f"Bearer {key}"}
                response = client.post(f"{url}/v1/completions", content=content, headers=headers)
                assert response.status_code == status
                assert response.json()["error"]["code"]
        assert client.get(f"{url}/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200


def test_a_body_that_is_announced_too_large_is_not_asked_for(url: str) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
    with connect(url) as connection:
        connection.sendall(head)
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_garbage_after_a_request_does_not_spoil_its_answer() -> None:
    release = threading.Event()
    cluster = FakeGenerator(lambda request: [release, *says("ok")(request)])
    with running_server(cluster) as url, connect(url) as connection:
        connection.sendall(post("/v1/completions", BODY, close=False) + b"\x00\x01\x02")
        while not cluster.open:
            threading.Event().wait(0.005)
        release.set()
        status, body = answer(read_all(connection))
        assert (status, body["choices"][0]["text"]) == (200, "ok")


def test_errors_of_connections_are_counted() -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        exchange(url, b"\x16\x03\x01")
        metrics = httpx.get(f"{url}/metrics").text
    assert 'dualpath_requests_total{endpoint="other",error_code="invalid_http",finish_reason=""} 1.0' in metrics


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version", "/v1/models", "/v1/models/tiny"])
def test_head_is_get_without_the_body(url: str, path: str) -> None:
    head, got = httpx.head(f"{url}{path}"), httpx.get(f"{url}{path}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "PUT", "DELETE", "PATCH", "HEAD"])
def test_other_methods_are_refused_by_json(url: str, method: str) -> None:
    response = httpx.request(method, f"{url}/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    body: Any = response.json() if method != "HEAD" else {"error": {"code": "method_not_allowed"}}
    assert body["error"]["code"] == "method_not_allowed"
