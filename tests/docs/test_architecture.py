"""What docs/architecture.md draws and lists is what the code does."""

import re
import tomllib

from documents import GUIDES, ROOT, section

from dualpath.core.request import render_table

TEXT = GUIDES["docs/architecture.md"]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def test_the_request_states_are_those_of_the_table() -> None:
    drawn = TEXT.partition("<!-- request-states -->\n")[2].partition("\n<!-- /request-states -->")[0]
    assert drawn == render_table()


def test_the_packages_stand_in_the_order_of_the_import_contracts() -> None:
    rows = [set(re.findall(r"`(\w+)`", row)) for row in re.findall(r"^\| (`.*?) \|", section(TEXT, "Packages"), re.M)]
    layers = [set(layer.split(" | ")) for one in CONTRACTS if one["type"] == "layers" for layer in one["layers"]]
    assert len(layers) > 10
    assert rows == layers


def test_every_step_of_a_requests_life_names_a_file() -> None:
    steps = re.findall(r"^\| (\d+) \| (.*?) \|", section(TEXT, "The life of a request"), re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    assert len(steps) > 10 and all(".py:" in files for _, files in steps)
