"""The columns of the page's two tables, and the rows of the table of runs."""

from collections.abc import Sequence

import msgspec

from dualpath.lab.report.html.chart import Value
from dualpath.lab.report.html.settings import Entry


class Column(msgspec.Struct, frozen=True):
    """A column of a table that can be sorted and filtered."""

    key: str
    """As filters name it: ``ttft>500``."""
    label: str
    digits: int | None = None
    """After the decimal point; None for text."""


RUN_COLUMNS = [
    Column("setting", "setting"),
    Column("system", "system"),
    Column("repeat", "repeat", 0),
    Column("jct", "JCT s", 2),
    Column("over", "over basic", 2),
    Column("ideal", "of ideal %", 0),
    Column("ttft50", "TTFT p50 s", 3),
    Column("ttft99", "TTFT p99 s", 3),
    Column("ttst50", "TTST p50 ms", 1),
    Column("ttst99", "TTST p99 ms", 1),
    Column("tpot50", "TPOT p50 ms", 1),
    Column("tpot99", "TPOT p99 ms", 1),
    Column("hit", "hit rate %", 1),
    Column("maxavg", "SNIC max/avg", 3),
    Column("gb", "SNIC GB", 3),
    Column("turns", "turns", 0),
    Column("retries", "retries", 0),
    Column("failed", "failed turns", 0),
    Column("same", "same tokens %", 1),
]

TURN_COLUMNS = [
    Column("run", "run"),
    Column("agent", "agent"),
    Column("round", "round", 0),
    Column("start", "start s", 2),
    Column("ttft", "TTFT ms", 0),
    Column("ttst", "TTST ms", 1),
    Column("tpot", "TPOT ms", 1),
    Column("latency", "latency ms", 0),
    Column("prompt", "prompt tokens", 0),
    Column("loaded", "loaded tokens", 0),
    Column("generated", "generated tokens", 0),
    Column("pe", "PE"),
    Column("de", "DE"),
    Column("pe_read", "read by PE tokens", 0),
    Column("de_read", "read by DE tokens", 0),
    Column("scheduling", "scheduling ms", 1),
    Column("allocation", "allocation ms", 1),
    Column("read", "read ms", 0),
    Column("prefill", "prefill ms", 0),
    Column("decode", "decode ms", 0),
    Column("tries", "tries", 0),
    Column("attempts", "attempts", 0),
]


def run_rows(entries: Sequence[Entry]) -> list[list[Value]]:
    """A row for each run, a value for each of `RUN_COLUMNS`."""
    rows: list[list[Value]] = []
    for entry in entries:
        run = entry.run
        rows.append(
            [
                entry.setting.label,
                run.system,
                run.repeat + 1,
                run.jct_s,
                run.ratio_to_basic,
                _times(run.ratio_to_ideal, 100),
                run.ttft_p50_s,
                run.ttft_p99_s,
                *(_times(s, 1e3) for s in (run.ttst_p50_s, run.ttst_p99_s, run.tpot_p50_s, run.tpot_p99_s)),
                run.hit_rate * 100,
                run.snic_max_over_avg,
                sum(run.snic_bytes.values()) / 1e9,
                run.turns,
                run.retries,
                run.errors,
                _times(run.same_tokens_as_basic, 100),
            ]
        )
    return rows


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
