"""A server that is told to stop: what runs may end, what comes is sent away, and everybody is told."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_cluster import TOKENIZER, FakeGenerator, says
from raw_http import connect, post

from dualpath.cluster.generator import GeneratedTokens
from dualpath.server import bind, create_app, serve

BODY = {"prompt": "a", "max_tokens": 2}


class Stopping:
    """A server in a thread, which `stop` tells to stop; leaving waits until it has."""

    def __init__(self, cluster: FakeGenerator, drain_s: float) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(cluster, drain_s)))

    async def _main(self, cluster: FakeGenerator, drain_s: float) -> None:
        listener = bind("127.0.0.1", 0)
        self.listener = listener.dup()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._loop = asyncio.get_running_loop()
        app = create_app(cluster, TOKENIZER)
        self._drain = app.state.drain
        self._serving = asyncio.create_task(
            serve(app, listener, on_bound=lambda port: self._ready.set(), drain_s=drain_s)
        )
        await asyncio.gather(self._serving, return_exceptions=True)

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has stopped
            self._loop.call_soon_threadsafe(self._serving.cancel)

    def hand_over(self) -> None:
        self._loop.call_soon_threadsafe(self._drain.hand_over.set)

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"

    def __enter__(self) -> "Stopping":
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.join()


def asking(url: str, **fields: Any) -> tuple[threading.Thread, list[httpx.Response]]:
    got: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: got.append(httpx.post(f"{url}/v1/completions", json=BODY | fields, timeout=30))
    )
    thread.start()
    return thread, got


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to that")


def refused(url: str) -> bool:
    return httpx.post(f"{url}/v1/completions", json=BODY).status_code == 503


def never_ends(request: Any) -> list[Any]:
    return [GeneratedTokens(token_ids=[65]), threading.Event()]


def assert_shutting_down(error: dict[str, Any]) -> None:
    assert (error["code"], error["type"]) == ("shutting_down", "server_error")


def test_what_runs_ends_and_what_comes_is_sent_away(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    cluster = FakeGenerator(lambda request: [release, *says("ok")(request)])
    with Stopping(cluster, drain_s=60) as server:
        thread, got = asking(server.url)
        wait_until(lambda: cluster.open)
        server.stop()
        wait_until(lambda: refused(server.url))
        new = httpx.post(f"{server.url}/v1/completions", json=BODY)
        assert_shutting_down(new.json()["error"])
        assert int(new.headers["retry-after"]) > 0
        assert new.headers["connection"] == "close"
        assert httpx.get(f"{server.url}/health").status_code == 200  # it still answers its monitors
        release.set()
        thread.join(30)
        server.join()
    assert got[0].json()["choices"][0]["text"] == "ok"
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_what_does_not_end_is_told(signals: int, n: int, caplog: pytest.LogCaptureFixture) -> None:
    """After the drain, or at once when told a second time: whole answers become an error, streams end with one."""
    cluster = FakeGenerator(never_ends)
    with Stopping(cluster, drain_s=0.2 if signals == 1 else 600) as server:
        whole, whole_got = asking(server.url, n=n)
        stream, stream_got = asking(server.url, n=n, stream=True)
        wait_until(lambda: cluster.open == 2 * n)
        server.stop()
        if signals == 2:
            wait_until(lambda: refused(server.url))
            server.stop()
        server.join()
        whole.join(30)
        stream.join(30)
    assert cluster.all_closed.wait(5)
    assert whole_got[0].status_code == 503
    assert_shutting_down(whole_got[0].json()["error"])
    assert whole_got[0].headers["retry-after"]
    *pieces, last, rest = stream_got[0].text.split("\n\n")
    assert len(pieces) == n
    assert rest == ""
    assert '"code":"shutting_down"' in last
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_body_that_is_still_coming_ends_with_the_drain() -> None:
    with Stopping(FakeGenerator(says("ok")), drain_s=0.2) as server, connect(server.url) as connection:
        connection.sendall(post("/v1/completions", b"a" * 1000)[:-1])
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
        server.stop()
        assert connection.recv(12) == b"HTTP/1.1 503"
        server.join()


def test_an_idle_server_stops_at_once_whatever_the_drain() -> None:
    with Stopping(FakeGenerator(says("ok")), drain_s=600) as server, connect(server.url), httpx.Client() as client:
        assert client.get(f"{server.url}/health").status_code == 200
        server.stop()
        server.join()


def test_a_server_that_hands_over_answers_what_it_has_and_leaves_the_rest_to_another() -> None:
    """A connection that comes meanwhile waits in the backlog of the socket that both hold."""
    release = threading.Event()
    cluster = FakeGenerator(lambda request: [release, *says("1")(request)])
    with Stopping(cluster, drain_s=60) as old, old.listener as held:
        first, first_got = asking(old.url)
        wait_until(lambda: cluster.open)
        with connect(old.url) as waiting:  # it has said nothing yet, and is given the time to
            assert httpx.get(f"{old.url}/livez").status_code == 200  # so that one has been accepted, too
            old.hand_over()
            waiting.sendall(post("/v1/completions", b'{"prompt": "a"}'))
            wait_until(lambda: len(cluster.requests) == 2)
            release.set()
            assert waiting.recv(12) == b"HTTP/1.1 200"
        first.join(30)
        old.join()
        assert first_got[0].json()["choices"][0]["text"] == "1"
        second, second_got = asking(old.url)
        second.join(0.2)
        assert second.is_alive() and not second_got
        app = create_app(FakeGenerator(says("2")), TOKENIZER)

        async def succeed() -> None:
            serving = asyncio.create_task(serve(app, held.dup(), drain_s=1))
            while second.is_alive():
                await asyncio.sleep(0.01)
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

        asyncio.run(succeed())
        assert second_got[0].json()["choices"][0]["text"] == "2"
