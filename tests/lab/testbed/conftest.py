"""A testbed of its own for each test that needs one; skipped where this is no place for network namespaces."""

from collections.abc import Iterator

import pytest
from bed import CNIC, NAME, SNIC, SUBNET

from dualpath.lab.testbed import network
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.network import Testbed
from dualpath.lab.testbed.plan import Rates, make_plan


@pytest.fixture(scope="session")
def privileged() -> None:
    """Only trying tells whether a container may do this."""
    try:
        network.up(make_plan(NAME, 1, 1, SUBNET), Rates(1_000_000, 1_000_000))
        network.down(NAME)
    except TestbedError as error:
        pytest.skip(f"no testbed here: {error}")


@pytest.fixture
def testbed_name(privileged: None) -> Iterator[str]:
    yield NAME
    network.down(NAME)


@pytest.fixture
def testbed(testbed_name: str) -> Testbed:
    """1P2D, with rates that a busy machine still reaches."""
    return network.up(make_plan(testbed_name, 1, 2, SUBNET), Rates(SNIC, CNIC))
