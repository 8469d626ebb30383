"""`dualpath serve` as people run it: a process of its own, the official `openai` client, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from dualpath.results import load_results

pytestmark = pytest.mark.slow

START_S = 120.0
STOP_S = 20.0


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "dualpath", *map(str, arguments)]


@contextmanager
def serving(model: Path, where: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A running server: its URL and process. Always ended; leaves no buffer pool in shared memory."""
    ready = where / "ready.json"
    ready.unlink(missing_ok=True)
    process = subprocess.Popen(
        command("serve", "--model", model, "--store", where / "store", "--port", "0", "--ready-file", ready,
                "--buffer", "64MiB", "--hbm", "64MiB", *options)
    )  # fmt: skip
    try:
        wait_for(lambda: ready.exists() or process.poll() is not None, START_S)
        assert ready.exists(), f"serve ended with {process.poll()}"
        yield json.loads(ready.read_bytes())["url"], process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(STOP_S) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wait_for(condition: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def pools_of(pids: list[int]) -> list[Path]:
    """Buffer pools of these processes in shared memory; others on this host may have theirs."""
    return [path for pid in pids for path in Path("/dev/shm").glob(f"dualpath-{pid}-*")]


def engine_pids(url: str, which: str = "pid") -> list[int]:
    return [engine[which] for engine in httpx.get(f"{url}/health").json()["engines"]]


@pytest.mark.slow
def test_the_official_client(model: Path, tmp_path: Path) -> None:
    """Chat over turns, streaming with usage, token ids, an error, health and metrics; and a clean end."""
    with serving(model, tmp_path, "--topology", "1P2D", "--api-key", "secret") as (url, _):
        pids = engine_pids(url, "agent_pid")
        assert len(pools_of(pids)) == 3
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        name = client.models.list().data[0].id
        messages = [{"role": "user", "content": "Write down what a key-value cache is. " * 10}]
        first = client.chat.completions.create(model=name, messages=messages, max_tokens=40, temperature=0)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        text = first.choices[0].message.content
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
        stream = client.chat.completions.create(
            model=name, messages=messages, max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        usage = chunks[-1].usage
        assert usage.prompt_tokens_details.cached_tokens >= 256
        assert usage.completion_tokens <= 12

        prompt = list(range(10, 140))
        options = {"return_token_ids": True, "ignore_eos": True}
        whole = client.completions.create(model=name, prompt=prompt, max_tokens=9, temperature=0, extra_body=options)
        assert whole.choices[0].token_ids and len(whole.choices[0].token_ids) == 9
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="another", prompt="x", max_tokens=1)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        metrics = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer secret"}).text
        assert "dualpath_nic_bytes_total{" in metrics
        assert "vllm:time_to_first_token_seconds_count" in metrics
    assert pools_of(pids) == []


@pytest.mark.slow
def test_clients_are_told_when_the_server_stops(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGTERM while a whole answer and a stream run, which take longer than the drain."""
    body = {"prompt": "x" * 50, "max_tokens": 3000, "ignore_eos": True}
    with serving(model, tmp_path, "--drain-timeout", "0.5") as (url, process), ThreadPoolExecutor(2) as threads:
        whole, stream = (
            threads.submit(httpx.post, f"{url}/v1/completions", json=body | {"stream": streamed}, timeout=60)
            for streamed in (False, True)
        )
        wait_for(lambda: "dualpath_requests_live 2.0\n" in httpx.get(f"{url}/metrics").text, 30)
        process.send_signal(signal.SIGTERM)
        refused = httpx.post(f"{url}/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "shutting_down")
        assert whole.result().headers["retry-after"]
        assert '"code":"shutting_down"' in stream.result().text.rstrip().rsplit("data: ", 1)[1]
        assert process.wait(STOP_S) == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_keys_reach_nobody_but_the_server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.write_text("filed-key\n")
    keys.chmod(0o600)
    monkeypatch.setenv("DUALPATH_API_KEY", "exported-key")
    with serving(model, tmp_path, "--api-key-file", str(keys)) as (url, process):
        for key, status in (("filed-key", 200), ("exported-key", 200), ("other", 401)):
            assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == status
        assert b"filed-key" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        parents = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1] for pid in engine_pids(url)]
        for pid in {*engine_pids(url), *map(int, parents)}:  # engines, and the fork server that they come from
            for told in ("cmdline", "environ"):
                content = Path(f"/proc/{pid}/{told}").read_bytes()
                assert b"exported-key" not in content and b"filed-key" not in content


@pytest.mark.slow
def test_a_replay_notes_what_it_takes_to_predict_it(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path, "--topology", "1P2D", "--system", "basic", "--snic-rate", "400MB/s") as (url, _):
        agents = ("--agents", "2", "--turns", "2", "--context", "200", "--append", "70", "--generate", "4")
        subprocess.run(command("replay", f"{url}/v1", *agents, "--out", tmp_path / "out"), check=True)
    (run,) = load_results(tmp_path / "out" / "replay.json").runs
    assert (run.topology, run.system, run.gap_scale, run.turns) == ("1P2D", "basic", 0, 4)
    assert run.cluster.snic_bytes_per_s == 400_000_000 and run.cluster.cnic_bytes_per_s is None
    assert run.cluster.layers == 5 and run.cluster.kv_bytes_per_token > 0


@pytest.mark.slow
def test_killed_engine_under_the_server(model: Path, tmp_path: Path) -> None:
    """The only decode engine dies in the middle of a stream, and no new one comes in time: all clients learn it."""
    with serving(model, tmp_path, "--replacement-timeout", "0") as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        health = httpx.get(f"{url}/health").json()
        victim = next(engine["pid"] for engine in health["engines"] if engine["role"] == "decode")
        options = {"ignore_eos": True}
        stream = client.completions.create(
            model=client.models.list().data[0].id, prompt="x" * 200, max_tokens=3000, stream=True, extra_body=options
        )
        with pytest.raises(openai.APIError, match="no prefill engine or no decode engine"):
            for i, _ in enumerate(stream):
                if i == 3:
                    os.kill(victim, signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model=client.models.list().data[0].id, prompt="x", max_tokens=1)
        assert refused.value.status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503


@pytest.mark.slow
def test_nothing_survives_a_killed_supervisor(
    model: Path, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the serving process at work: its engines leave by themselves, with their memory and socket files."""
    monkeypatch.setenv("TMPDIR", str(short_tmp_path))
    with pytest.raises(AssertionError), serving(model, short_tmp_path) as (url, process):
        pids = engine_pids(url)
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        body = {"model": name, "prompt": "x" * 300, "max_tokens": 3000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            process.kill()
        assert len(pools_of(pids)) == 2
        assert list(short_tmp_path.glob("dualpath-*.sock"))
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30.0)
        assert pools_of(pids) == []
        assert not list(short_tmp_path.glob("dualpath-*.sock"))
        process.wait()  # leaving now raises: its exit code is not 0


@contextmanager
def socket_port() -> Iterator[int]:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--topology", "0P1D"), "not a topology"),
        (("--snic-rate", "fast"), "not a rate"),
        (("--buffer", "1KiB"), "--buffer: 1024 bytes does not hold one block of this model's KV"),
        (("--port", "99999999"), "port"),
        (("--join-address", "nonsense"), "argument --join-address: 'nonsense' is not an address"),
        (("--journal", "/no/such/directory/journal"), "/no/such/directory/journal"),
        (("--store", "/dev/null"), "--store: /dev/null can't be written to"),
        (("--device", "cuda"), "--device cpu"),
        (("--otlp-traces-endpoint", "localhost"), "is no URL"),
        (("--kv-events-config", '{"enable_kv_cache_events": true, "endpoint": "x"}'), "can't use 'x'"),
    ],
)
def test_bad_settings_are_named(model: Path, tmp_path: Path, arguments: tuple[str, str], complaint: str) -> None:
    ended = subprocess.run(
        command("serve", "--model", model, "--store", tmp_path / "store", "--port", "0", *arguments),
        capture_output=True, text=True, timeout=START_S,
    )  # fmt: skip
    assert ended.returncode in (1, 2)
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr
