"""docs/how-to/replay.md and ``dualpath replay --help``: every command in them is one that the command line takes."""

import pathlib
import re
import shlex

import pytest

from dualpath.cli import build_parser
from dualpath.cli.replay import EXAMPLES

DOCUMENT = (pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "replay.md").read_text(encoding="utf-8")


def commands(text):
    lines = re.findall(r"^ *(dualpath replay .*)$", text, re.MULTILINE)
    return [re.split(r"  +#|   +", line)[0] for line in lines]


@pytest.mark.parametrize("line", [*commands(DOCUMENT), *commands(EXAMPLES)])
def test_commands_are_understood(line):
    arguments = build_parser().parse_args(shlex.split(line)[1:])
    assert arguments.command == "replay" and arguments.url.startswith(("http://", "URL"))


def test_there_are_some_in_both():
    assert len(commands(DOCUMENT)) >= 4 and len(commands(EXAMPLES)) >= 7


def test_options_that_the_document_names_exist():
    help_text = next(
        action.choices["replay"].format_help() for action in build_parser()._actions if isinstance(action.choices, dict)
    )
    named = set(re.findall(r"`(--[a-z-]+)", DOCUMENT)) - {"--enable-prompt-tokens-details", "--enable-cache-report"}
    assert len(named) > 15
    assert [option for option in sorted(named) if not re.search(rf"{option}\b", help_text)] == []
