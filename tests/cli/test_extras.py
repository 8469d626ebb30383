"""A command whose extra is not installed says which one, in one line; other missing modules keep their traceback."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dualpath.spec.extras import how_to_install

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from dualpath.cli import main
sys.exit(main({argv!r}))
"""


def run_without(absent: set[str], *argv: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(absent=absent, argv=list(argv))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_command_says_which_extra_it_misses() -> None:
    ended = run_without({"obstore"}, "store", "stat", "s3://bucket/prefix")
    assert ended.returncode == 1
    assert ended.stderr == "dualpath store: obstore is not installed; pip install 'dualpath[s3]' brings it\n"


def test_planning_and_simulating_need_no_extra() -> None:
    absent = {"plotly", "matplotlib", "obstore", "pandas", "torch"}
    assert run_without(absent, "plan", "ds660b-2p4d").returncode == 0
    assert run_without(absent, "simulate", "ds27b-1p1d", "--trace", "32K", "--agents", "2").returncode == 0


@pytest.mark.parametrize(("module", "extra"), [("obstore", "s3"), ("matplotlib.pyplot", "lab")])
def test_the_hint_is_what_the_metadata_says(module: str, extra: str) -> None:
    assert any(module.partition(".")[0] in line for line in PROJECT["optional-dependencies"][extra])
    assert f"dualpath[{extra}]" in str(how_to_install(ModuleNotFoundError(name=module)))


@pytest.mark.parametrize("module", ["torch", "no_such_module", "pytest"])
def test_what_no_extra_brings_has_no_hint(module: str) -> None:
    assert how_to_install(ModuleNotFoundError(name=module)) is None
