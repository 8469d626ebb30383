"""What the port answers before there is an application."""

import asyncio
import threading
from collections.abc import Iterator

import httpx
import pytest
from fake_cluster import TOKENIZER, FakeGenerator, says

from dualpath.server import bind, create_app, serve
from dualpath.server.front import Front

STARTING = {"status": "loading", "engines": [], "starting": [{"name": "decode-0", "step": "loads weights"}]}


@pytest.fixture
def front() -> Iterator[tuple[str, Front]]:
    """A front on a port, and its address."""
    listener = bind("127.0.0.1", 0)
    made, bound = Front(lambda: STARTING), threading.Event()
    loop = made._loop = asyncio.new_event_loop()  # type: ignore[attr-defined]
    serving = loop.create_task(serve(made, listener, on_bound=lambda _: bound.set(), drain_s=0))
    port = listener.getsockname()[1]

    def run() -> None:
        loop.run_until_complete(asyncio.gather(serving, return_exceptions=True))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert bound.wait(10)
    yield f"http://127.0.0.1:{port}", made
    loop.call_soon_threadsafe(serving.cancel)
    thread.join(10)
    assert not thread.is_alive()


def test_while_engines_load_probes_are_answered_and_all_else_is_told_to_come_back(front: tuple[str, Front]) -> None:
    url, made = front
    assert httpx.get(f"{url}/livez").status_code == 200
    for probe in ("health", "ready", "ping"):
        answer = httpx.get(f"{url}/{probe}")
        assert (answer.status_code, answer.json()) == (503, STARTING)
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
        answer = httpx.request(method, url + path, content=b"x" * 100_000)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert int(answer.headers["retry-after"]) >= 1
    made.open(create_app(FakeGenerator(says("ok")), TOKENIZER, limits=made.limits, drain=made.drain))
    assert httpx.get(f"{url}/ready").status_code == 200
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).json()["choices"][0]["text"] == "ok"
    made.drain.begun = True
    assert (httpx.get(f"{url}/ready").status_code, httpx.get(f"{url}/ready").json()) == (503, {"status": "draining"})
    assert httpx.get(f"{url}/livez").status_code == 200


def test_a_successors_requests_wait_for_the_application_and_probes_do_not(front: tuple[str, Front]) -> None:
    url, made = front
    made.patience_s = 30.0
    got: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: got.append(httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=60))
    )
    asking.start()
    assert httpx.get(f"{url}/livez").status_code == 200
    assert httpx.get(f"{url}/health").status_code == 503
    asking.join(0.2)
    assert asking.is_alive() and not got
    app = create_app(FakeGenerator(says("ok")), TOKENIZER, limits=made.limits, drain=made.drain)
    made._loop.call_soon_threadsafe(made.open, app)  # type: ignore[attr-defined]
    asking.join(30)
    assert got[0].json()["choices"][0]["text"] == "ok"
    made._app = None
    made._opened.clear()
    made.patience_s = 0.1  # it does not wait for ever
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).json()["error"]["code"] == "loading"
