"""`dualpath serve --engine vllm` with real vLLM servers: one command brings all up, keeps it up, and takes it down."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm_models import MODELS
from vllm_servers import MAX_MODEL_LEN, NAME, START_S, VLLM_PYTHON, cluster, wait_for

from dualpath.cluster.sessions import session_members
from dualpath.model.checkpoint import make_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
END_S = 30.0


@pytest.fixture
def running(
    short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, "subprocess.Popen[bytes]", list[int]]]:
    """A cluster's URL, its process, and the sessions of its servers."""
    if not VLLM_PYTHON.exists():
        pytest.skip("there is no .venv-vllm: make setup-vllm")
    monkeypatch.setenv("TMPDIR", str(short_tmp_path))
    model = make_checkpoint(short_tmp_path / "model", "qwen3", seed=11, **MODELS["qwen3"])  # type: ignore[arg-type]
    with cluster(model, short_tmp_path, "--vllm-logs", str(short_tmp_path / "logs")) as (url, process):
        yield url, process, sessions_below(process.pid)


def sessions_below(pid: int) -> list[int]:
    """Children that lead a session: whichever thread has started them."""
    told = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return sorted(child for child in map(int, told.split()) if os.getsid(child) == child)


def chat(url: str) -> Any:
    body: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "What is a cache? " * 40}],
        "max_tokens": 8,
    }
    body["ignore_eos"] = True
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    return answer.json() if answer.status_code == 200 else None


def engines(url: str) -> list[dict[str, Any]]:
    health = httpx.get(f"{url}/health", timeout=10, trust_env=False).json()
    return health["engines"] if not health["starting"] else []


def is_another(engine: dict[str, Any], worker: int) -> bool:
    return bool(engine["role"] == "prefill" and engine["pid"] != worker)


def left_of(sessions: list[int]) -> set[int]:
    return set().union(*(session_members(session) for session in sessions))


def test_one_command_serves_and_leaves_nothing(
    running: tuple[str, "subprocess.Popen[bytes]", list[int]], short_tmp_path: Path
) -> None:
    url, process, sessions = running
    agents = [engine["agent_pid"] for engine in engines(url)]
    assert len(sessions) == len(agents) == 2 and len(left_of(sessions)) > 6  # ours, API server, core, worker, trackers
    answer = chat(url)
    assert answer["usage"]["completion_tokens"] == 8 and answer["usage"]["prompt_tokens"] < MAX_MODEL_LEN
    process.terminate()
    assert process.wait(END_S) == 0
    assert not left_of(sessions)
    assert not list(short_tmp_path.glob("dualpath-sockets-*"))
    assert not [path for agent in agents for path in Path("/dev/shm").glob(f"dualpath-{agent}-*")]
    logs = "".join(path.read_text() for path in (short_tmp_path / "logs").iterdir())
    assert "Application startup complete" in logs and "Traceback" not in logs


def test_a_part_of_vllm_that_dies_is_brought_back_and_a_killed_command_leaves_nothing(
    running: tuple[str, "subprocess.Popen[bytes]", list[int]],
) -> None:
    url, process, sessions = running
    before = engines(url)
    worker = next(engine["pid"] for engine in before if engine["role"] == "prefill")
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: any(is_another(engine, worker) for engine in engines(url)), START_S, "another server")
    assert chat(url) is not None
    sessions = sorted({*sessions, *sessions_below(process.pid)})
    assert len(sessions) == 3
    process.kill()
    wait_for(lambda: not left_of(sessions), END_S, "the end of all servers")
