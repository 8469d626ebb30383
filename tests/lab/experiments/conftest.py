import pathlib
import sys

import pytest

from dualpath.lab.experiments import nic_bytes

FAKE = pathlib.Path(__file__).parents[2] / "client" / "fake_openai.py"


@pytest.fixture(autouse=True)
def short_settling(monkeypatch):
    """The stand-in's counters are never behind."""
    monkeypatch.setattr(nic_bytes, "SETTLE_S", 0.02)


@pytest.fixture
def fake_serve():
    """The command line of a stand-in for `dualpath serve`."""
    return (sys.executable, str(FAKE))
