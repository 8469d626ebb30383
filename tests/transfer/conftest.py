"""Fixtures of the transfer tests. ``--transport NAME`` runs the conformance suite over another package's transport."""

import sys
from pathlib import Path

import pytest
from channel_pair import Pair

from dualpath.transfer import TRANSPORTS

EXAMPLE = Path(__file__).parents[2] / "examples" / "transport_plugin"
MORE = ("nixl@tcp", "dualpath_procmem:TRANSPORT")
sys.path.append(str(EXAMPLE))


def pytest_addoption(parser):
    parser.addoption("--transport", action="append", metavar="NAME", help="conformance suite: this one alone")


def pytest_generate_tests(metafunc):
    """A test that takes a `transport` runs over all, or over those that its module names in `TRANSPORT_NAMES`."""
    if "transport" in metafunc.fixturenames:
        given = metafunc.config.getoption("--transport", None) or [*TRANSPORTS.names(), *MORE]
        names = getattr(metafunc.module, "TRANSPORT_NAMES", dict.fromkeys(given))
        metafunc.parametrize("transport", names, indirect=True)


@pytest.fixture
def transport(request, monkeypatch):
    """A transport's name. ``nixl@tcp``: with what UCX does between hosts without RDMA; by itself it takes CMA here."""
    name, _, ucx = request.param.partition("@")
    if ucx:
        monkeypatch.setenv("UCX_TLS", ucx)
    return name


@pytest.fixture
def pair(transport):
    pair = Pair(transport)
    yield pair
    pair.close()
