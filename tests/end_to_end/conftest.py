"""What these tests serve."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dualpath.model.checkpoint import make_checkpoint  # not above: it needs torch

    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "qwen3", seed=7)
