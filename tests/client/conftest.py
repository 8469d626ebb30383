import threading
import time

import pytest
import uvicorn
from fake_openai import FakeServer


@pytest.fixture
def fake():
    """A FakeServer on a port of its own; `fake.url` is where."""
    server = FakeServer()
    running = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not running.started:
        assert time.monotonic() < deadline, "the fake server did not start"
        time.sleep(0.005)
    server.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/v1"
    yield server
    running.should_exit = True
    running.force_exit = True
    thread.join(10)
