"""Items that need no simulation: the cache-compute table and the bottleneck-free range."""

from dualpath.lab.facts.bottleneck import bottleneck_free
from dualpath.lab.facts.cache_compute import paper_table
from dualpath.lab.facts.cluster_files import load_cluster
from dualpath.lab.paper.rows import Row, row
from dualpath.lab.paper.runner import Runner


def cache_compute(_: Runner) -> list[Row]:
    """GB of KV to load per PFLOP of prefill (paper §1), every cell."""
    return [
        row(
            "cache-compute",
            f"{cell.model}, {cell.context_tokens // 1024}K context, GB/PFLOP",
            cell.theirs_gb_per_pflop,
            cell.ours_gb_per_pflop,
            "fitted" if cell.model == "deepseek-v3" else "predicted",
            "one constant, MLA's FLOPs a pair, is fitted to this row" if cell.model == "deepseek-v3" else "",
        )
        for cell in paper_table()
    ]


def pd_range(_: Runner) -> list[Row]:
    """Range of P/D in which the storage NICs bind before any compute NIC or DRAM (paper §4.2), for the paper's node."""
    cluster = load_cluster("ds660b-2p4d")
    answer = bottleneck_free(
        cluster.prefill_nodes,
        cluster.decode_nodes,
        cluster.engines_per_node,
        cluster.snic_ratio,
        cluster.nominal_cnic_bytes_per_s,
        cluster.dram_bytes_per_s,
    )
    return [
        row("pd-range", "least P/D", 1 / 7, answer.least_ratio, note=f"below it: {answer.least_link}"),
        row("pd-range", "most P/D", 7 / 2, answer.most_ratio, note=f"above it: {answer.most_link}"),
    ]
