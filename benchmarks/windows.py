"""What sliding windows save: one model with windows and with none, the same agents, real clusters side by side.

    python benchmarks/windows.py [--agents 8] [--rounds 3] [--json FILE]

The model is Gemma 3's pattern (five layers of six see 512 tokens) at the demo's size, and the same weights with every
layer seeing all. Both run `basic` and `dualpath` on 1P2D with slow storage NICs, in turn, round after round. What is
compared: the agents' job completion time, and the bytes of KV that their hits were read as (`timings`). The tokens
differ, because the models do; the lengths do not.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import dualpath
from dualpath import AgentMix, ClusterConfig

LAYERS, WINDOW_TOKENS = 6, 512
PATTERNS = {"windows": (["sliding_attention"] * 5 + ["full_attention"]), "none": ["full_attention"] * LAYERS}
SIZES = {key: value for key, value in dualpath.DEMO_MODEL.items() if key not in ("architecture", "num_hidden_layers")}


def checkpoints(folder: Path) -> dict[str, Path]:
    return {
        name: dualpath.make_checkpoint(
            folder / name,
            "gemma3_text",
            **SIZES,
            num_hidden_layers=LAYERS,
            query_pre_attn_scalar=64,
            sliding_window=WINDOW_TOKENS,
            layer_types=pattern,
        )
        for name, pattern in PATTERNS.items()
    }


def run(model: Path, store: Path, system: str, trajectories: Any, snic_bytes_per_s: int) -> dict[str, float]:
    config = ClusterConfig(
        model=str(model),
        store=str(store),
        topology=dualpath.Topology.parse("1P2D"),
        system=system,
        snic_bytes_per_s=snic_bytes_per_s,
        cnic_bytes_per_s=8 * snic_bytes_per_s,
        port=0,
    )
    with dualpath.Server(config) as server:
        result = dualpath.replay(server.url, trajectories, measured_from=1)
    timings = [turn.timings for turn in result.turns if turn.timings is not None]
    return {
        "jct_s": result.jct_s,
        "read_bytes": float(sum(one.kv_read_bytes for one in timings)),
        "unread_bytes": float(sum(one.kv_unread_bytes for one in timings)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=8, help="(default: 8)")
    parser.add_argument("--context", type=int, default=3000, help="tokens of the first prompt (default: 3000)")
    parser.add_argument("--rate", type=int, default=40_000_000, help="bytes/s of a storage NIC (default: 40000000)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    arguments = parser.parse_args()
    mix = AgentMix(turns=4, first_context_tokens=arguments.context, append_tokens=48, generate_tokens=8)
    trajectories = dualpath.generate_trajectories(mix, arguments.agents, seed=0)
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = checkpoints(Path(folder))
        for number in range(arguments.rounds):
            for name, model in models.items():
                for system in ("basic", "dualpath"):
                    store = Path(folder) / f"{name}-{system}-{number}"
                    figures = run(model, store, system, trajectories, arguments.rate)
                    runs.setdefault(f"{name} {system}", []).append(figures)
                    print(f"{number + 1}/{arguments.rounds} {name:<8} {system:<9} {figures['jct_s']:.1f} s", flush=True)
    table = {
        case: {key: statistics.median(figures[key] for figures in every) for key in every[0]}
        for case, every in runs.items()
    }
    print(f"\n{'':<18}{'JCT s':>7}{'range':>14}{'read MB':>9}{'left MB':>9}")
    for case, figures in table.items():
        times = sorted(one["jct_s"] for one in runs[case])
        spread = f"{times[0]:.1f} – {times[-1]:.1f}"
        mb = [figures[key] / 1e6 for key in ("read_bytes", "unread_bytes")]
        print(f"{case:<18}{figures['jct_s']:>7.1f}{spread:>14}{mb[0]:>9.0f}{mb[1]:>9.0f}")
    for system in ("basic", "dualpath"):
        none, windows = table[f"none {system}"], table[f"windows {system}"]
        print(
            f"{system}: with windows {none['jct_s'] / windows['jct_s']:.2f}x as fast, "
            f"{windows['read_bytes'] / none['read_bytes']:.2f} of the bytes"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"benchmark": "windows", "runs": runs, "median": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
