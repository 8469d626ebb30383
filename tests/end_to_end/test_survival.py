"""`dualpath serve` after each of its processes has been killed or stopped, and while all of them are replaced."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dualpath.model.checkpoint import make_checkpoint

from .test_serve import START_S, command, pools_of, serving, wait_for
from .test_start import children, started

pytestmark = pytest.mark.slow
PROMPT = list(range(10, 210))
GREEDY = {"ignore_eos": True, "temperature": 0, "return_token_ids": True}


def ask(url: str, prompt: list[int] = PROMPT, n: int = 8) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": n} | GREEDY, timeout=START_S)


def tokens(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def cached(answer: httpx.Response) -> int:
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def is_up(url: str, without: int = 0) -> bool:
    """Whether all engines serve, and none of them is the process `without`."""
    try:
        told = httpx.get(f"{url}/health", timeout=5).json()
        return told["status"] == "ok" and all(engine["pid"] != without for engine in told["engines"])
    except (httpx.HTTPError, ValueError):
        return False


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def server_of(url: str, supervisor: int) -> int:
    """The process that has the HTTP server and the coordinator: beside the supervisor, only it holds the listener."""
    port = f":{int(url.rpartition(':')[2]):04X} "
    (line,) = (line for line in Path("/proc/net/tcp").read_text().splitlines() if port in line and " 0A " in line)
    listener = f"socket:[{line.split()[9]}]"
    (found,) = (pid for pid in children(supervisor) if listener in open_files(pid))
    return found


def open_files(pid: int) -> list[str]:
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(path.readlink()))
    return found


def engine_of(url: str, role: str) -> int:
    engines = httpx.get(f"{url}/health").json()["engines"]
    return next(int(engine["pid"]) for engine in engines if engine["role"] == role)


def test_each_process_that_is_killed_is_brought_back(model: Path, tmp_path: Path) -> None:
    """Of the smallest cluster, where each is the only one of its kind: same tokens, and hits from the store.

    Requests wait for the new engine; only without a server they are refused.
    """
    with serving(model, tmp_path, "--replacement-timeout", str(START_S)) as (url, process):
        right = tokens(ask(url))
        ready = tmp_path / "ready.json"
        for name in ("prefill", "decode", "server", "fork server"):
            match name:
                case "server":
                    victim = server_of(url, process.pid)
                case "fork server":
                    victim = parent_of(engine_of(url, "prefill"))
                case role:
                    victim = engine_of(url, role)
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda victim=victim: not runs(victim), 10)
            refused = 0
            deadline = time.monotonic() + START_S
            while (answer := ask(url)).status_code != 200:
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
                assert answer.headers["retry-after"]
                assert time.monotonic() < deadline
                refused += 1
                time.sleep(0.1)
            assert bool(refused) == (name == "server")
            assert tokens(answer) == right and cached(answer) == 192
            wait_for(lambda: is_up(url), START_S)
            facts = httpx.get(f"{url}/health").json()
            assert facts["starting"] == []
            wait_for(lambda facts=facts: json.loads(ready.read_bytes())["engines"] == facts["engines"], 10)
            assert json.loads(ready.read_bytes())["pid"] == process.pid


def test_a_stream_goes_on_where_it_was_when_the_only_engine_of_a_role_is_brought_back(
    model: Path, tmp_path: Path
) -> None:
    """The client gets every token once, and learns of nothing but a pause."""
    body = {"prompt": PROMPT, "max_tokens": 400, "stream": True} | GREEDY

    def streamed(url: str, role: str | None = None) -> list[int]:
        found: list[int] = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=START_S) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    found += event["choices"][0]["token_ids"] or [] if event["choices"] else []
                if role is not None and len(found) > 3:
                    os.kill(engine_of(url, role), signal.SIGKILL)
                    role = None
        return found

    with serving(model, tmp_path, "--replacement-timeout", str(START_S)) as (url, _):
        right = streamed(url)
        assert len(right) == 400
        assert streamed(url, "decode") == right


def test_what_is_brought_back_has_the_weights_that_are_served(model: Path, tmp_path: Path) -> None:
    """After an update: an engine with those of the start would be refused, and a server would name the wrong ones."""
    other = make_checkpoint(tmp_path / "step-2", "qwen3", seed=8)
    with serving(model, tmp_path, "--enable-control") as (url, process):
        before = tokens(ask(url))
        asked = {"model_path": str(other), "weight_version": "step-2"}
        assert httpx.post(f"{url}/update_weights_from_disk", json=asked, timeout=60).json()["success"]
        right = tokens(ask(url))
        assert right != before
        for victim in (engine_of(url, "decode"), server_of(url, process.pid), engine_of(url, "prefill")):
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda victim=victim: not runs(victim), 10)
            wait_for(lambda victim=victim: is_up(url, without=victim), START_S)
            assert httpx.get(f"{url}/get_weight_version").json() == {"weight_version": "step-2"}
            answer = ask(url)
            assert tokens(answer) == right and cached(answer) == 192


def test_a_coordinator_that_stood_still_has_lost_nobody(model: Path, tmp_path: Path) -> None:
    """Stopped for longer than two leases: engines have let go, and come back. A stream goes on where it was."""
    body = {"prompt": PROMPT, "max_tokens": 2000, "stream": True} | GREEDY
    with serving(model, tmp_path) as (url, process):
        right = tokens(ask(url))
        engines = {engine_of(url, role) for role in ("prefill", "decode")}
        server = server_of(url, process.pid)
        streamed: list[int] = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            streamed += json.loads(next(lines))["choices"][0]["token_ids"]
            os.kill(server, signal.SIGSTOP)
            time.sleep(14)
            os.kill(server, signal.SIGCONT)
            for line in lines:
                if line != "[DONE]":
                    streamed += json.loads(line)["choices"][0]["token_ids"]
        again = ask(url)
        assert tokens(again) == right and cached(again) == 192
        assert streamed == tokens(ask(url, n=2000))
        wait_for(lambda: is_up(url), 30)
        assert {engine_of(url, role) for role in ("prefill", "decode")} == engines
        figures = httpx.get(f"{url}/metrics").text
        assert "dualpath_returned_engines_total 2.0\n" in figures and "dualpath_lost_engines_total 0.0\n" in figures


@pytest.mark.parametrize("topology", ["1P1D", "1P2D"])
def test_a_rolling_restart_loses_no_request(model: Path, tmp_path: Path, topology: str) -> None:
    over = threading.Event()

    def client(number: int) -> tuple[int, set[tuple[int, ...]]]:
        prompt = [10 + (number * 37 + at) % 200 for at in range(150)]
        given, asked = set(), 0
        while not over.is_set():
            given.add(tuple(tokens(ask(url, prompt, 20))))
            asked += 1
        return asked, given

    with serving(model, tmp_path, "--topology", topology) as (url, process), ThreadPoolExecutor(3) as threads:
        before = {
            server_of(url, process.pid),
            *(engine["pid"] for engine in httpx.get(f"{url}/health").json()["engines"]),
        }
        clients = [threads.submit(client, number) for number in range(3)]
        try:
            asked = command("restart", "--ready-file", tmp_path / "ready.json")
            done = subprocess.run(asked, capture_output=True, text=True, timeout=180)
        finally:
            time.sleep(1)
            over.set()
        for asked_of_it in clients:
            n, given = asked_of_it.result()
            assert n > 1 and len(given) == 1
        assert done.returncode == 0, done
        assert done.stdout.splitlines()[-2:] == ["restarts the server", "all parts have been restarted"]
        assert not any(runs(pid) for pid in before)
        wait_for(lambda: is_up(url), 30)


def test_a_restart_needs_a_server(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    for content, complaint in ((None, "is the server ready?"), ("{}", "is not the ready file"),
                               ('{"orders": "nobody"}', "does not run any more")):  # fmt: skip
        if content is not None:
            ready.write_text(content)
        ended = subprocess.run(command("restart", "--ready-file", ready), capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2 and complaint in ended.stderr, ended


@pytest.mark.parametrize("line", ["", "loads weights", "measures"])
def test_kill_9_during_the_start_leaves_nobody(model: Path, tmp_path: Path, line: str) -> None:
    log = tmp_path / "log"
    with started(log, model, "--store", tmp_path / "kv") as (_, process):
        wait_for(lambda: len(children(process.pid)) > 1 and line in log.read_text(), START_S)
        seen = children(process.pid)
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(runs, seen)), 10)
    assert pools_of(seen) == []


@pytest.mark.parametrize("hears", ["fork server", "an agent"])
def test_a_child_that_stands_still_does_not_outlive_a_killed_supervisor(
    model: Path, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hears: str
) -> None:
    """A stopped process hears nothing, whoever it is. One that does hear, and may end others, is enough."""
    monkeypatch.setenv("TMPDIR", str(short_tmp_path))
    log, ready = short_tmp_path / "log", short_tmp_path / "ready.json"
    with started(log, model, "--store", short_tmp_path / "kv", "--ready-file", ready) as (url, process):
        wait_for(ready.exists, START_S)
        fork_server, seen = parent_of(engine_of(url, "prefill")), children(process.pid)
        agent = httpx.get(f"{url}/health").json()["engines"][0]["agent_pid"]
        for pid in seen:
            if pid != (fork_server if hears == "fork server" else agent):
                os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(runs, seen)), 30)
    if hears == "fork server":  # a killed one's are swept at the next start
        assert pools_of(seen) == []
        left = [
            path for name in ("pymp-*", "dualpath-sockets-*", "dualpath-*/*.sock") for path in short_tmp_path.glob(name)
        ]
        assert left == []


def test_a_fork_server_that_stands_still_is_replaced_and_does_not_keep_serve_from_ending(
    model: Path, tmp_path: Path
) -> None:
    """It alone knows when an engine ends: an engine's death is noticed without it, and a SIGTERM is heard."""
    with serving(model, tmp_path, "--replacement-timeout", str(START_S)) as (url, process):
        right = tokens(ask(url))
        decode = engine_of(url, "decode")
        fork_server, seen = parent_of(decode), children(process.pid)
        os.kill(fork_server, signal.SIGSTOP)
        os.kill(decode, signal.SIGKILL)
        assert tokens(ask(url)) == right
        assert not runs(fork_server)
        os.kill(parent_of(engine_of(url, "decode")), signal.SIGSTOP)
        seen += children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        wait_for(lambda: not any(map(runs, seen)), 10)
        assert pools_of(seen) == []


def test_who_is_told_to_stop_while_starting_does_not_load_engines_first(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(log, model, "--store", tmp_path / "kv") as (_, process):
        wait_for(lambda: "starts engines" in log.read_text(), START_S)
        seen = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "joins" not in log.read_text()
        wait_for(lambda: not any(map(runs, seen)), 10)


def test_an_engine_that_is_killed_while_the_cluster_comes_up_is_started_again(model: Path, tmp_path: Path) -> None:
    log, ready = tmp_path / "log", tmp_path / "ready.json"
    with started(log, model, "--store", tmp_path / "kv", "--ready-file", ready) as (url, process):
        wait_for(lambda: "decode-0: loads weights" in log.read_text(), START_S)
        decode = next(row["pid"] for row in httpx.get(f"{url}/health").json()["starting"] if row["name"] == "decode-0")
        os.kill(decode, signal.SIGKILL)
        wait_for(lambda: ready.exists() or process.poll() is not None, START_S)
        assert tokens(ask(url))
        seen = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert "Traceback" not in log.read_text()
    wait_for(lambda: not any(map(runs, seen)), 10)
