"""Shows what `dualpath store stat` and `fsck` found. It reads their reports as decoded from JSON."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dualpath.spec.units import format_bytes

MAX_LISTED = 20
"""Files of one kind that are named; the rest is counted. ``--json`` lists them all."""


def stat_table(report: Mapping[str, Any]) -> Table:
    """Makes a row per namespace: a model's weights, layout and tenant."""
    table = Table(title=f"store {report['location']}", title_style="", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for heading, right in (
        ("namespace", False),
        ("model", False),
        ("layout", False),
        ("blocks", True),
        ("on disk", True),
        ("deepest\nprefix", True),
        ("newest", False),
        ("bad", True),
        ("set\naside", True),
    ):
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for space in report["namespaces"]:
        description = space["description"]
        table.add_row(
            space["namespace"][:8],
            "?" if description is None else description["model_fingerprint"][:12],
            "?" if description is None else _layout(description["layout"]),
            f"{space['blocks']:,}",
            format_bytes(space["physical_bytes"]),
            f"{space['deepest_chain_blocks']:,}",
            _when(space["newest_mtime_ns"]),
            str(space["unreadable_files"]),
            str(space["quarantined_files"]),
        )
    return table


def fsck_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Says what was checked, what was found, and what was done about it."""
    yield (
        f"{report['location']}: {report['sound_blocks']:,} of {report['checked_blocks']:,} blocks are sound "
        f"({format_bytes(report['checked_bytes'])} checked in {report['namespaces']} namespaces)"
    )
    bad = [f"{file['path']}: {file['cause']}: {file['detail']}" for file in report["bad_files"]]
    unavailable = [f"{file['path']}: {file['detail']}" for file in report["unavailable"]]
    nameless, found = report["undescribed"], False
    for title, items in (
        ("bad files", bad),
        ("orphans: sound blocks that no prefix leads to", report["orphans"]),
        ("leftovers: half-written files and empty namespaces", report["leftovers"]),
        (
            "namespaces without a sound description; their next block brings it, in another version's none",
            nameless,
        ),
        ("blocks or folders that can't be read now, and are left alone", unavailable),
        ("repairs that failed", report["not_repaired"]),
    ):
        if items:
            found = True
            yield f"{len(items):,} {title}"
            yield from (f"  {item}" for item in items[:MAX_LISTED])
            if len(items) > MAX_LISTED:
                yield f"  and {len(items) - MAX_LISTED:,} more; --json FILE lists them all"
    if report["repaired"] and found:
        rest = "the rest of the " if report["not_repaired"] else ""
        yield f"repaired: {rest}bad files are set aside, orphans and leftovers deleted"
    elif found:
        yield "nothing was changed; --repair sets bad files aside and deletes orphans and leftovers"


def _layout(layout: Mapping[str, Any]) -> str:
    kinds = []
    for index, kind in enumerate(layout["kinds"]):
        parts = " ".join(f"{part['name']} {part['heads']}×{part['dim']}" for part in kind["parts"])
        window = "" if kind["window_tokens"] is None else f", window {kind['window_tokens']}"
        count = layout["layer_kinds"].count(index)
        kinds.append(f"{count} {'layer' if count == 1 else 'layers'}, {parts}{window}")
    return f"{'; '.join(kinds)}, {layout['dtype']}"


def _when(mtime_ns: int | None) -> str:
    return "–" if mtime_ns is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(mtime_ns / 1e9))
