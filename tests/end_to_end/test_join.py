"""`dualpath engine`: engines that are started by hand and join a coordinator over TCP."""

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from dualpath.model.checkpoint import make_checkpoint

from .test_serve import START_S, STOP_S, command, serving, socket_port

TCP_ENGINE = ("--transport", "tcp", "--buffer", "64MiB", "--hbm", "64MiB")
Joined = tuple[str, str, tuple[str, Path]]


def secret_file(where: Path) -> Path:
    file = where / "secret"
    file.touch(0o600)
    file.write_text(secrets.token_hex(32))
    return file


@pytest.fixture(scope="module")
def joined(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Joined]:
    """A coordinator alone, and engines started by hand that join it, as on several hosts: its URL, where
    to join, and the options that say the secret."""
    where = tmp_path_factory.mktemp("joined")
    with socket_port() as port:
        address = f"tcp://127.0.0.1:{port}"
    secret = ("--cluster-secret-file", secret_file(where))
    shared = ("--coordinator", address, "--model", model, "--store", where / "store", *TCP_ENGINE, *secret)
    engines = [subprocess.Popen(command("engine", "--role", role, *shared)) for role in ("prefill", "decode")]
    try:
        with serving(model, where, "--join-address", address, "--transport", "tcp", *secret) as (url, _):
            yield url, address, secret
        assert [engine.wait(STOP_S) for engine in engines] == [0, 0]
    finally:
        for engine in engines:
            engine.kill()
            engine.wait()


@pytest.mark.slow
def test_engines_join_over_tcp(joined: Joined) -> None:
    client = openai.OpenAI(base_url=f"{joined[0]}/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    for expected in (0, 192):
        answer = client.completions.create(model=name, prompt=list(range(10, 220)), max_tokens=3)
        assert answer.usage.prompt_tokens_details.cached_tokens == expected


@pytest.mark.slow
def test_an_engine_that_does_not_fit_is_told_so(joined: Joined, model: Path, tmp_path: Path) -> None:
    """A line on stderr, exit code 1."""
    _, address, secret = joined
    other = make_checkpoint(tmp_path / "other", "llama", seed=1)
    cases = (
        (("--model", other), "is not the cluster's"),
        (("--model", model, "--cluster-secret-file", secret_file(tmp_path)), "another cluster secret"),
        (("--model", model, "--transport", "tcp-authenticated"), "this cluster moves KV by tcp and the engine by"),
    )
    place = ("--coordinator", address, "--store", tmp_path / "store")
    shared = ("engine", "--role", "decode", *place, *TCP_ENGINE, *secret)
    engines = [subprocess.Popen(command(*shared, *own), stderr=subprocess.PIPE, text=True) for own, _ in cases]
    for engine, (_, complaint) in zip(engines, cases, strict=True):
        with engine:
            _, said = engine.communicate(timeout=START_S)
        assert engine.returncode == 1
        assert complaint in said
        assert "Traceback" not in said


@pytest.mark.slow
def test_an_engine_without_the_secret_says_so(model: Path, tmp_path: Path) -> None:
    argv = command(
        "engine", "--role", "decode", "--coordinator", "tcp://127.0.0.1:9", "--model", model, "--store", tmp_path
    )
    engine = subprocess.run(argv, capture_output=True, text=True, timeout=START_S)
    assert engine.returncode == 2
    assert (
        "an engine needs the secret of the cluster that it joins; give one with --cluster-secret-file" in engine.stderr
    )


@pytest.mark.slow
def test_an_engine_that_finds_no_coordinator_fails_and_says_where(model: Path, tmp_path: Path) -> None:
    with socket_port() as port:
        address = f"tcp://127.0.0.1:{port}"
    place = ("--coordinator", address, "--model", model, "--store", tmp_path / "store", "--grace", "1")
    argv = command("engine", "--role", "decode", *place, *TCP_ENGINE, "--cluster-secret-file", secret_file(tmp_path))
    engine = subprocess.run(argv, capture_output=True, text=True, timeout=START_S)
    assert engine.returncode == 1
    assert f"no coordinator answered at {address} for 1 s" in engine.stderr.splitlines()[-1]
