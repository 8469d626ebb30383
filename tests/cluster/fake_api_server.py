"""A program that behaves like vLLM's API server, as far as whoever launches it can see. Run by a fake interpreter.

It says vLLM's lines, takes its time, starts a process that starts another one, both deaf to SIGTERM, and answers
/health. FAKE_VLLM in its environment says what goes wrong. What it was given is left in FAKE_VLLM_NOTES.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PREFIX = "(APIServer pid=7) INFO 11-29 16:58:41 [api_utils.py:286]"
CORE = "(EngineCore pid=8) ERROR 11-29 16:58:57 [core.py:1260]"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
DEAF_PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {DEAF!r}]); {DEAF}"
TRACEBACK = f"""\
{CORE} EngineCore failed to start.
{CORE} Traceback (most recent call last):
{CORE}     raise ValueError(
{CORE} ValueError: No available memory for the cache blocks. Try increasing it.
(APIServer pid=7) Traceback (most recent call last):
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}"""


def make_python(folder: Path, version: str = "0.32.0", lacks: tuple[str, ...] = (), *, cpu: bool = True) -> str:
    """Returns the path of an interpreter that has this vLLM."""
    answer = {"version": version, "cpu": cpu, "lacks": lacks, "supported": ["0.30", "0.31", "0.32"]}
    path = folder / "python"
    path.write_text(
        f"""#!/bin/sh
if [ "$1" = -c ]; then echo '{json.dumps(answer)}'; exit; fi
exec {sys.executable} {__file__} "$@"
"""
    )
    path.chmod(0o700)
    return str(path)


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main(ill: str) -> None:
    print("warnings.warn(", flush=True)
    notes = Path(os.environ["FAKE_VLLM_NOTES"])
    if ill == "usage":
        sys.exit("api_server.py: error: unrecognized arguments: --foo")
    if ill == "taken" and not (notes / "taken").exists():
        (notes / "taken").touch()
        sys.exit("OSError: [Errno 98] Address already in use")
    print(f"{PREFIX} non-default args: {{}}", flush=True)
    print(f"{PREFIX} Starting to load model tiny...", flush=True)
    if ill == "fails":
        sys.exit(TRACEBACK)
    if ill == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    subprocess.Popen([sys.executable, "-c", DEAF_PARENT])
    with http.server.HTTPServer((option("--host"), int(option("--port"))), Health) as server:
        told = {"argv": sys.argv, "environment": dict(os.environ), "session": os.getsid(0)}
        (notes / str(os.getpid())).write_text(json.dumps(told))
        print(f"{PREFIX} Starting vLLM server on http://x", flush=True)
        if ill == "refused":
            why = "it refuses: it can't join: another model"
            print(f"{PREFIX} the agent at /a.sock is not there ({why}); vLLM serves on without it", flush=True)
        server.timeout = 0.1
        while not (notes / "crash").exists():
            server.handle_request()
    (notes / "crash").unlink()
    time.sleep(0.1)
    sys.exit("(EngineCore pid=8) torch.OutOfMemoryError: CUDA out of memory.")


if __name__ == "__main__":
    main(os.environ.get("FAKE_VLLM", ""))
