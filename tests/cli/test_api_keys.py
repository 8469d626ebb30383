"""Keys of ``dualpath serve``: from a file, the environment and the arguments, and to no other process."""

import argparse
import os

import pytest

from dualpath.cli.api_keys import KEY_VARIABLE, add_key_options, api_keys
from dualpath.cli.outcome import UsageError


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_key_options(parser)
    return parser.parse_args(argv)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst\n\n  second  \nfirst\n")
    path.chmod(0o640)
    return path


def test_keys_come_from_everywhere_once(key_file, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "third")
    assert api_keys(parsed("--api-key", "zero", "--api-key-file", str(key_file))) == (
        "zero",
        "first",
        "second",
        "third",
    )
    assert KEY_VARIABLE not in os.environ  # for what this process starts
    assert api_keys(parsed()) == ()


def test_a_file_that_others_can_read_is_refused(key_file):
    key_file.chmod(0o644)
    with pytest.raises(UsageError, match=r"every user of this host has access to .*keys; chmod o-rwx"):
        api_keys(parsed("--api-key-file", str(key_file)))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "has no key"),
        (b"# none\n", "has no key"),
        (b"\xff", "can't read"),
        (b"ours\nkey with space\n", "keys: a key has a space"),
        ("schlüssel".encode(), "beyond ASCII"),
    ],
)
def test_a_file_without_a_key_is_refused(key_file, content, why):
    key_file.write_bytes(content)
    with pytest.raises(UsageError, match=why):
        api_keys(parsed("--api-key-file", str(key_file)))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="can't read"):
        api_keys(parsed("--api-key-file", str(tmp_path / "none")))


def test_a_fifo_is_refused_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(UsageError, match=r"--api-key-file: .*fifo is no regular file"):
        api_keys(parsed("--api-key-file", str(tmp_path / "fifo")))


def test_a_key_that_can_not_be_sent_is_refused_and_not_shown(monkeypatch):
    with pytest.raises(UsageError, match=r"^--api-key: a key has a space") as told:
        api_keys(parsed("--api-key", "open sesame"))
    assert "sesame" not in str(told.value)
    monkeypatch.setenv(KEY_VARIABLE, "a\nb")
    with pytest.raises(UsageError, match=r"^\$DUALPATH_API_KEY: a key has a space"):
        api_keys(parsed())


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_is_refused(key, monkeypatch):
    """It would let in whoever sends none."""
    with pytest.raises(UsageError, match="empty"):
        api_keys(parsed("--api-key", key))
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(UsageError, match="empty"):
        api_keys(parsed())


def test_the_help_says_who_can_read_a_key(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    assert "Every user of this host can read it" in " ".join(capsys.readouterr().out.split())
