"""docs/api.md lists the public Python API, name for name, and its examples run; so does README's."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import GUIDES, block

import dualpath

TEXT = GUIDES["docs/api.md"]
ROWS = re.findall(r"^\| `(\w+)(?:\(([^`]*)\))?` \|", TEXT, re.MULTILINE)
EXAMPLES = [*block(TEXT, "python"), *block(GUIDES["README.md"], "python")]
ALONE = [code for code in EXAMPLES if "Server(" not in code]
WITH_A_CLUSTER = [code for code in EXAMPLES if "Server(" in code]


def test_every_public_name_is_listed_once_and_no_other() -> None:
    assert sorted([*(name for name, _ in ROWS), "__version__"]) == sorted(dualpath.__all__)


@pytest.mark.parametrize(("name", "said"), [row for row in ROWS if row[1]])
def test_what_a_name_takes_is_what_it_says(name: str, said: str) -> None:
    taken = inspect.signature(getattr(dualpath, name)).parameters
    named = [part.strip("* ") for part in said.split(",") if part.strip() != "*"]
    if name == "ClusterConfig":  # the most used of many
        assert set(named) < set(taken)
    else:
        assert named == list(taken)
    keyword_only = said.partition("*, ")[2].split(", ") if "*, " in said else []
    for one in keyword_only:
        assert taken[one.strip("*")].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


def test_every_function_is_listed_with_what_it_takes() -> None:
    functions = {name for name in dualpath.__all__ if inspect.isfunction(getattr(dualpath, name))}
    assert len(functions) > 10
    assert functions <= {name for name, said in ROWS if said}


def test_there_are_examples_of_both_kinds() -> None:
    assert len(ALONE) >= 4 and len(WITH_A_CLUSTER) >= 3
    assert len(block(GUIDES["README.md"], "python")) == 1


@pytest.fixture
def a_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `dualpath demo` leaves it, with a result file of other tests."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "results")
    from synthetic_results import synthetic

    from dualpath.results.file import write_results

    (tmp_path / "results").mkdir()
    write_results(synthetic(agents=2, rounds=2), tmp_path / "results" / "demo.json")
    return tmp_path


def run(code: str, folder: Path) -> str:
    (folder / "example.py").write_text(code)
    command = [sys.executable, "example.py"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("code", ALONE, ids=str.split("plan agents results systems"))
def test_an_example_runs(code: str, a_demo: Path) -> None:
    assert run(code, a_demo).strip()


@pytest.mark.slow
@pytest.mark.parametrize("code", WITH_A_CLUSTER, ids=str.split("ask replay readme"))
def test_an_example_with_a_cluster_runs(code: str, tmp_path: Path, needs_torch: None) -> None:
    shown = run(code, tmp_path).splitlines()
    assert shown
    if "cached_tokens)  # 0, then 320" in code:
        assert shown[-2:] == ["0", "320"]
    if "again" in code:
        assert shown[-1].split()[:2] == ["True", "0"] and int(shown[-1].split()[2]) > 0
