"""How `dualpath serve` starts and ends, as a newcomer and an orchestrator see it."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
import zmq

from .test_serve import command, serving, wait_for

pytestmark = pytest.mark.slow
START_S = 90.0


@contextmanager
def started(log: Path, *arguments: str | Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`dualpath serve` on a port that is known before; all it prints goes to `log`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    small = ("--buffer", "64MiB", "--hbm", "64MiB", "--port", port)
    with log.open("wb") as out:
        process = subprocess.Popen(command("serve", *arguments, *small), stdout=out, stderr=out, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.TransportError:
        return None


def children(pid: int) -> list[int]:
    """All processes below `pid`."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *children(child)]
    return found


def test_the_way_from_the_first_probe_to_a_copied_request(model: Path, tmp_path: Path) -> None:
    """Only a model is given. Probes are answered at once; the log says which engine does what; the curl works."""
    log = tmp_path / "log"
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    try:
        with started(log, model, "--topology", "1P2D", "--api-key", "KEY") as (url, process):
            wait_for(lambda: status(f"{url}/livez") == 200, START_S)
            loading = httpx.get(f"{url}/health")
            if loading.status_code == 503:  # as good as always: loading takes seconds
                assert loading.json()["status"] == "loading"
                refused = httpx.post(f"{url}/v1/completions", json={})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
            wait_for(lambda: status(f"{url}/ready") == 200 or process.poll() is not None, START_S)
            wait_for(lambda: "Try:" in log.read_text() and log.read_text().endswith("\n"), 10)
            text = log.read_text()
            (curl,) = re.findall(r"^  (curl .*)$", text, re.M)
            answer = subprocess.run([*shlex.split(curl), "-sS"], capture_output=True, text=True, timeout=60)
            assert "choices" in json.loads(answer.stdout), answer
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    finally:
        del os.environ["XDG_CACHE_HOME"]
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d engine decode-1: loads weights from ", text, re.M)
    assert "cluster: 1 of 3 engines ready: " in text and "3 of 3 engines ready" in text
    assert f"serves {model.name} at {url}/v1" in text and f"KV-cache in {tmp_path}/cache/dualpath/kv" in text
    assert "\r" not in text and "%|" not in text, "a progress bar in the log"
    assert len({line for line in text.splitlines() if "Traceback" in line}) == 0


def test_a_port_in_use_is_said_before_anything_loads(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        asked = command("serve", model, "--store", tmp_path / "kv", "--port", str(port))
        ended = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    refusal = f"dualpath serve: cannot listen on 127.0.0.1:{port}: Address already in use.*; choose another .*\n"
    assert re.fullmatch(refusal, ended.stderr)


def test_an_engine_that_can_not_load_is_named_with_its_reason_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    next(broken.glob("*.safetensors")).write_bytes(b"not weights")
    log = tmp_path / "log"
    with started(log, broken, "--store", tmp_path / "kv") as (_, process):
        seen: set[int] = set()
        wait_for(lambda: seen.update(children(process.pid)) or process.poll() is not None, START_S)
    assert process.returncode == 1
    last = log.read_text().splitlines()[-1]
    why = r"(prefill|decode)-0 \(pid \d+\) ended with exit code 1: can't run: .*broken can't be loaded: Safetensor.*"
    assert re.fullmatch(f"dualpath serve: not all engines are ready, and {why}", last)
    assert "Traceback" not in log.read_text()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in seen), 10)


@pytest.mark.parametrize(("line", "times"), [("torch is imported", 1), ("torch is imported", 3), ("loads weights", 1)])
def test_ctrl_c_while_engines_load_ends_all_of_them(model: Path, tmp_path: Path, line: str, times: int) -> None:
    """A terminal sends it to all processes; impatient people send it several times."""
    log = tmp_path / "log"
    with started(log, model, "--store", tmp_path / "kv") as (_, process):
        wait_for(lambda: line in log.read_text(), START_S)
        seen = children(process.pid)
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.2)
        assert process.wait(START_S) == 0
    assert seen
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in seen), 10)
    assert "Traceback" not in log.read_text()


def test_one_signal_drains_and_a_second_ends_at_once(model: Path, tmp_path: Path) -> None:
    body = {"prompt": "x" * 100, "max_tokens": 3000, "stream": True, "ignore_eos": True}
    ready = tmp_path / "ready.json"
    options = ("--store", tmp_path / "kv", "--ready-file", ready, "--drain-timeout", "600", "--log-format", "json")
    with started(tmp_path / "log", model, *options, "--access-log") as (url, process):
        wait_for(lambda: ready.exists() or process.poll() is not None, START_S)
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers={"x-request-id": "long"}) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: status(f"{url}/ready") == 503, 10)
            assert status(f"{url}/livez") == 200
            assert httpx.post(f"{url}/v1/completions", json=body).json()["error"]["code"] == "shutting_down"
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert process.wait(30) == 0
    assert not ready.exists()
    written = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    (long,) = [line for line in written if line.get("request_id") == "long"]
    assert (long["who"], long["message"], long["prompt_tokens"]) == ("access", "POST /v1/completions 200", 100)


class Stored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Stored]


def test_a_router_learns_every_block_of_an_answered_request(model: Path, tmp_path: Path) -> None:
    """Blocks of the prompt and generated ones, with their tokens, chained from the prompt's start."""
    config = {
        "enable_kv_cache_events": True,
        "endpoint": f"ipc://{tmp_path}/e",
        "replay_endpoint": f"ipc://{tmp_path}/r",
    }
    if len(config["endpoint"]) > 100:  # type: ignore[arg-type]
        pytest.skip("the path of the socket would be too long")
    with serving(model, tmp_path, "--kv-events-config", json.dumps(config)) as (url, _):
        body = {"prompt": list(range(10, 210)), "max_tokens": 150, "ignore_eos": True, "return_token_ids": True}
        (choice,) = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"]
        context = zmq.Context()
        asking = context.socket(zmq.DEALER)
        asking.setsockopt(zmq.RCVTIMEO, 10_000)
        asking.connect(f"ipc://{tmp_path}/r")
        asking.send_multipart([b"", (0).to_bytes(8, "big")])
        events: list[Stored] = []
        while (answer := asking.recv_multipart())[2]:
            events += msgspec.msgpack.decode(answer[2], type=Batch).events
        asking.close(0)
        context.term()
    tokens = [*range(10, 210), *choice["token_ids"]]
    parent, told = None, []
    of_parent = {event.parent_block_hash: event for event in events}
    while parent in of_parent:
        event = of_parent[parent]
        told += event.token_ids
        (parent,) = event.block_hashes
    assert len(told) == len(events) * 64 == 320  # the last token's own KV does not exist
    assert told == tokens[:320]


def test_the_module_needs_no_torch_to_refuse(tmp_path: Path) -> None:
    code = "import sys; from dualpath.cli import main; sys.exit(main(sys.argv[1:]) + 9 * ('torch' in sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", code, "serve", "Qwen/Qwen3-0.6B", "--store", str(tmp_path / "kv")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"HF_HOME": str(tmp_path)},
    )
    assert ended.returncode == 2
    assert "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B" in ended.stderr
