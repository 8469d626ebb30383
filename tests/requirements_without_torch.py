"""Prints what the project and its tests require, one a line, without torch."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
required = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
print(*(one for one in required if not one.startswith("torch")), sep="\n")
