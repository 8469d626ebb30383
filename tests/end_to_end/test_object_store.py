"""`dualpath serve` on a store of objects: hits after a restart, and answers while the server is away."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from dualpath.lab.testbed.object_server import ObjectServer, free_port, missing_parts
from dualpath.model.checkpoint import make_checkpoint

PROMPT = list(range(5, 205)) * 4
START_S, STOP_S = 120.0, 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = missing_parts()
    if missing is not None:
        pytest.skip(missing)
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "qwen3", seed=7)


@contextmanager
def serving(model: Path, store: str, where: Path) -> Iterator[str]:
    ready = where / "ready.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dualpath", "serve", "--model", model, "--store", store, "--port", "0"]
    process = subprocess.Popen([*command, "--ready-file", ready, "--buffer", "64MiB", "--hbm", "64MiB"])
    try:
        deadline = time.monotonic() + START_S
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < deadline, "serve did not start"
            time.sleep(0.05)
        yield json.loads(ready.read_bytes())["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0


def ask(url: str) -> tuple[list[int], int]:
    """Generated tokens and hit tokens."""
    asked = {"model": model_name(url), "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["choices"][0]["token_ids"], body["usage"]["prompt_tokens_details"]["cached_tokens"]


def model_name(url: str) -> str:
    name: str = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
    return name


def wait_for_hits(url: str, tokens: list[int]) -> None:
    """Blocks are stored, and known to be, a moment after the answer."""
    deadline = time.monotonic() + 60
    while True:
        again, hit_tokens = ask(url)
        assert again == tokens
        if hit_tokens >= len(PROMPT) - 64:
            return
        assert time.monotonic() < deadline, f"only {hit_tokens} tokens hit"
        time.sleep(0.2)


@pytest.mark.slow
def test_hits_from_objects_and_answers_without_them(model: Path, tmp_path: Path) -> None:
    objects, work, port = tmp_path / "objects", tmp_path / "nginx", free_port()
    with ObjectServer(objects, work, port=port) as server:
        with serving(model, f"{server.url}/kv", tmp_path) as url:
            tokens, hit_tokens = ask(url)
            assert hit_tokens == 0
            wait_for_hits(url, tokens)
        restarted = serving(model, f"{server.url}/kv", tmp_path)
        url = restarted.__enter__()
    try:
        # The server is gone; the index still knows the prompt.
        assert ask(url) == (tokens, 0), "computed instead"
        with ObjectServer(objects, work, port=port):
            wait_for_hits(url, tokens)
    finally:
        restarted.__exit__(None, None, None)
