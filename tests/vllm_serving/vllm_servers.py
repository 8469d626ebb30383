"""Servers of these tests: one plain vLLM without any connector, and clusters of `dualpath serve --engine vllm`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from dualpath.cluster.vllm_launch import on_cpu

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_S = 400.0
STOP_S = 40.0
MAX_MODEL_LEN = 4096
COMMON = ("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--enforce-eager")
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
NAME = "m"


def wait_for(condition: Any, seconds: float, what: str) -> None:
    give_up_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_s, f"waited in vain for {what}"
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def end(process: "subprocess.Popen[bytes]") -> int:
    """Ends a server with SIGTERM, and kills what does not go. Returns its exit code."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def plain_vllm(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The URL of a vLLM server that keeps nothing: no connector, no prefix cache."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", str(128 << 20)]
    command += [*COMMON, "--no-enable-prefix-caching", "--enable-prompt-tokens-details", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=file, env=os.environ | on_cpu(1), start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(url) or process.poll() is not None, START_S, "vLLM")
        assert process.poll() is None, log.read_text()[-3000:]
        yield url
    finally:
        end(process)


@contextmanager
def cluster(
    model: Path, where: Path, *options: str, vllm: Sequence[str] = ()
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A running `dualpath serve --engine vllm`: its URL and process. Its log is ``serve.log``."""
    ready, log = where / "ready.json", where / "serve.log"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dualpath", "serve", "--engine", "vllm", "--model", model, "--name", NAME]
    command += ["--store", where / "store", "--port", "0", "--ready-file", ready, "--hbm", "128MiB"]
    command += ["--buffer", "128MiB", "--join-timeout", str(START_S), *options, "--", *COMMON, *vllm]
    with log.open("ab") as file:
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{Path(__file__).parent}"}
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        wait_for(lambda: ready.exists() or process.poll() is not None, START_S, "the cluster")
        assert ready.exists(), log.read_text()[-3000:]
        yield json.loads(ready.read_bytes())["url"], process
    finally:
        end(process)


def figures(url: str, series: str) -> dict[str, float]:
    """The series' samples, by their labels as /metrics writes them."""
    lines = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text.splitlines()
    found = (line.rsplit(" ", 1) for line in lines if line.startswith((f"{series}{{", f"{series} ")))
    return {name.removeprefix(series): float(value) for name, value in found}
