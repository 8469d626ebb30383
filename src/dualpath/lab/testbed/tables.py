"""Output of the testbed's commands."""

from rich.table import Table

from dualpath.lab.testbed.network import DeviceStatus, NodeStatus, Testbed
from dualpath.lab.testbed.qos import WANTED_KV_SHARE, WANTED_LATENCY_RATIO, QosReport


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
    title = f"{report.message_bytes} B round trips, CNIC {_megabytes(report.cnic_bytes_per_s)}/s"
    table = Table(title=title, title_justify="left")
    table.add_column("beside")
    for heading in ("p50 µs", "p99 µs", "messages", "KV MB/s"):
        table.add_column(heading, justify="right")
    for phase in report.phases:
        table.add_row(
            phase.name,
            "" if phase.p50_us is None else f"{phase.p50_us:,.0f}",
            "" if phase.p99_us is None else f"{phase.p99_us:,.0f}",
            str(phase.messages or ""),
            "" if phase.kv_bytes_per_s is None else f"{phase.kv_bytes_per_s / 1e6:.1f}",
        )
    return table


def qos_lines(report: QosReport) -> list[str]:
    """Says what the table means."""
    return [
        f"p50 in two classes: {report.latency_ratio:.2f} × idle (wanted: at most {WANTED_LATENCY_RATIO})",
        f"                    {report.latency_ratio_busy:.2f} × with KV elsewhere, the processor as busy",
        f"p50 in one queue:   {report.latency_ratio_fifo:.1f} × idle",
        f"KV has {report.kv_share:.1%} of what the messages leave (wanted: at least {WANTED_KV_SHARE:.0%})",
    ]


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
