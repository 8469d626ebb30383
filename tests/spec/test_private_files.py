"""Files of running processes are their user's alone."""

import stat
import tempfile
from pathlib import Path

import pytest

from dualpath.spec.private_files import private_opener, runtime_directory


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_is_private_and_what_is_there_keeps_its_mode(tmp_path: Path) -> None:
    made, there = tmp_path / "made", tmp_path / "there"
    there.touch()
    there.chmod(0o640)
    for path in (made, there):
        with open(path, "wb", opener=private_opener) as file:
            file.write(b"x")
    assert (mode(made), mode(there)) == (0o600, 0o640)


def test_the_directory_is_private_and_made_private_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_directory() == tmp_path / "dualpath"
    runtime_directory().chmod(0o755)
    assert mode(runtime_directory()) == 0o700


def test_without_one_of_the_system_it_is_in_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert runtime_directory().parent == tmp_path
