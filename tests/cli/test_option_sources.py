"""Options of `dualpath serve` from a file and from the environment: who wins, and what is said of mistakes."""

import json

import pytest

from dualpath import cli


@pytest.fixture
def serve(monkeypatch, tmp_path, capsys):
    """Runs a command line of serve in an empty directory. Returns the configuration, or the last line on stderr."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    asked = []
    served = "dualpath.serving.supervising.run"
    monkeypatch.setattr(served, lambda config, local_engines=True: asked.append(config) or 7)

    def run(*argv):
        try:
            code = cli.main(["serve", *argv])
        except SystemExit as ended:
            code = ended.code
        if code == 7:
            return asked.pop()
        assert code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "model: m\nstore: kv\nport: 0\nsnic-rate: 60MB/s\naccess-log: true\nserved_model_name: [x, y]\n"),
        (
            "a.yml",
            '{"model": "m", "store": "kv", "--port": 0, "snic_rate": "60MB/s", "access-log": "on", "name": ["x", "y"]}',
        ),
        ("a.toml", 'model = "m"\nstore = "kv"\nport = 0\nsnic-rate = "60MB/s"\naccess-log = true\nname = ["x", "y"]\n'),
        (
            "a.json",
            json.dumps(
                {"model": "m", "store": "kv", "port": 0, "snic-rate": "60MB/s", "access-log": 1, "name": ["x", "y"]}
            ),
        ),
    ],
)
def test_a_file_says_what_the_command_line_could(serve, tmp_path, name, text):
    config = serve("--config", written(tmp_path, name, text))
    assert (config.model, config.store, config.port, config.snic_bytes_per_s) == ("m", "kv", 0, 60_000_000)
    assert (config.access_log, config.served_model_name, config.served_model_aliases) == (True, "x", ("y",))


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(serve, tmp_path, monkeypatch):
    file = written(tmp_path, "a.yaml", "model: m\nstore: kv\nmax-waiting: 1\nthreads: 1\nhost: file\nhbm: null\n")
    monkeypatch.setenv("DUALPATH_SERVE_CONFIG", file)
    monkeypatch.setenv("DUALPATH_SERVE_THREADS", "2")
    monkeypatch.setenv("DUALPATH_SERVE_MAX_WAITING", "2")
    config = serve("--max-waiting", "3")
    assert (config.max_waiting, config.threads, config.host, config.port) == (3, 2, "file", 8000)


def test_several_values_are_words_in_the_environment(serve, monkeypatch):
    monkeypatch.setenv("DUALPATH_SERVE_SERVED_MODEL_NAME", "a b")
    monkeypatch.setenv("DUALPATH_SERVE_API_KEY", "k1 k2")
    monkeypatch.setenv("DUALPATH_SERVE_ACCESS_LOG", "0")
    config = serve("m", "--store", "kv")
    assert (config.served_model_name, config.served_model_aliases) == ("a", ("b",))
    assert (config.api_keys, config.access_log) == (("k1", "k2"), False)
    assert serve("m", "--store", "kv", "--name", "c").served_model_aliases == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prot: 1", "a.yaml: prot: there is no option --prot; did you mean port"),
        ("port: x", "a.yaml: port: 'x' is not a port"),
        ("port: [1, 2]", "a.yaml: port takes one value, not list"),
        ("port: true", "a.yaml: port takes one value, not bool"),
        ("dtype: int8", "a.yaml: dtype must be one of auto, float32"),
        ("access-log: maybe", "a.yaml: access-log must be true or false"),
        ("config: b.yaml", "a.yaml: config: a file can't name another"),
        ("[1", "--config: a.yaml can't be read: while parsing"),
        ("- port", "--config: a.yaml must be a table of options"),
        ("1: 2", "a.yaml: 1: there is no option --1"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_key(serve, tmp_path, text, complaint):
    assert complaint in serve("--config", written(tmp_path, "a.yaml", text))


def test_a_file_that_is_not_there_or_of_no_known_kind(serve, tmp_path):
    assert "--config: none.yaml can't be read" in serve("--config", "none.yaml")
    assert "--config: a.ini must end in .yaml" in serve("--config", written(tmp_path, "a.ini", ""))


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("PROT", "1", "DUALPATH_SERVE_PROT: there is no option --prot; did you mean port"),
        ("PORT", "x", "DUALPATH_SERVE_PORT: 'x' is not a port"),
        ("PORT", "tcp://10.0.0.1:80", "Kubernetes sets it for a service of that name; enableServiceLinks: false"),
        ("SERVICE_HOST", "10.0.0.1", "enableServiceLinks: false prevents it): there is no option --service-host"),
    ],
)
def test_a_mistake_in_the_environment_is_named_with_its_variable(serve, monkeypatch, name, value, complaint):
    monkeypatch.setenv(f"DUALPATH_SERVE_{name}", value)
    assert complaint in serve("m", "--store", "kv")


def test_without_a_store_kv_goes_to_the_users_cache_under_a_quota(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = serve("m")
    place = tmp_path / "cache" / "dualpath" / "kv"
    assert (config.store, config.store_quota_bytes) == (str(place), 10 * 2**30)
    assert place.stat().st_mode & 0o777 == 0o700
    assert serve("m", "--store-quota", "1GB").store_quota_bytes == 10**9
    assert serve("m", "--store", "kv").store_quota_bytes is None


def test_help_shows_no_value_of_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("DUALPATH_SERVE_API_KEY", "a-secret")
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert "a-secret" not in shown and "DUALPATH_SERVE_MAX_WAITING=9" in shown
