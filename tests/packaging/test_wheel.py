"""The wheel, built once and used installed: everything that is not Python is in it, and its commands serve and plan."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from dualpath.traces.paper import paper_agents

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dualpath"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(target), versions=["standard"])
    return Path(built)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, timeout=120)
    return target


def run(installed: Path, code: str, *argv: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code, *argv]
    ended = subprocess.run(
        command, cwd=installed, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {f"dualpath/{path.relative_to(SOURCE)}" for path in SOURCE.rglob("*") if _is_ours(path)}
    assert {name for name in ours if name.endswith((".toml", ".js", ".css", ".j2", "py.typed"))}
    assert ours <= names


def test_the_installed_package_is_the_one_that_is_used(installed: Path) -> None:
    assert run(installed, "import dualpath; print(dualpath.__file__)").strip().startswith(str(installed))


def test_the_installed_commands_plan_simulate_and_report(installed: Path, tmp_path: Path) -> None:
    main = "import sys; from dualpath.cli import main; sys.exit(main(sys.argv[1:]))"
    plan, simulated = tmp_path / "plan.json", tmp_path / "simulated.json"
    run(installed, main, "plan", "ds660b-2p4d", "--json", str(plan))
    run(installed, main, "simulate", "ds27b-1p1d", "--trace", "32K", "--agents", "2", "--json", str(simulated))
    assert json.loads(plan.read_bytes())["gain"] > 1
    assert json.loads(simulated.read_bytes())["turns"] == paper_agents("32K", 2).turns.sum()


@pytest.mark.slow
def test_the_installed_package_serves(installed: Path, tmp_path: Path) -> None:
    code = """
import sys
import dualpath
if __name__ == "__main__":
    from dualpath.model import make_checkpoint
    model = str(make_checkpoint(sys.argv[1] + "/tiny", "qwen3", seed=7))
    with dualpath.Server(dualpath.ClusterConfig(model=model, store=sys.argv[1] + "/store", port=0)) as server:
        prompt = [number % 97 + 3 for number in range(200)]
        first = server.ask(prompt, max_tokens=4, temperature=0)
        print(first.cached_tokens, server.ask(prompt, max_tokens=4, temperature=0).cached_tokens)
"""
    (tmp_path / "serve.py").write_text(code)
    runner = "import runpy, sys; runpy.run_path(sys.argv[1] + '/serve.py', run_name='__main__')"
    assert run(installed, runner, str(tmp_path)).splitlines()[-1] == "0 192"


def _is_ours(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts
