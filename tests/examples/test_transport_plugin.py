"""Somebody else's transport (``examples/transport_plugin``), installed and named in a command, serves a cluster."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from dualpath.model.checkpoint import make_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "transport_plugin"
START_S, STOP_S = 60.0, 20.0
PROMPT = list(range(10, 220))
TURNS = (PROMPT, [*PROMPT, *range(40, 140)])
"""The second turn hits the first one's blocks."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installer would write of the example's pyproject.toml: its metadata, with the entry point."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    site = tmp_path_factory.mktemp("site")
    information = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {value}\n" for name, value in project["entry-points"]["dualpath.transports"].items()]
    (information / "entry_points.txt").write_text("[dualpath.transports]\n" + "".join(lines))
    return site


def environment(site: Path, where: Path) -> dict[str, str]:
    path = os.pathsep.join([str(site), str(EXAMPLE), *filter(None, sys.path)])
    return os.environ | {"PYTHONPATH": path, "TMPDIR": str(where)}


@contextmanager
def serving(model: Path, where: Path, site: Path, transport: str) -> Iterator[str]:
    ready = where / "ready.json"
    options = ("--transport", transport, "--system", "de-only", "--buffer", "64MiB", "--hbm", "64MiB", "--port", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "dualpath", "serve", "--model", str(model), "--store", str(where / "store"),
         "--ready-file", str(ready), *options],
        env=environment(site, where),
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


def test_tokens_are_those_over_shared_memory(installed: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3", seed=7)
    said: dict[str, list[list[int]]] = {}
    for transport, left in (("shm", "dualpath-*.sock"), ("procmem", "dualpath-procmem-*")):
        where = tmp_path / transport
        where.mkdir()
        with serving(model, where, installed, transport) as url:
            assert len(list(where.glob(left))) == 2, "each engine's server, and nothing of another transport"
            assert len(list(where.glob("dualpath-*"))) == 2
            (card,) = httpx.get(f"{url}/v1/models").json()["data"]
            said[transport] = []
            for prompt, hit_tokens in zip(TURNS, (0, 192), strict=True):
                body = {"model": card["id"], "prompt": prompt, "max_tokens": 9, "temperature": 0}
                body |= {"return_token_ids": True, "ignore_eos": True}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60.0).json()
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == hit_tokens
                said[transport].append(answer["choices"][0]["token_ids"])
            metrics = httpx.get(f"{url}/metrics").text.splitlines()
            moved = [line for line in metrics if 'nic="cnic",direction="rx",traffic_class="low"' in line]
            assert sum(float(line.split()[-1]) for line in moved) > 0
        assert not list(where.glob("dualpath-*"))
    assert said["procmem"] == said["shm"]
    assert [len(tokens) for tokens in said["shm"]] == [9, 9]


def test_help_and_errors_know_it(installed: Path, tmp_path: Path) -> None:
    def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dualpath", "serve", *arguments]
        return subprocess.run(command, env=environment(installed, tmp_path), capture_output=True, text=True)

    assert "shm, tcp, procmem, or MODULE:ATTRIBUTE" in " ".join(serve("--help").stdout.split())
    (tmp_path / "config.json").write_text("{}")
    refused = serve("--model", str(tmp_path), "--store", str(tmp_path / "store"), "--transport", "rdma")
    assert refused.returncode == 2
    assert refused.stderr == "dualpath serve: unknown transport 'rdma'; choose from shm, tcp, procmem\n"
