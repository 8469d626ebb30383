"""What these tests serve."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--garbage-frames", type=int, default=2_000, metavar="N", help="at each port, of test_attack")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dualpath.model.checkpoint import make_checkpoint  # not above: it needs torch

    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "qwen3", seed=7)
