"""The public API: what importing it costs, that commands give the same answers, and what it says of failures."""

import asyncio
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dualpath
from dualpath.cli import main

AGENTS = dualpath.AgentMix(turns=3, first_context_tokens=200, append_tokens=20, generate_tokens=4)


def test_every_public_name_is_there() -> None:
    assert [name for name in dualpath.__all__ if not hasattr(dualpath, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dualpath.nothing


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, dualpath; print([m for m in ('torch', 'numpy', 'msgspec', 'asyncio') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_simulate_is_what_the_command_does(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    argv = [
        "simulate",
        "ds27b-1p1d",
        "--trace",
        "32K",
        "--agents",
        "3",
        "--system",
        "basic",
        "--fault",
        "snic:0@1s*0.5",
    ]
    assert main([*argv, "--json", str(out)]) == 0
    told = json.loads(out.read_bytes())
    result = dualpath.simulate("ds27b-1p1d", "32K", agents=3, system="basic", faults=["snic:0@1s*0.5"])
    assert (result.simulated_s, result.turns, result.events) == (told["simulated_s"], told["turns"], told["events"])
    assert result.simulated_s > dualpath.simulate("ds27b-1p1d", "32K", agents=3, system="basic").simulated_s


def test_plan_is_what_the_command_does(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", "ds660b-2p4d", "--json", str(out)]) == 0
    assert dualpath.plan("ds660b-2p4d").gain == json.loads(out.read_bytes())["gain"] > 1


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"cluster": "ds9b"}, "no cluster 'ds9b': give one of "),
        ({"cluster": "ds27b-1p1d", "trace": "none.json"}, "none.json"),
        ({"cluster": "ds27b-1p1d", "system": "fast"}, "unknown system 'fast'"),
        ({"cluster": "ds27b-1p1d", "faults": ["flood"]}, "'flood' is not a fault"),
    ],
)
def test_what_cannot_be_simulated_is_a_value_error(question: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dualpath.simulate(**question)  # type: ignore[arg-type]


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with a 503 of OpenAI's form, with no JSON at all, or with what is no completion."""

    def do_POST(self) -> None:
        body = b'{"error": {"message": "no engine is left"}}' if "v1" in self.path else b"<html>"
        self.send_response(200 if "fine" in self.path else 503)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_refusal_has_its_status_and_message(refusing: str) -> None:
    with pytest.raises(dualpath.AskError, match=r"^no engine is left$") as refused:
        dualpath.ask(f"{refusing}/v1", "hello")
    assert refused.value.status == 503
    with pytest.raises(dualpath.AskError, match=r"^<html>$"):
        dualpath.ask(refusing, "hello")


def test_an_answer_that_is_no_completion_is_said(refusing: str) -> None:
    with pytest.raises(dualpath.AskError, match="/fine does not answer as an OpenAI server") as strange:
        dualpath.ask(f"{refusing}/fine", "hello")
    assert strange.value.status == 0


def test_nobody_there_is_said() -> None:
    with pytest.raises(dualpath.AskError, match=r"http://127\.0\.0\.1:9/v1 does not answer") as silent:
        dualpath.ask("http://127.0.0.1:9/v1", "hello")
    assert silent.value.status == 0


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = dualpath.ClusterConfig(model=str(tmp_path), store=str(tmp_path / "store"), port=0)
    with pytest.raises((OSError, RuntimeError, ValueError)), dualpath.Server(config):
        pass


@pytest.mark.slow
def test_a_server_answers_replays_and_goes(tmp_path: Path, needs_torch: None) -> None:
    model = dualpath.make_checkpoint(tmp_path / "tiny", "qwen3", seed=7)
    config = dualpath.ClusterConfig(model=str(model), store=str(tmp_path / "store"), port=0, api_keys=("secret",))
    with dualpath.Server(config) as server:
        assert server.health()["status"] == "ok"
        prompt = [number % 97 + 3 for number in range(200)]
        answers = [server.ask(prompt, max_tokens=4, temperature=0) for _ in range(2)]
        assert [answer.cached_tokens for answer in answers] == [0, 192]
        assert answers[0].text == answers[1].text and answers[0].generated_tokens == 4
        assert server.gauges()["dualpath_store_hit_blocks_total"] == 3
        with pytest.raises(dualpath.AskError, match="max_tokens") as wrong:
            server.ask(prompt, max_tokens=-1)
        assert wrong.value.status == 400
        with pytest.raises(dualpath.AskError):
            dualpath.ask(server.url, prompt)  # without the key
        agents = dualpath.generate_trajectories(AGENTS, 2, seed=0)
        options = dualpath.ReplayOptions(api_key="secret")

        async def in_a_running_loop() -> dualpath.ReplayResult:
            return dualpath.replay(server.url, agents, options, measured_from=1)

        result = asyncio.run(in_a_running_loop())
        assert len(result.turns) == 4 and not result.failures and result.hit_rate > 0.5
        url = server.url
    with pytest.raises(dualpath.AskError, match="does not answer"):
        dualpath.ask(url, prompt)
