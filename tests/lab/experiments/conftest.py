import pathlib
import sys

import pytest

from dualpath.lab.experiments import nic_bytes
from dualpath.lab.experiments.conditions import Bench

FAKE = pathlib.Path(__file__).parents[2] / "client" / "fake_openai.py"


@pytest.fixture(autouse=True)
def short_settling(monkeypatch):
    """The stand-in's counters are never behind."""
    monkeypatch.setattr(nic_bytes, "SETTLE_S", 0.02)


@pytest.fixture
def fake_serve():
    """The command line of a stand-in for `dualpath serve`."""
    return (sys.executable, str(FAKE))


@pytest.fixture
def bench(tmp_path, fake_serve):
    """Away from the checkout; the model is never opened by the stand-in."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_text("{}")
    return Bench(
        model=model, out=tmp_path / "out", work=tmp_path / "store", serve_command=fake_serve, start_timeout_s=30
    )
