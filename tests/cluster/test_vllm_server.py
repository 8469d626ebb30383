"""vLLM's servers as parts: a fake of vLLM that behaves as badly as the real one, under the real supervisor."""

import asyncio
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dualpath.cluster import parts
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.sessions import session_members
from dualpath.cluster.supervisor import Supervisor
from dualpath.cluster.vllm_parts import vllm_part
from dualpath.cluster.vllm_server import SERVES
from dualpath.cluster.vllm_settings import KEY_VARIABLE, VllmSettings
from dualpath.core.vocabulary import Role
from tests.cluster.fake_api_server import make_python

pytestmark = pytest.mark.slow
WAIT_S = 60.0


async def no_sweep() -> None:
    """Nothing is left behind here."""


class Bench:
    """One server under a supervisor."""

    def __init__(self, folder: Path, role: Role = Role.PREFILL, **settings: object) -> None:
        self.folder = folder
        vllm = VllmSettings(python=make_python(folder), arguments=("--max-model-len", "99"), logs=str(folder))
        config = ClusterConfig(model="m", store="s", engine="vllm", vllm=vllm, served_model_name="tiny", **settings)  # type: ignore[arg-type]
        self.name = f"{role.value}-0"
        self.hopeless: list[str] = []
        self.ended: list[str] = []
        self.steps: list[str] = []
        self.supervisor = Supervisor(
            [vllm_part(config, f"{folder}/agent.sock", role, self.name, ())],
            sweep=no_sweep,
            on_end=lambda _, why: self.ended.append(why),
            on_hopeless=self.hopeless.append,
            on_change=self._note,
        )

    def _note(self) -> None:
        child = self.supervisor.child(self.name)
        if child is not None and child.step not in self.steps[-1:]:
            self.steps.append(child.step)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.01)

    async def serves(self, other_than: int = 0) -> int:
        """Wait until a server answers. Returns the pid of its process of ours, which leads its session."""

        def there() -> bool:
            child = self.supervisor.child(self.name)
            return child is not None and child.pid != other_than and child.step == SERVES

        await self.until(there)
        child = self.supervisor.child(self.name)
        assert child is not None
        self.supervisor.ready(child.ticket)
        await self.until(lambda: len(session_members(child.pid)) == 4)  # ours, vLLM, two that are deaf
        return child.pid

    def notes(self) -> list[dict[str, object]]:
        return [json.loads(path.read_text()) for path in self.folder.iterdir() if path.name.isdecimal()]


@pytest.fixture(autouse=True)
def surroundings(short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(short_tmp_path))
    monkeypatch.setenv(KEY_VARIABLE, "a-key-of-these-tests")


def with_bench(bench: Bench, work: Callable[[Bench], Awaitable[None]]) -> None:
    async def run() -> None:
        sessions: list[int] = []
        try:
            await bench.supervisor.start()
            await work(bench)
        finally:
            sessions = list(bench.supervisor.pids)
            await bench.supervisor.stop()
        assert not any(session_members(session) for session in sessions)

    asyncio.run(run())


def test_a_server_comes_up_and_says_how_far_it_is(short_tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.serves()
        expected = ["starts", "imports vLLM", "reads its configuration", "loads the weights", "starts its HTTP server"]
        heard = iter([*expected, SERVES])
        assert all(step in heard for step in bench.steps), bench.steps  # those that were seen, in this order
        assert bench.steps[-1] == SERVES
        log = short_tmp_path / "prefill-0.log"
        assert "non-default args" in log.read_text() and stat.S_IMODE(log.stat().st_mode) == 0o600

    with_bench(Bench(short_tmp_path), work)


@pytest.mark.parametrize("role", list(Role))
def test_what_a_server_is_given(short_tmp_path: Path, role: Role) -> None:
    async def work(bench: Bench) -> None:
        await bench.serves()
        (told,) = bench.notes()
        argv, environment = told["argv"], told["environment"]
        assert isinstance(argv, list) and isinstance(environment, dict)
        given = {name: argv[index + 1] for index, name in enumerate(argv[:-1])}
        child = bench.supervisor.child(bench.name)
        assert child is not None
        transfer = json.loads(given["--kv-transfer-config"])
        assert transfer["kv_connector_extra_config"] == {
            "role": role.value,
            "agent": f"{short_tmp_path}/agent.sock",
            "url": f"http://127.0.0.1:{given['--port']}",
            "name": bench.name,
            "ticket": child.ticket,
        }
        assert transfer["kv_load_failure_policy"] == "recompute"
        assert ("--no-enable-prefix-caching" in argv) is (role is Role.PREFILL)
        assert (given["--block-size"], given["--dtype"], given["--max-model-len"]) == ("64", "float32", "99")
        assert given["--kv-cache-memory-bytes"] == "5000" and given["--served-model-name"] == "tiny"
        assert environment[KEY_VARIABLE] == "a-key-of-these-tests" and environment["OMP_NUM_THREADS"] == "3"
        assert not any("a-key-of-these-tests" in word for word in argv)
        assert (short_tmp_path / "prefill-0.log").exists() is (role is Role.PREFILL)
        for log in short_tmp_path.glob("*.log"):
            assert "a-key-of-these-tests" not in log.read_text()

    with_bench(Bench(short_tmp_path, role, dtype="float32", hbm_bytes=5000, threads=3), work)


@pytest.mark.parametrize(
    ("ill", "reason"),
    [
        ("refused", "can't run: it can't join: another model"),
        ("usage", "can't run: vLLM: unrecognized arguments: --foo"),
        ("fails", "can't run: vLLM: No available memory for the cache blocks. Try increasing it."),
    ],
)
def test_one_that_can_not_start_says_why(
    short_tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    ill: str,
    reason: str,
) -> None:
    monkeypatch.setenv("FAKE_VLLM", ill)

    async def work(bench: Bench) -> None:
        await bench.until(lambda: bench.hopeless)
        assert bench.hopeless[0].endswith(f"{reason}; its log: {short_tmp_path}/prefill-0.log")

    with_bench(Bench(short_tmp_path), work)
    assert "warnings.warn(" in capfd.readouterr().err  # the end of its log


def test_a_port_that_was_taken_meanwhile_is_no_reason_to_give_up(
    short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "taken")

    async def work(bench: Bench) -> None:
        await bench.serves()
        assert bench.hopeless == [] and "Address already in use" in bench.ended[0]

    with_bench(Bench(short_tmp_path), work)


def test_one_that_is_killed_at_every_start_is_hopeless(short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "killed")

    async def work(bench: Bench) -> None:
        await bench.until(lambda: bench.hopeless)
        assert "vLLM was ended by signal SIGKILL, as the system does when memory is short" in bench.hopeless[0]
        assert len(bench.ended) == 5

    with_bench(Bench(short_tmp_path), work)


def test_one_that_ends_later_is_brought_back(short_tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.serves()
        (short_tmp_path / "crash").touch()
        await bench.serves(other_than=first)
        assert "vLLM has ended: CUDA out of memory." in bench.ended[0] and bench.hopeless == []
        assert not session_members(first)
        urls = {json.dumps(told["argv"]) for told in bench.notes()}
        assert len(urls) == 2

    with_bench(Bench(short_tmp_path), work)


def test_when_ours_is_killed_nothing_of_it_stays(short_tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.serves()
        os.kill(first, signal.SIGKILL)
        await bench.until(lambda: bench.ended)
        assert not session_members(first)
        await bench.serves(other_than=first)

    with_bench(Bench(short_tmp_path), work)


def test_a_kill_returns_when_all_of_it_is_dead(short_tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.serves()
        child = bench.supervisor.child(bench.name)
        assert child is not None
        await asyncio.to_thread(bench.supervisor.kill, child.ticket)
        assert not session_members(first)

    with_bench(Bench(short_tmp_path), work)


def test_when_the_supervisor_is_killed_nothing_stays(short_tmp_path: Path) -> None:
    program = """
import asyncio, sys
from pathlib import Path
from tests.cluster.test_vllm_server import Bench

async def run():
    bench = Bench(Path(sys.argv[1]))
    await bench.supervisor.start()
    print(await bench.serves(), flush=True)
    await asyncio.Event().wait()

if __name__ == "__main__":
    asyncio.run(run())
"""
    script = short_tmp_path / "supervisor.py"
    script.write_text(program)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    }
    with subprocess.Popen(
        [sys.executable, str(script), str(short_tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    ) as supervisor:
        assert supervisor.stdout is not None
        leader = int(supervisor.stdout.readline())
        try:
            assert len(session_members(leader)) == 4
        finally:
            supervisor.kill()
    give_up_s = time.monotonic() + WAIT_S
    while session_members(leader) and time.monotonic() < give_up_s:
        time.sleep(0.01)
    assert not session_members(leader)


def test_a_log_does_not_grow_without_end(
    short_tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualpath.cluster import vllm_server

    monkeypatch.setattr(vllm_server, "LOG_BYTES", 1000)
    monkeypatch.setattr(vllm_server, "end_session", lambda _: True)
    monkeypatch.setattr(vllm_server, "start_log", lambda _: None)
    noise = "import sys; [print('x' * 80, flush=True) for _ in range(3000)]; sys.exit('ValueError: enough')"
    config = vllm_server.VllmServerConfig(
        name="a",
        command=[sys.executable, "-c", noise],
        environment={},
        host="127.0.0.1",
        port=1,
        log=str(short_tmp_path / "a.log"),
    )
    told: list[str] = []
    with caplog.at_level(logging.WARNING, "dualpath"), pytest.raises(SystemExit):
        vllm_server.run_vllm(config, told.append)
    assert told[-1].startswith("can't run: vLLM: enough")
    assert 0 < sum(path.stat().st_size for path in short_tmp_path.glob("a.log*")) < 2 * (1000 + (1 << 16))
    assert caplog.text.count("x" * 80) == 19
