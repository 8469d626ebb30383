"""Output of the testbed's commands."""

from rich.table import Table

from dualpath.lab.testbed.network import DeviceStatus, NodeStatus, Testbed
from dualpath.lab.testbed.qos_report import WANTED_KV_SHARE, WANTED_LATENCY_RATIO, QosReport, Ratio, Times


def status_table(testbed: Testbed, nodes: list[NodeStatus]) -> Table:
    """Makes a row per NIC."""
    plan = testbed.plan
    table = Table(title=f"testbed {plan.name}: {plan.prefill_engines}P{plan.decode_engines}D", title_justify="left")
    for heading in ("node", "namespace", "processes", "NIC", "address"):
        table.add_column(heading)
    for heading in ("rate", "sent high", "sent low"):
        table.add_column(heading, justify="right")
    for node in nodes:
        for first, device in zip((True, *[False] * len(node.devices)), node.devices, strict=False):
            of_node = (node.name, node.namespace, str(len(node.pids))) if first else ("", "", "")
            table.add_row(*of_node, *_device(device))
    return table


def qos_table(report: QosReport) -> Table:
    """Makes a row per phase."""
    sizes = " + ".join(f"{n_bytes / 1e3:.0f}" for n_bytes in report.all_to_all.sizes_bytes)
    title = f"{report.transport}, CNIC {_megabytes(report.cnic_bytes_per_s)}/s; all-to-alls of {sizes} kB to each rank"
    table = Table(title=title, title_justify="left")
    table.add_column("beside")
    for heading in ("ping p50 µs", "p99", "all-to-all p50 µs", "p99", "number", "messages MB/s", "KV MB/s"):
        table.add_column(heading, justify="right")
    for phase in report.phases:
        table.add_row(
            phase.name,
            *_times(phase.pings),
            *_times(phase.all_to_alls),
            str(phase.all_to_alls.messages) if phase.all_to_alls else "",
            f"{phase.high_bytes_per_s / 1e6:.1f}" if phase.high_bytes_per_s else "",
            "" if phase.kv_bytes_per_s is None else f"{phase.kv_bytes_per_s / 1e6:.1f}",
        )
    return table


def qos_lines(report: QosReport) -> list[str]:
    """Says what the table means."""
    lines = ["Medians and quartiles of the rounds:"]
    for what, delays in (("pings", report.pings), ("all-to-alls", report.all_to_alls)):
        lines += [
            f"p50 of {what}, two classes: {_shown(delays.idle)} × idle (wanted: at most {WANTED_LATENCY_RATIO})",
            f"  {_shown(delays.busy)} × with KV elsewhere, the processor as busy",
            f"  one queue: {_shown(delays.fifo)} × idle",
        ]
    return [*lines, f"KV has {_shown(report.kv_share)} of what messages leave (wanted: at least {WANTED_KV_SHARE})"]


def _shown(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _times(times: Times | None) -> tuple[str, str]:
    return (f"{times.p50_us:,.0f}", f"{times.p99_us:,.0f}") if times else ("", "")


def _device(device: DeviceStatus) -> tuple[str, ...]:
    rate = device.rate_bytes_per_s
    return (
        device.name,
        device.address,
        "unlimited" if rate is None else f"{_megabytes(rate)}/s",
        "" if device.sent_high_bytes is None else _megabytes(device.sent_high_bytes),
        "" if device.sent_low_bytes is None else _megabytes(device.sent_low_bytes),
    )


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
