"""Replays agents with `dualpath replay` against vLLM on this machine's CPU: our client needs nothing of our server.

It makes a tiny seeded Qwen3 with `dualpath`, serves it with the vLLM of `make setup-vllm`, replays a few agents, prints
the client's table, and stops the server. vLLM keeps KV in memory here, so hit rates are its own prefix cache's
(``--enable-prompt-tokens-details`` makes it report them).

    make peer-vllm
    python benchmarks/peers/vllm.py --python PYTHON --agents 2 --turns 3
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from dualpath.cluster.vllm_launch import on_cpu

START_DEADLINE_S = 600.0
STOP_GRACE_S = 30.0


def serve(interpreter: Path, model: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    command = [interpreter, "-m", "vllm.entrypoints.openai.api_server"]  # `vllm serve` does not find its own metadata
    command += ["--model", model, "--served-model-name", "tiny-qwen3", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "8192", "--max-num-seqs", "8"]
    command += ["--kv-cache-memory-bytes", str(256 << 20), "--block-size", "32", "--enable-prompt-tokens-details"]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | on_cpu(1), start_new_session=True, cwd=log.parent
        )


def wait_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Waits until the server answers. Raises SystemExit with the end of the log if it does not come up."""
    deadline_s = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline_s and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
    raise SystemExit(f"vLLM did not come up; the end of {log}:\n{tail}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ends the whole process group, because vLLM starts processes of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(STOP_GRACE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"), help="of vLLM's environment")
    parser.add_argument("--out", type=Path, default=Path("results/peer-vllm"))
    parser.add_argument("--agents", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model").exists():
        # vLLM's CPU attention needs heads of at least 32, which the demo's model has and the tiny checkpoints lack.
        subprocess.run([sys.executable, "-m", "dualpath", "checkpoint", out / "model", "--demo"], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began_s = time.monotonic()
    server = serve(arguments.python.absolute(), out / "model", port, out / "vllm.log")
    try:
        wait_ready(server, port, out / "vllm.log")
        print(f"vLLM is up after {time.monotonic() - began_s:.0f} s", flush=True)
        replay = [sys.executable, "-m", "dualpath", "replay", f"http://127.0.0.1:{port}", "--out", str(out)]
        replay += ["--agents", str(arguments.agents), "--turns", str(arguments.turns), "--context", "1000"]
        return subprocess.run(replay, check=False).returncode
    finally:
        stop(server)


if __name__ == "__main__":
    sys.exit(main())
