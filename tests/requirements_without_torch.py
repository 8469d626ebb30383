"""Prints all that the project, its extras and its tests require, one a line, but torch and what requires it."""

import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
required = chain(project["dependencies"], *project["optional-dependencies"].values())
print(*(one for one in required if not one.startswith(("torch", "accelerate", "nixl", project["name"]))), sep="\n")
