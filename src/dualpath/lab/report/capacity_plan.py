"""A capacity plan as a table and as sentences. It reads the plan as decoded from JSON."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dualpath.spec.units import format_bytes, format_rate

MAX_SPLITS = 7
"""Number of listed divisions of the nodes: the best one, the present one and their neighbours."""
CAVEAT = (
    "These rates are upper bounds: loading overlaps computing fully, nothing queues, every engine has the same load. "
    "Real systems reach less, and basic loses most; simulate what you are about to build."
)


def resource_table(plan: Mapping[str, Any]) -> Table:
    """Shows what each resource would allow if it alone were limited, in agents per second; the binding one is bold."""
    table = _table("Agents/s that each resource allows")
    for heading in ("asked per turn", "basic", "dualpath"):
        table.add_column(heading, justify="right", no_wrap=True)
    per_agent = plan["load"]["turns_per_agent"]
    for basic, dualpath in zip(plan["basic"]["demands"], plan["dualpath"]["demands"], strict=True):
        rates = (_rate(basic, plan["basic"], per_agent), _rate(dualpath, plan["dualpath"], per_agent))
        table.add_row(basic["resource"], _amount(basic, dualpath), *rates)
    return table


def split_table(plan: Mapping[str, Any]) -> Table:
    """Shows divisions of the same nodes around the best one."""
    table = _table("Agents/s by division of the nodes")
    for heading in ("basic", "dualpath"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("limited by", no_wrap=True)
    for split in _near_best(plan):
        best, now = split == plan["best_split"], split["prefill_nodes"] == plan["prefill_nodes"]
        remark = "  (best)" if best else "  (now)" if now else ""
        table.add_row(
            f"{split['prefill_nodes']}P{split['decode_nodes']}D{remark}",
            _number(split["basic_agents_per_s"]),
            _number(split["dualpath_agents_per_s"]),
            split["dualpath_binding"] if split["dualpath_agents_per_s"] else "does not fit",
            style="bold" if best else None,
        )
    return table


def plan_sentences(plan: Mapping[str, Any]) -> Iterator[str]:
    """Puts the plan into words, from the question to the caveats."""
    yield _question(plan)
    yield _turn(plan)
    yield _basic(plan)
    yield _dualpath(plan)
    yield _range(plan["bottleneck_free"])
    yield _best(plan)
    yield _working_set(plan["working_set"])
    yield _decode(plan)
    yield CAVEAT


def _question(plan: Mapping[str, Any]) -> str:
    return (
        f"{plan['cluster']}: {plan['model']} on {plan['prefill_nodes']}P{plan['decode_nodes']}D, nodes of "
        f"{plan['engines_per_node']} {plan['gpu']} with {format_rate(plan['snic_bytes_per_s'])} of usable storage NIC."
    )


def _turn(plan: Mapping[str, Any]) -> str:
    load = plan["load"]
    kv = f"{format_bytes(plan['hit_bytes'])} at {plan['kv_bytes_per_token']:,} bytes a token"
    return (
        f"The mean turn of {load['name']} ({load['turns_per_agent']:.1f} turns an agent) loads "
        f"{load['hit_tokens']:,.0f} tokens of KV ({kv}{_unread(plan['unread_bytes'])}), computes "
        f"{load['miss_tokens']:,.0f} ({plan['prefill_flops'] / 1e12:.1f} TFLOP) and generates "
        f"{load['generate_tokens']:,.0f}: {plan['gb_per_pflop']:.0f} GB to load for a PFLOP of prefill."
    )


def _unread(n_bytes: float) -> str:
    return f", less {format_bytes(n_bytes)} that sliding windows have passed" if n_bytes else ""


def _basic(plan: Mapping[str, Any]) -> str:
    basic = plan["basic"]
    return (
        f"Basic, reading with prefill nodes only, is limited by {basic['binding']}: at most "
        f"{_number(basic['agents_per_s'])} agents/s ({_number(basic['turns_per_s'])} turns/s)."
    )


def _dualpath(plan: Mapping[str, Any]) -> str:
    dualpath = plan["dualpath"]
    answer = (
        f"Dual-path, with {dualpath['pe_share']:.0%} of the reads on prefill nodes, is limited by "
        f"{dualpath['binding']}: at most {_number(dualpath['agents_per_s'])} agents/s, {plan['gain']:.2f} times basic."
    )
    others = [
        f"at {case['compute_factor']:g} times the effective compute {case['gain']:.2f} times "
        f"({_number(case['dualpath_agents_per_s'])} agents/s, {case['binding']})"
        for case in plan["sensitivity"]
    ]
    return f"{answer} Were it otherwise: {'; '.join(others)}."


def _range(free: Mapping[str, Any]) -> str:
    if free["least_ratio"] > free["most_ratio"]:
        return "No P/D lets every storage NIC run at full rate: its compute NICs or its DRAM are too slow for them."
    busiest = max(free["loads"], key=lambda load: load["utilisation"])
    span = (
        f"Every storage NIC can run at full rate for P/D from {free['least_ratio']:.2f} ({free['least_link']} is full "
        f"below) to {free['most_ratio']:.2f} ({free['most_link']} is full above)"
    )
    if busiest["utilisation"] > 1 + 1e-12:
        return (
            f"{span}; at {free['ratio']:.2f} they can't: {busiest['link']} would need {busiest['utilisation']:.2f} "
            "times what it has."
        )
    other = f"the busiest other link, {busiest['link']}, is {busiest['utilisation']:.0%} used"
    return f"{span}; at {free['ratio']:.2f} {other}."


def _best(plan: Mapping[str, Any]) -> str:
    best = plan["best_split"]
    name = f"{best['prefill_nodes']}P{best['decode_nodes']}D"
    if best["prefill_nodes"] == plan["prefill_nodes"]:
        return f"Of these nodes, {name} is the best division for dual-path."
    gained = best["dualpath_agents_per_s"] / plan["dualpath"]["agents_per_s"]
    return (
        f"Of these nodes, {name} would be the best division for dual-path: {_number(best['dualpath_agents_per_s'])} "
        f"agents/s, {gained:.2f} times this one, limited by {best['dualpath_binding']}."
    )


def _working_set(working: Mapping[str, Any]) -> str:
    buffers = working["dram_buffer_bytes"]
    low, high = working["bytes_unloaded"], working["bytes_at_slo"]
    verdict = (
        "they hold all of it"
        if buffers >= high
        else "they can't hold it, so hits come from storage"
        if buffers < low
        else "they hold it only while agents are fast"
    )
    return (
        f"At {_number(working['agents_per_s'])} agents/s the KV of the agents in flight is {format_bytes(low)} to "
        f"{format_bytes(high)} (an agent takes {working['agent_s_unloaded']:,.0f} s alone and "
        f"{working['agent_s_at_slo']:,.0f} s at the limits of the SLO); the DRAM buffers of all nodes are "
        f"{format_bytes(buffers)}: {verdict}."
    )


def _decode(plan: Mapping[str, Any]) -> str:
    decode, slo = plan["decode"], plan["slo"]
    return (
        f"A decode engine takes {decode['batch']} requests at once, limited by {decode['limit']}, at "
        f"{decode['tpot_s'] * 1e3:.0f} ms a token (SLO {slo['tpot_s'] * 1e3:g} ms); an idle cluster needs "
        f"{plan['unloaded_ttft_s']:.2f} s to the first token (SLO {slo['ttft_s']:g} s)."
    )


def _near_best(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns splits close to the best one and to the present one, in order."""
    splits = plan["splits"]
    best = plan["best_split"]["prefill_nodes"] - 1
    first = max(0, min(best - MAX_SPLITS // 2, len(splits) - MAX_SPLITS))
    listed = set(range(first, min(len(splits), first + MAX_SPLITS))) | {plan["prefill_nodes"] - 1}
    return [splits[index] for index in sorted(listed)]


def _rate(demand: Mapping[str, Any], system: Mapping[str, Any], turns_per_agent: float) -> str:
    if demand["turns_per_s"] is None:
        return "–"
    text = _number(demand["turns_per_s"] / turns_per_agent)
    return f"[bold]{text}[/bold]" if demand["resource"] in system["binding"].split(" + ") else text


def _amount(basic: Mapping[str, Any], dualpath: Mapping[str, Any]) -> str:
    """Returns ``1.5 GB``, or ``1.5 GB → 0.5 GB`` if dual-path asks for something else."""
    before, after = _quantity(basic), _quantity(dualpath)
    return before if before == after else f"{before} → {after}"


def _quantity(demand: Mapping[str, Any]) -> str:
    if demand["unit"] == "bytes":
        return format_bytes(demand["per_turn"])
    if demand["unit"] == "s":
        return f"{demand['per_turn'] * 1e3:,.1f} ms"
    if demand["unit"] == "FLOP":
        return f"{demand['per_turn'] / 1e12:.1f} TFLOP"
    return f"{demand['per_turn']:,.0f} {demand['unit']}"


def _number(value: float) -> str:
    """Formats about three digits, never with an exponent."""
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _table(title: str) -> Table:
    table = Table(title=title, title_style="", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    return table
