"""Items with all agents at once: job completion times (JCT), their ratios, and how evenly the work was spread (§7)."""

from dualpath.lab.paper.rows import Row, row
from dualpath.lab.paper.runner import Runner

DS660B, DS27B, QWEN32B = "ds660b-2p4d", "ds27b-1p1d", "qwen32b-1p2d"
AGENTS_660B = (1024, 2048)
AGENTS_LARGE = 24 * 2048
AGENTS_27B = 512
MORE_AGENTS_27B = 1024
AGENTS_QWEN = 128
APPEND_SCALES = (1.0, 2.0, 4.0)
FITTED_JCT = "fits the effective FLOP/s of a prefill GPU"


def _speedup(runner: Runner, preset: str, agents: int, append_scale: float = 1.0) -> float:
    basic, ours = (
        runner.offline(preset, system, agents, append_scale=append_scale).simulated_s
        for system in ("basic", "dualpath")
    )
    return basic / ours


def offline(runner: Runner) -> list[Row]:
    """Speed-ups of Ours over Basic, and Ours against the Oracle."""
    most = max(AGENTS_660B)
    ours, oracle = (runner.offline(DS660B, system, most).simulated_s for system in ("dualpath", "oracle"))
    speedup = max(_speedup(runner, DS660B, agents) for agents in AGENTS_660B)
    speedup_27b = max(_speedup(runner, DS27B, agents) for agents in (AGENTS_27B, MORE_AGENTS_27B))
    small, small_oracle = (runner.offline(DS27B, system, AGENTS_27B).simulated_s for system in ("dualpath", "oracle"))
    return [
        row("offline", "DS 660B, 2,048 agents: JCT, s", 3167, ours, "fitted", FITTED_JCT),
        row("offline", "DS 660B: Basic over Ours, the most", 1.87, speedup, note="1,024 and 2,048 agents of 64K"),
        row("offline", "DS 660B: Ours over Oracle", 1.0, ours / oracle, note='theirs: "about equal"'),
        row("offline", "DS 27B: Basic over Ours, the most", 1.78, speedup_27b, note="512 and 1,024 agents of 64K"),
        row(
            "offline",
            "DS 27B: Ours over Oracle",
            (1.09 * 1.85) ** 0.5,
            small / small_oracle,
            note="theirs: 1.09 to 1.85 over its workloads; the geometric middle of that",
        ),
        row(
            "offline",
            "Qwen 32B: Basic over Ours",
            1.78,
            _speedup(runner, QWEN32B, AGENTS_QWEN),
            note='theirs: "the same trend as DS 27B", no figure; DS 27B\'s stands in',
        ),
    ]


def append_scaling(runner: Runner) -> list[Row]:
    """DS 660B with longer appends: the gain shrinks as prefill grows."""
    gains = [_speedup(runner, DS660B, AGENTS_660B[0], scale) for scale in APPEND_SCALES]
    pairs = zip(APPEND_SCALES, gains, strict=True)
    note = "appends times " + ", ".join(f"{scale:g}: {gain:.2f}" for scale, gain in pairs)
    return [
        row("append-scaling", "Basic over Ours, the most", 1.99, max(gains), note=note),
        row("append-scaling", "Basic over Ours, the least", 1.82, min(gains), note=note),
    ]


def ablation(runner: Runner) -> list[Row]:
    """How much each part takes off Basic's JCT: mean of 1,024 and 2,048 agents."""
    steps = (
        ("+ layerwise prefill", "basic-layerwise", 17.21, "fits the cost of a whole-prompt copy"),
        ("+ dual path, round robin", "dualpath-rr", 38.19, ""),
        ("+ scheduling", "dualpath", 45.62, "fits the usable share of a storage NIC"),
    )
    rows = []
    for what, system, theirs, fits in steps:
        ratios = [
            runner.offline(DS660B, system, agents).simulated_s / runner.offline(DS660B, "basic", agents).simulated_s
            for agents in AGENTS_660B
        ]
        ours = 100 * (1 - sum(ratios) / len(ratios))
        rows.append(
            row("ablation", f"{what}: less JCT than Basic, %", theirs, ours, "fitted" if fits else "predicted", fits)
        )
    return rows


def balance(runner: Runner) -> list[Row]:
    """Balance of storage NIC traffic, and of attention time within a group of prefill engines."""
    agents = max(AGENTS_660B)
    turns, ours = (runner.offline(DS660B, system, agents) for system in ("dualpath-rr", "dualpath"))
    window = f"{agents:,} agents, windows of {ours.balance_window_s:g} s"
    return [
        row("balance", "SNIC traffic, max over mean, round robin", 1.53, turns.snic_max_over_mean, note=window),
        row("balance", "SNIC traffic, max over mean, scheduled", 1.18, ours.snic_max_over_mean, note=window),
        row("balance", "attention time, max over mean, first 5 %", 1.06, ours.attention_max_over_mean),
    ]


def pd_sweep(runner: Runner) -> list[Row]:
    """DS 27B on other numbers of nodes. Pairs with equal usable storage bandwidth tie."""
    jct = {
        (nodes, system): runner.offline(f"ds27b-{nodes}", system, AGENTS_27B).simulated_s
        for nodes in ("1p1d", "2p1d", "1p2d")
        for system in ("basic", "dualpath")
    }
    gains = [jct[nodes, "basic"] / jct[nodes, "dualpath"] for nodes in ("1p1d", "2p1d", "1p2d")]
    ties = (
        ("Basic 1P1D over Basic 1P2D", ("1p1d", "basic"), ("1p2d", "basic")),
        ("Ours 1P1D over Basic 2P1D", ("1p1d", "dualpath"), ("2p1d", "basic")),
        ("Ours 2P1D over Ours 1P2D", ("2p1d", "dualpath"), ("1p2d", "dualpath")),
    )
    return [
        row("pd-sweep", "Basic over Ours, mean", 1.64, sum(gains) / 3),
        row("pd-sweep", "Basic over Ours, the most", 2.46, max(gains)),
        *(row("pd-sweep", f"tie: {what}", 1.0, jct[one] / jct[other]) for what, one, other in ties),
    ]


def scale_offline(runner: Runner) -> list[Row]:
    """24 times the nodes and agents."""
    large = runner.offline("ds660b-48p96d", "dualpath", AGENTS_LARGE)
    small = runner.offline(DS660B, "dualpath", max(AGENTS_660B))
    cost = f"{large.turns:,} turns in {large.cpu_s:,.0f} CPU-s"
    return [
        row("scale-offline", "48P96D, 48K agents: JCT, s", 3201, large.simulated_s, note=cost),
        row("scale-offline", "48P96D over 2P4D", 3201 / 3167, large.simulated_s / small.simulated_s),
    ]


def scheduler_cpu(runner: Runner) -> list[Row]:
    """Cores that the scheduler takes at 1,152 GPUs; our upper bound is the whole simulator's CPU time."""
    large = runner.offline("ds660b-48p96d", "dualpath", AGENTS_LARGE)
    cores = large.cpu_s / large.simulated_s
    return [row("scheduler-cpu", "cores, upper bound", 10, cores, note='theirs: "less than 10"; less is better')]
