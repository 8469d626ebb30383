"""A stock vLLM server as a process of its own, for tests."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dualpath.cluster.vllm_launch import on_cpu

START_S = 240


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def connector_config(role: str, agent: Path, port: int, **others: Any) -> dict[str, Any]:
    extra = {"role": role, "agent": str(agent), "url": f"http://127.0.0.1:{port}", "name": f"{role}-0"}
    return {
        "kv_connector": "DualPathConnector",
        "kv_connector_module_path": "dualpath.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra | others,
    }


class VllmProcess:
    """Starts at once; `wait` until it serves."""

    def __init__(self, model: Path, log: Path, *arguments: str, transfer: dict[str, Any] | None = None) -> None:
        self.port = int(arguments[arguments.index("--port") + 1]) if "--port" in arguments else free_port()
        self._log = log
        environment = os.environ | on_cpu(1)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "m", "--host", "127.0.0.1", "--max-num-seqs", "8", "--enforce-eager"]
        for option, value in (
            ("--port", str(self.port)),
            ("--kv-cache-memory-bytes", str(96 << 20)),
            ("--max-model-len", "4096"),
            ("--block-size", "64"),
            ("--dtype", "float32"),
        ):
            if option not in arguments:
                command += [option, value]
        if transfer is not None:
            command += ["--kv-transfer-config", json.dumps(transfer)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--enable-prompt-tokens-details", *arguments],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> "VllmProcess":
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise AssertionError(f"vLLM has ended:\n{self.said()[-4000:]}")
            try:
                if self.request("GET", "/health")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"vLLM does not serve after {START_S} s:\n{self.said()[-4000:]}")

    def wait_end(self, timeout_s: float = START_S) -> str:
        """Returns what it said, once it has ended by itself."""
        try:
            self._process.wait(timeout_s)
        finally:
            self.stop()
        return self.said()

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def request(self, method: str, path: str, body: Any = None, timeout_s: float = 300) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            raw = response.read()
        finally:
            connection.close()
        try:
            return response.status, json.loads(raw)
        except ValueError:
            return response.status, raw.decode(errors="replace")

    def complete(self, prompt: list[int], tokens: int, ours: dict[str, Any] | None = None, **fields: Any) -> Any:
        """Returns the answer's first choice, with ``token_ids``, and its usage as ``usage``."""
        status, answer = self.request("POST", "/v1/completions", completion(prompt, tokens, ours, **fields))
        assert status == 200, answer
        return answer["choices"][0] | {"usage": answer["usage"]}

    def open(self, prompt: list[int], tokens: int, ours: dict[str, Any] | None = None) -> socket.socket:
        """Send a streaming request and return its socket; closing that is a client that goes away."""
        body = json.dumps(completion(prompt, tokens, ours, stream=True)).encode()
        connected = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connected.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        return connected

    def metric(self, name: str) -> float:
        """Returns the sum of a metric's samples."""
        _, text = self.request("GET", "/metrics")
        samples = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(value) for _, value in samples)


def completion(prompt: list[int], tokens: int, ours: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": 1, "return_token_ids": True}
    if ours is not None:
        body["kv_transfer_params"] = {"dualpath": ours}
    return body | fields
