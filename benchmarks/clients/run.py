"""Real clients, unchanged, against `dualpath serve` with a real model: what each did, and whether it worked.

Each client gets an environment of its own (6 GB for all, kept) with the versions named here, and runs the script
of its name in this directory, which uses the client's public API alone. All use one server with SmolLM2-135M-Instruct.
The table goes to ``docs/results/clients.md``, each client's output to ``results/clients``.

    make clients
    .venv/bin/python benchmarks/clients/run.py --only litellm aider
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = "smollm2"
INSTALL_DEADLINE_S, RUN_DEADLINE_S, START_DEADLINE_S, STOP_GRACE_S = 1800.0, 600.0, 300.0, 60.0
SETTINGS = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}
"""Of the environment: nothing is fetched or sent but from and to the server."""


class Client(NamedTuple):
    """`packages` are of pip, or of npm if the script is JavaScript; the first is the client's own."""

    name: str
    script: str
    packages: tuple[str, ...]
    constrained: bool = False
    """Whether it needs torch or Transformers, which are then those of constraints.txt."""


CLIENTS = (
    Client("openai (Python)", "openai_python.py", ("openai==3.57.0",)),
    Client("openai (npm)", "openai_npm.mjs", ("openai@6.49.0",)),
    Client("anthropic", "anthropic_python.py", ("anthropic==2.14.0",)),
    Client("openai-agents", "openai_agents_sdk.py", ("openai-agents==0.24.0",)),
    Client(
        "langchain, langgraph",
        "langchain_langgraph.py",
        ("langchain==1.5.2", "langchain-openai==1.7.4", "langgraph==1.2.24"),
    ),
    Client("pydantic-ai", "pydantic_ai_agent.py", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client("litellm", "litellm_sdk.py", ("litellm==1.110.2",)),
    Client("smolagents", "smolagents_agent.py", ("smolagents[openai]==1.26.0",)),
    Client("mini-swe-agent", "mini_swe_agent.py", ("mini-swe-agent==2.4.6",)),
    Client("aider", "aider_edit.py", ("aider-chat==0.86.2",)),
    Client("Vercel AI SDK", "vercel_ai.mjs", ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7")),
    Client("lm-eval", "lm_eval_tasks.py", ("lm-eval[api]==0.4.13", "transformers"), constrained=True),
    Client("aiperf", "aiperf_turns.py", ("aiperf==0.13.0",)),
    Client("guidellm", "guidellm_turns.py", ("guidellm==0.8.1",), constrained=True),
)


def ready_command(client: Client, environments: Path) -> list[str]:
    """Returns what runs the client's script, in its environment, which is made if it is not there yet."""
    is_node = client.script.endswith(".mjs")
    place = environments / Path(client.script).stem
    stamp = place / ".installed"
    wanted = "\n".join(client.packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {wanted.replace(chr(10), ', ')}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if is_node:
            install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(place)]
        else:
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
            install = [str(place / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            install += ["-c", str(ROOT / "constraints.txt")] if client.constrained else []
        subprocess.run([*install, *client.packages], check=True, timeout=INSTALL_DEADLINE_S)
        stamp.write_text(wanted)
    if not is_node:
        return [str(place / "bin" / "python"), str(HERE / client.script)]
    shutil.copy(HERE / client.script, place)  # Node looks for packages beside the script
    return ["node", str(place / client.script)]


@contextlib.contextmanager
def serving(model: Path, out: Path) -> Iterator[str]:
    """A running server; yields its URL."""
    ready = out / "ready.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dualpath", "serve", "--model", str(model), "--name", MODEL, "--port", "0"]
    command += ["--store", str(out / "store"), "--ready-file", str(ready)]
    with (out / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + START_DEADLINE_S
        while not ready.exists():
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"dualpath serve did not come up; see {out / 'serve.log'}")
            time.sleep(0.2)
        yield json.loads(ready.read_bytes())["url"]
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            server.kill()


def tried(client: Client, environments: Path, url: str, model: Path, out: Path) -> tuple[bool, str]:
    """Returns whether the client's script worked, and its last line."""
    try:
        command = [*ready_command(client, environments), url, MODEL, str(model)]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=RUN_DEADLINE_S, check=False, env=os.environ | SETTINGS
        )
    except FileNotFoundError as error:
        return False, f"not run: {error.filename} is not installed"
    except subprocess.CalledProcessError as error:
        return False, f"not run: its packages could not be installed ({error.cmd[0]} ended with {error.returncode})"
    except subprocess.TimeoutExpired as error:
        return False, f"did not end within {error.timeout:.0f} s"
    (out / f"{Path(client.script).stem}.log").write_text(ended.stdout + ended.stderr)
    lines = (ended.stdout if ended.returncode == 0 else ended.stderr).strip().splitlines()
    return ended.returncode == 0, lines[-1] if lines else f"ended with {ended.returncode}"


def document(rows: list[tuple[Client, bool, str]]) -> str:
    lines = [
        "# Real clients against `dualpath serve`",
        "",
        "Each ran unchanged, in an environment of its own, against SmolLM2-135M-Instruct. What each does is its",
        "script in [benchmarks/clients](../../benchmarks/clients). `make clients` makes this page.",
        "",
        "| client | versions | result | what it did |",
        "|---|---|---|---|",
    ]
    for client, works, said in rows:
        script = f"[{client.name}](../../benchmarks/clients/{client.script})"
        versions = ", ".join(client.packages)
        lines.append(f"| {script} | {versions} | {'works' if works else '**fails**'} | {said.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="those whose script's name has one of these")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers" / "clients")
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "clients")
    arguments = parser.parse_args()
    chosen = [one for one in CLIENTS if not arguments.only or any(word in one.script for word in arguments.only)]
    out, model = arguments.out.resolve(), arguments.model.resolve()
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "dualpath", "checkpoint", model, "--real"], check=True)
    rows = []
    with serving(model, out) as url:
        for client in chosen:
            works, said = tried(client, arguments.environments.resolve(), url, model, out)
            print(f"{client.name:<22} {'works' if works else 'FAILS'}  {said}", flush=True)
            rows.append((client, works, said))
    page = out / "clients.md" if arguments.only else ROOT / "docs" / "results" / "clients.md"
    page.write_text(document(rows), encoding="utf-8")
    return 0 if all(works for _client, works, _said in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
