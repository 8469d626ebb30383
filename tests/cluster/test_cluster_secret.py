"""The cluster's secret: where it comes from, and where it is never seen."""

import os
import pickle
import stat
from pathlib import Path

import msgspec
import pytest

from dualpath.cluster.cluster_secret import ClusterSecret, MadeSecret, cluster_secret, secret_of_environment
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.preflight import NotReadyError, _check_loopback
from dualpath.spec.private_files import private_opener
from dualpath.transfer.pool_files import sweep_dead_files

TEXT = "correct horse battery staple and more"


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "dualpath"


def test_equal_secrets_give_equal_keys_and_purposes_differ() -> None:
    one, same, other = ClusterSecret(TEXT), ClusterSecret(f" {TEXT}\n"), ClusterSecret(TEXT + "!")
    assert one == same != other
    assert one.data_key == same.data_key
    assert len({one.data_key, other.data_key, one.key("control client"), one.key("control server")}) == 4
    assert pickle.loads(pickle.dumps(one)) == one


def test_no_text_shows_a_secret() -> None:
    config = ClusterConfig(model="m", store="s", cluster_secret=ClusterSecret(TEXT), api_keys=("sesame",))
    for shown in (repr(config), str(config), repr(config.cluster_secret), repr({"c": config})):
        assert TEXT not in shown and "sesame" not in shown and config.secret.data_key.hex() not in shown
    with pytest.raises(TypeError):
        msgspec.json.encode(config)
    assert config.without_api_keys().cluster_secret == config.cluster_secret


def test_a_secret_that_can_be_guessed_is_refused_without_telling_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 6 characters; it must have 32") as refused:
        ClusterSecret("sesame")
    assert "sesame" not in str(refused.value)
    file = tmp_path / "secret"
    file.write_text("sesame\n")
    file.chmod(0o600)
    with pytest.raises(ValueError, match=f"{file}: the cluster's secret has 6"):
        ClusterSecret.of_file(file)


def test_a_file_that_everybody_reads_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with pytest.raises(ValueError, match="can't read"):
        ClusterSecret.of_file(file)
    file.write_text(TEXT)
    file.chmod(0o644)
    with pytest.raises(ValueError, match="chmod o-rwx"):
        ClusterSecret.of_file(file)
    file.chmod(0o640)
    assert ClusterSecret.of_file(file) == ClusterSecret(TEXT)


@pytest.mark.parametrize("place", ["fifo", "/dev/zero", "."])
def test_what_is_no_regular_file_is_refused_and_nobody_waits_for_it(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ValueError, match=r"is no regular file|can't read"):
        ClusterSecret.of_file(tmp_path / place)


def test_a_file_without_end_is_not_read_to_it(tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb", opener=private_opener) as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="has more than"):
        ClusterSecret.of_file(tmp_path / "large")


def test_the_environment_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUALPATH_CLUSTER_SECRET", raising=False)
    assert secret_of_environment() is None
    monkeypatch.setenv("DUALPATH_CLUSTER_SECRET", TEXT)
    assert secret_of_environment() == ClusterSecret(TEXT)
    monkeypatch.setenv("DUALPATH_CLUSTER_SECRET", "")
    with pytest.raises(ValueError, match=r"\$DUALPATH_CLUSTER_SECRET: the cluster's secret has 0"):
        secret_of_environment()


def test_one_that_is_made_is_in_a_file_of_this_users_alone_until_the_end(runtime: Path) -> None:
    told: list[Path] = []
    with cluster_secret(None, told.append) as secret:
        (file,) = told
        assert ClusterSecret.of_file(file) == secret
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
        assert sweep_dead_files(runtime, "*.secret") == [], "its maker lives"
    assert list(runtime.iterdir()) == []
    with cluster_secret(secret, told.append) as given:
        assert given is secret
    assert len(told) == 1


def test_a_killed_makers_is_removed_by_the_next(runtime: Path) -> None:
    pid = os.fork()
    if pid == 0:
        MadeSecret()
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(list(runtime.iterdir())) == 1
    made = MadeSecret()
    assert list(runtime.iterdir()) == [made.path]
    made.close()


def test_a_runtime_directory_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "dualpath").symlink_to(elsewhere)
    with pytest.raises(OSError, match="is not a directory of this user's; remove it"):
        MadeSecret()
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"control_address": "tcp://0.0.0.0:5555"}, "--join-address: 0.0.0.0"),
        ({"control_address": "tcp://*:5555"}, "--join-address"),
        ({"control_address": "tcp://[::]:5555"}, "--join-address"),
        ({"control_address": "tcp://eth0:5555"}, "--join-address"),
        ({"data_host": "10.0.0.2"}, "--data-host: 10.0.0.2"),
        ({"data_host": "pe0.example"}, "--data-host"),
    ],
)
def test_without_a_secret_only_loopback_is_listened_at(setting: dict[str, str], complaint: str) -> None:
    with pytest.raises(NotReadyError, match=complaint) as refused:
        _check_loopback(ClusterConfig(model="m", store="s", **setting))  # type: ignore[arg-type]
    assert "--cluster-secret-file or $DUALPATH_CLUSTER_SECRET" in str(refused.value)


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"control_address": "tcp://[::1]:0", "data_host": "::1"},
        {"control_address": "ipc:///run/control"},
        {"data_host": "localhost"},
        {"control_address": "tcp://127.0.0.2:5"},
    ],
)
def test_loopback_needs_none(setting: dict[str, str]) -> None:
    _check_loopback(ClusterConfig(model="m", store="s", **setting))  # type: ignore[arg-type]
