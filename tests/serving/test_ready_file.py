"""The ready file is there while its server serves, and tells of no other one."""

import json
import logging
import stat
from pathlib import Path

import pytest

from dualpath.serving.ready_file import ReadyFile


def test_it_is_there_while_requests_are_served(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    path.write_text('{"pid": "of one that was killed"}')
    with ReadyFile(str(path)) as ready:
        assert not path.exists()
        ready.write({"pid": 1})
        ready.write({"pid": 2})
        assert json.loads(path.read_bytes()) == {"pid": 2}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []


def test_one_that_never_served_and_one_without_a_path(tmp_path: Path) -> None:
    with ReadyFile(str(tmp_path / "ready.json")):
        pass
    with ReadyFile(None) as none:
        none.write({"pid": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", '{"pid": 2}'])
def test_another_servers_file_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ready.json"
    with ReadyFile(str(path)) as ready:
        if content:
            ready.write({"pid": 1})
        path.write_text(content)
    assert path.read_text() == content


def test_a_folder_that_went_is_an_error_of_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with ReadyFile(str(folder / "ready.json")) as ready, caplog.at_level(logging.ERROR):
        folder.rmdir()
        ready.write({"pid": 1})
    assert caplog.messages == [f"--ready-file: {folder}/ready.json can't be written: No such file or directory"]
    assert caplog.records[0].exc_info is None
