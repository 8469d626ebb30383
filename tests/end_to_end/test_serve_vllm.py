"""`dualpath serve --engine vllm` with a fake of vLLM: how it starts, fails, ends. (The real: tests/vllm_serving.)"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dualpath.cluster.sessions import session_members
from tests.cluster.fake_api_server import make_python

from .test_serve import wait_for
from .test_start import children, started

pytestmark = pytest.mark.slow
END_S = 20.0


class Fake:
    """A model, an interpreter with a fake vLLM, and what the fake notes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.options: list[str | Path] = ["--engine", "vllm", "--model", model, "--store", folder / "store"]
        self.options += ["--vllm-python", make_python(folder), "--vllm-logs", folder / "logs"]

    def sessions(self) -> list[int]:
        """Of all servers that have come as far as HTTP."""
        notes = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        return [json.loads(path.read_text())["session"] for path in notes]

    def is_over(self) -> bool:
        return not any(session_members(session) for session in self.sessions())


@pytest.fixture
def fake(model: Path, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(short_tmp_path))
    monkeypatch.setenv("TMPDIR", str(short_tmp_path))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    yield Fake(short_tmp_path, model)


def loading(url: str) -> dict[str, str]:
    """What /health says of the parts that are not ready."""
    try:
        told = httpx.get(f"{url}/health", timeout=5).json()
    except httpx.TransportError:
        return {}
    assert told["status"] == "loading"
    return {part["name"]: part["step"] for part in told["starting"]}


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_it_says_how_far_vllm_is_and_takes_everything_down(fake: Fake, by: signal.Signals) -> None:
    with started(fake.log, *fake.options, "--topology", "1P2D") as (url, process):
        engines = {"prefill-0", "decode-0", "decode-1"}
        wait_for(lambda: {name for name, step in loading(url).items() if step == "joins"} == engines, 60.0)
        assert len(fake.sessions()) == 3
        assert httpx.post(f"{url}/v1/chat/completions", json={}).json()["error"]["code"] == "loading"
        pids = children(process.pid)
        process.send_signal(by)
        process.wait(END_S)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids) and fake.is_over(), END_S)
    said = fake.log.read_text()
    assert f"starts 3 servers of vLLM 0.32.0; their logs: {fake.folder}/logs" in said
    assert "engine decode-1" in said and "loads the weights" in said
    keys = {json.loads((fake.folder / str(pid)).read_text())["environment"]["VLLM_API_KEY"] for pid in fake_pids(fake)}
    assert len(keys) == 1 and keys.isdisjoint({""})
    assert keys.pop() not in said + "".join(path.read_text() for path in (fake.folder / "logs").iterdir())
    if by is signal.SIGTERM:
        assert not list(fake.folder.glob("dualpath-sockets-*"))


def fake_pids(fake: Fake) -> list[int]:
    return [int(path.name) for path in fake.folder.iterdir() if path.name.isdecimal()]


def test_why_vllm_does_not_start_is_the_last_line(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "fails")
    with started(fake.log, *fake.options) as (_, process):
        assert process.wait(60.0) == 1
    lines = fake.log.read_text().splitlines()
    assert "No available memory for the cache blocks. Try increasing it." in lines[-1]
    assert lines[-1].startswith("dualpath serve: ") and "; its log: " in lines[-1]
    assert any("Traceback (most recent call last)" in line for line in lines)  # of the log's end
    assert fake.is_over()


def test_a_server_that_dies_is_brought_back(fake: Fake) -> None:
    with started(fake.log, *fake.options) as (url, process):
        wait_for(lambda: list(loading(url).values()).count("joins") == 2, 60.0)
        victim = fake_pids(fake)[0]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(fake_pids(fake)) == 3, 60.0)
        wait_for(lambda: list(loading(url).values()).count("joins") == 2, 60.0)
        assert "vLLM was ended by signal SIGKILL" in fake.log.read_text()
        process.terminate()
        assert process.wait(END_S) == 0
    assert fake.is_over()
