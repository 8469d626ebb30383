"""Measures how many turns per CPU-second the simulator makes, at 2P4D and at 48P96D, with a peer beside it.

Each case is a process of its own, so its peak memory is its own: 64K agents (paper §9) that all start at once, the same
number per node. ``--agents-per-node 342`` is the paper's largest run, 48K agents at 48P96D: about ten minutes.

The peer is NVIDIA Dynamo's offline replay (``pip install ai-dynamo``; not a dependency). It runs if ``--dynamo-python``
names an interpreter that has it, on as many prefill and decode workers, with turns of the same mean length. It has no
storage NICs and no choice of read path, so compare the cost, not the work.

Run: ``python benchmarks/simulator.py [--agents-per-node N] [--dynamo-python PYTHON] [--json FILE]``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES = {"ds660b-2p4d": (16, 32), "ds660b-48p96d": (384, 768)}
"""Numbers of prefill and decode engines, by preset."""
NODE_ENGINES = 8
PROMPT_TOKENS, GENERATED_TOKENS, DYNAMO_TURNS = 32_000, 100, 8
DYNAMO = """
import json, resource, sys, time
from dynamo.replay.api import run_synthetic_trace_replay
prefill, decode, sessions, prompt_tokens, generated_tokens, turns = map(int, sys.argv[1:])
def workers(kind):
    return {"engine": {"worker_type": kind, "block_size": 64, "num_gpu_blocks": 20000, "max_num_seqs": 256}}
started_s = time.process_time()
report = run_synthetic_trace_replay(
    prompt_tokens, generated_tokens, sessions, turns_per_session=turns,
    num_prefill_workers=prefill, num_decode_workers=decode,
    replay_concurrency=sessions, prefill_engine_args=workers("prefill"), decode_engine_args=workers("decode"),
    capture_planner_details=False,
)
cpu_s = time.process_time() - started_s
turns = report.summary["completed_requests"]
print(json.dumps({"turns": turns, "cpu_s": cpu_s, "peak_rss_bytes": 1024 * resource.getrusage(0).ru_maxrss}))
"""


def ours(preset: str, agents: int) -> dict[str, Any]:
    """Runs one simulation by the command line."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        _run([sys.executable, "-m", "dualpath", "simulate", preset, "--agents", str(agents), "--json", str(out)])
        result = json.loads(out.read_text())
    return {name: result[name] for name in ("turns", "simulated_s", "events", "cpu_s", "peak_rss_bytes")}


def dynamo(python: str, preset: str, agents: int) -> dict[str, Any]:
    """Runs the peer on the same number of engines."""
    numbers = (*CASES[preset], agents, PROMPT_TOKENS, GENERATED_TOKENS, DYNAMO_TURNS)
    row: dict[str, Any] = json.loads(_run([python, "-c", DYNAMO, *map(str, numbers)]).splitlines()[-1])
    return row


def _run(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=3600).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--agents-per-node", type=int, default=20)
    parser.add_argument("--dynamo-python", metavar="PYTHON", help="an interpreter that has ai-dynamo")
    arguments = parser.parse_args()
    print(f"{'simulator':<12}{'cluster':<16}{'agents':>8}{'turns':>11}{'CPU s':>8}{'turns/CPU-s':>13}{'peak MB':>9}")
    rows: list[dict[str, Any]] = []
    for name in ("dualpath", "dynamo") if arguments.dynamo_python else ("dualpath",):
        for preset, engines in CASES.items():
            agents = sum(engines) // NODE_ENGINES * arguments.agents_per_node
            if name == "dualpath":
                row = ours(preset, agents)
            else:
                agents = min(agents, sum(engines))  # minutes otherwise
                row = dynamo(arguments.dynamo_python, preset, agents)
            rows.append({"simulator": name, "cluster": preset, "agents": agents} | row)
            print(
                f"{name:<12}{preset:<16}{agents:>8,}{row['turns']:>11,}{row['cpu_s']:>8.1f}"
                f"{row['turns'] / row['cpu_s']:>13,.0f}{row['peak_rss_bytes'] / 1e6:>9,.0f}",
                flush=True,
            )
        small, large = (row["cpu_s"] / row["turns"] for row in rows[-2:])
        print(f"{name}: a turn at 48P96D costs {large / small:.2f} times one at 2P4D")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
