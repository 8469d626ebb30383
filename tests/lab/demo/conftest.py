import pathlib
import sys

import pytest

from dualpath.lab.experiments import nic_bytes
from dualpath.lab.experiments.demo.options import DemoOptions

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
def options(tmp_path, fake_serve):
    """Small, fast and away from the checkout; the model is never opened by the stand-in."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_text("{}")
    return DemoOptions(
        topologies=("1P2D",),
        systems=("basic", "dualpath"),
        agents=3,
        turns=2,
        first_context_tokens=200,
        append_tokens=70,
        generate_tokens=4,
        model=model,
        out=tmp_path / "results",
        work=tmp_path / "store",
        serve_command=fake_serve,
        start_timeout_s=30,
    )
