"""Result documents for tests, with figures that fit together."""

RATE = 60_000_000


def run(topology, system, jct_s, snic_bytes, basic_s=None, ideal=None, readers=None, **other):
    """A run's document; `readers` are the engines its max/avg is over, all of them by default."""
    read = [snic_bytes[name] for name in readers or snic_bytes]
    ratio = None if basic_s is None else basic_s / jct_s
    return {
        "topology": topology,
        "system": system,
        "jct_s": jct_s,
        "ratio_to_basic": ratio,
        "ideal_ratio": ideal,
        "ratio_to_ideal": None if ratio is None or ideal is None or system in ("basic", "oracle") else ratio / ideal,
        "ttft_p50_s": jct_s / 10,
        "ttft_p99_s": jct_s / 5,
        "ttst_p50_s": 0.0214,
        "ttst_p99_s": 0.0391,
        "tpot_p50_s": 0.0123,
        "tpot_p99_s": 0.0187,
        "hit_rate": 0.9614,
        "snic_max_over_avg": max(read) * len(read) / sum(read) if sum(read) else None,
        "snic_bytes": snic_bytes,
        "turns": 60,
        "errors": 0,
        "same_tokens_as_basic": None if system == "basic" or basic_s is None else 1.0,
    } | other


def document(*runs, **configuration):
    return {
        "runs": list(runs),
        "configuration": {
            "model": ".models/demo",
            "topologies": list(dict.fromkeys(one["topology"] for one in runs)),
            "systems": list(dict.fromkeys(one["system"] for one in runs)),
            "snic_bytes_per_s": RATE,
            "cnic_bytes_per_s": 8 * RATE,
            "repeats": 1,
            "seed": 0,
            "machine": "2 cores",
        }
        | configuration,
        "command": "dualpath demo",
        "workload": {
            "source": "generated",
            "agents": 12,
            "turns": 60,
            "prompt_tokens": 180_000,
            "append_tokens": 3_840,
            "generate_tokens": 960,
            "max_context_tokens": 4_096,
            "warm_up": "first contexts stored before the clock starts",
        },
    }


def full():
    """Both topologies under the three systems of the demo."""
    return document(
        run("1P1D", "basic", 50.0, {"PE0": 2_820_000_000, "DE0": 0}, 50.0, 2.0, ["PE0"]),
        run("1P1D", "dualpath", 27.0, {"PE0": 1_460_000_000, "DE0": 1_360_000_000}, 50.0, 2.0),
        run("1P1D", "oracle", 14.0, {"PE0": 1_500_000_000, "DE0": 1_320_000_000}, 50.0, 2.0),
        run("1P2D", "basic", 49.5, {"PE0": 2_820_000_000, "DE0": 0, "DE1": 0}, 49.5, 2.75, ["PE0"]),
        run("1P2D", "dualpath", 20.0, {"PE0": 980_000_000, "DE0": 930_000_000, "DE1": 910_000_000}, 49.5, 2.75),
        run("1P2D", "oracle", 18.0, {"PE0": 960_000_000, "DE0": 940_000_000, "DE1": 920_000_000}, 49.5, 2.75),
    )
