"""How many turns a CPU-second the simulator makes, at 2P4D and at 48P96D, and what it costs in memory.

Each case is a process of its own, so that the peak memory is its own: 64K agents (paper §9) that all start at once, the
same number per node. Run: ``python benchmarks/simulator.py [--json FILE] [--agents-per-node N]``. The full case of the
paper, 48K agents at 48P96D, is ``--agents-per-node 342`` and takes some ten minutes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CASES = ("ds660b-2p4d", "ds660b-48p96d")
NODES = {"ds660b-2p4d": 6, "ds660b-48p96d": 144}


def measure(preset: str, system: str, agents: int) -> dict[str, Any]:
    """One simulation, run by the command line in a process of its own."""
    argv = ["simulate", preset, "--system", system, "--agents", str(agents), "--json", "/dev/stdout"]
    done = subprocess.run(
        [sys.executable, "-m", "dualpath", *argv], capture_output=True, text=True, check=True, timeout=3600
    )
    result = json.loads(done.stdout.splitlines()[0])
    kept = (
        "cluster",
        "system",
        "agents",
        "turns",
        "simulated_s",
        "events",
        "cpu_s",
        "turns_per_cpu_s",
        "peak_rss_bytes",
    )
    return {name: result[name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--agents-per-node", type=int, default=20)
    parser.add_argument("--systems", nargs="+", default=["dualpath"])
    arguments = parser.parse_args()
    print(f"{'cluster':<16}{'system':<12}{'agents':>8}{'turns':>11}{'CPU s':>8}{'turns/CPU-s':>13}{'peak MB':>9}")
    rows = []
    for system in arguments.systems:
        costs = []
        for preset in CASES:
            row = measure(preset, system, NODES[preset] * arguments.agents_per_node)
            rows.append(row)
            costs.append(row["cpu_s"] / row["turns"])
            print(
                f"{preset:<16}{system:<12}{row['agents']:>8,}{row['turns']:>11,}{row['cpu_s']:>8.1f}"
                f"{row['turns_per_cpu_s']:>13,.0f}{row['peak_rss_bytes'] / 1e6:>9,.0f}",
                flush=True,
            )
        print(f"a turn at 48P96D costs {costs[1] / costs[0]:.2f} times one at 2P4D")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
