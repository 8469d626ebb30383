"""Fixtures of the transfer tests. ``--transport NAME`` runs the conformance suite over another package's transport."""

import sys
from pathlib import Path

import pytest
from channel_pair import Pair

from dualpath.transfer import TRANSPORTS

EXAMPLE = Path(__file__).parents[2] / "examples" / "transport_plugin"
sys.path.append(str(EXAMPLE))


def pytest_addoption(parser):
    parser.addoption("--transport", action="append", metavar="NAME", help="conformance suite: this one alone")


def pytest_generate_tests(metafunc):
    """A test that takes a `transport` runs over all, or over those that its module names in `TRANSPORT_NAMES`."""
    if "transport" in metafunc.fixturenames:
        given = metafunc.config.getoption("--transport", None) or [*TRANSPORTS.names(), "dualpath_procmem:TRANSPORT"]
        metafunc.parametrize("transport", getattr(metafunc.module, "TRANSPORT_NAMES", dict.fromkeys(given)))


@pytest.fixture
def pair(transport):
    pair = Pair(transport)
    yield pair
    pair.close()
