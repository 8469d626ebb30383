import asyncio
import os
import signal
import sys
import time

import psutil
import pytest

from dualpath.lab.experiments import local_cluster as cluster_module
from dualpath.lab.experiments.conditions import Bench, Conditions
from dualpath.lab.experiments.local_cluster import ClusterProcess, LaunchError, LocalLauncher

pytestmark = pytest.mark.slow


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def start(tmp_path):
    def make(command, timeout_s=20):
        ready = tmp_path / "ready.json"
        return ClusterProcess("c", [*command, "--ready-file", str(ready)], ready, tmp_path / "c.log", timeout_s)

    return make


@pytest.fixture
def fake(start, fake_serve, tmp_path):
    return lambda *more: start([*fake_serve, "--store", str(tmp_path), *more])


def pid_of(cluster):
    return cluster._process.pid


@pytest.mark.parametrize(("asked", "given"), [(None, False), ("nixl", True)])
def test_a_cluster_moves_kv_by_what_is_asked_for(tmp_path, asked, given):
    launcher = LocalLauncher(Conditions(), Bench(transport=asked), tmp_path, tmp_path)
    command = list(launcher.cluster("c", "1P1D", "dualpath", tmp_path, limited=True)._command)
    assert ("--transport" in command) is given
    assert not given or command[command.index("--transport") + 1] == asked


def test_a_cluster_is_entered_ready_and_left_ended(fake):
    async def main():
        async with fake() as cluster:
            assert cluster.url.startswith("http://127.0.0.1:")
            assert psutil.pid_exists(pid_of(cluster))
            assert await cluster.run(asyncio.sleep(0, "done")) == "done"
        return pid_of(cluster), cluster._process.returncode

    pid, code = asyncio.run(main())
    assert not psutil.pid_exists(pid)
    assert code in (0, -signal.SIGTERM)


def test_a_cluster_deaf_to_sigterm_is_killed(fake, monkeypatch):
    monkeypatch.setattr(cluster_module, "STOP_GRACE_S", 0.3)

    async def main():
        async with fake("--deaf") as cluster:
            pass
        return cluster._process.returncode

    assert asyncio.run(main()) == -signal.SIGKILL


def test_engines_whose_leader_died_are_ended_too(start, tmp_path):
    leader = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); sys.exit('gone')"
    )

    async def main():
        async with start(python(leader)):
            pass

    with pytest.raises(LaunchError, match=r"exit code 1\. The end of .*c\.log:\n  gone"):
        asyncio.run(main())
    pid = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the orphan lives"
        time.sleep(0.02)


def test_work_ends_with_the_cluster_it_needs(fake):
    async def main():
        async with fake() as cluster:
            os.kill(pid_of(cluster), signal.SIGKILL)
            await cluster.run(asyncio.sleep(60))

    with pytest.raises(LaunchError, match="ended by itself, exit code -9"):
        asyncio.run(main())


def test_an_error_of_work_on_a_live_cluster_is_its_own(fake, monkeypatch):
    monkeypatch.setattr(cluster_module, "REAP_S", 0.1)

    async def fail():
        raise LookupError("mine")

    async def main():
        async with fake() as cluster:
            await cluster.run(fail())

    with pytest.raises(LookupError, match="mine"):
        asyncio.run(main())


def test_an_error_of_work_that_the_clusters_death_caused_is_called_that(fake):
    async def break_then_fail(cluster):
        os.kill(pid_of(cluster), signal.SIGKILL)
        raise ConnectionError("refused")

    async def main():
        async with fake() as cluster:
            await cluster.run(break_then_fail(cluster))

    with pytest.raises(LaunchError, match="ended by itself"):
        asyncio.run(main())


def test_a_cluster_that_is_never_ready_meets_the_deadline(start):
    async def main():
        async with start(python("print('loading', flush=True); import time; time.sleep(60)"), timeout_s=0.5):
            pass

    with pytest.raises(LaunchError, match=r"not ready within 0\.5 s\. The end of .*:\n  loading"):
        asyncio.run(main())


def test_a_ready_file_of_another_kind_is_refused(start, tmp_path):
    code = f"open({str(tmp_path / 'ready.json')!r}, 'w').write('[]'); import time; time.sleep(60)"

    async def main():
        async with start(python(code)):
            pass

    with pytest.raises(LaunchError, match=r"ready\.json has an unknown form"):
        asyncio.run(main())
