"""Somebody else's transport (``examples/transport_plugin``), installed and named in a command, serves a cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from dualpath.model.checkpoint import make_checkpoint

Install = Callable[[str], dict[str, str]]
START_S, STOP_S = 60.0, 20.0
PROMPT = list(range(10, 220))
TURNS = (PROMPT, [*PROMPT, *range(40, 140)])
"""The second turn hits the first one's blocks."""


@contextmanager
def serving(model: Path, where: Path, environment: dict[str, str], transport: str) -> Iterator[str]:
    ready = where / "ready.json"
    options = ("--transport", transport, "--system", "de-only", "--buffer", "64MiB", "--hbm", "64MiB", "--port", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "dualpath", "serve", "--model", str(model), "--store", str(where / "store"),
         "--ready-file", str(ready), *options],
        env=environment | {"TMPDIR": str(where)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < deadline, f"serve ended with {process.poll()}"
            time.sleep(0.05)
        yield json.loads(ready.read_bytes())["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(STOP_S) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _made(where: Path) -> list[Path]:
    """What servers have made there, beside the directories of this user's sockets and secrets."""
    others = (f"dualpath-{os.geteuid()}", "dualpath-sockets-")
    return [path for path in where.rglob("dualpath-*") if not path.name.startswith(others)]


def received_bytes(url: str) -> float:
    """KV bytes that compute NICs received."""
    metrics = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in metrics if 'nic="cnic",direction="rx",traffic_class="low"' in line)


@pytest.mark.slow
def test_tokens_are_those_over_shared_memory(install: Install, short_tmp_path: Path, tmp_path: Path) -> None:
    environment = install("transport_plugin")
    model = make_checkpoint(tmp_path / "model", "qwen3", seed=7)
    said: dict[str, list[list[int]]] = {}
    for transport, left in (("shm", "dualpath-*.sock"), ("procmem", "dualpath-procmem-*")):
        where = short_tmp_path / transport
        where.mkdir()
        with serving(model, where, environment, transport) as url:
            assert len(list(where.rglob(left))) == 2, "each engine's server, and nothing of another transport"
            assert len(_made(where)) == 2
            (card,) = httpx.get(f"{url}/v1/models").json()["data"]
            said[transport] = []
            for prompt, hit_tokens in zip(TURNS, (0, 192), strict=True):
                body = {"model": card["id"], "prompt": prompt, "max_tokens": 9, "temperature": 0}
                body |= {"return_token_ids": True, "ignore_eos": True}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60.0).json()
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == hit_tokens
                said[transport].append(answer["choices"][0]["token_ids"])
            deadline = time.monotonic() + START_S
            while not received_bytes(url):  # engines tell with their heartbeats
                assert time.monotonic() < deadline, "no byte was counted on a compute NIC"
                time.sleep(0.05)
        assert not _made(where)
    assert said["procmem"] == said["shm"]
    assert [len(tokens) for tokens in said["shm"]] == [9, 9]


def test_help_and_errors_know_it(install: Install, tmp_path: Path) -> None:
    environment = install("transport_plugin")

    def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dualpath", "serve", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert "shm, tcp, tcp-authenticated, nixl, procmem, or MODULE:ATTRIBUTE" in " ".join(serve("--help").stdout.split())
    (tmp_path / "config.json").write_text("{}")
    refused = serve("--model", str(tmp_path), "--store", str(tmp_path / "store"), "--transport", "rdma")
    assert refused.returncode == 2
    names = "shm, tcp, tcp-authenticated, nixl, procmem"
    assert refused.stderr == f"dualpath serve: unknown transport 'rdma'; choose from {names}\n"
