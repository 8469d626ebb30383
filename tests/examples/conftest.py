"""Packages of somebody else's, as if installed: modules and entry points on a path, nothing of ours changed."""

import os
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def install(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Puts ``examples/NAME`` on a path as pip would; returns the environment of a process that has it."""

    def put(name: str) -> dict[str, str]:
        site = tmp_path / "site"
        project = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
        groups = project["entry-points"]
        lines = [f"[{group}]\n" + "\n".join(f"{n} = {at}" for n, at in groups[group].items()) for group in groups]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
        for module in (EXAMPLES / name).glob("*.py"):
            shutil.copy(module, site)
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}

    return put
