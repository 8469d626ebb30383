"""``dualpath paper``: the items that need no simulation, one that does, capacities, and what is written."""

import json
import operator
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dualpath import cli
from dualpath.lab.facts.cluster import ClusterError
from dualpath.lab.paper.archive import ArchiveError, merged
from dualpath.lab.paper.document import write_results
from dualpath.lab.paper.items import ITEMS
from dualpath.lab.paper.online import CAPACITY_STEP, capacity, working_set
from dualpath.lab.paper.rows import Row, row
from dualpath.lab.paper.runner import Runner, process_pool
from dualpath.lab.paper.steady import sustains
from dualpath.lab.paper.together import together


def test_the_table_and_the_range_are_reproduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    argv = ["paper", "cache-compute", "pd-range", "--out", str(tmp_path / "results"), "--json", str(out)]
    assert cli.main(argv) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 12
    assert {key for entry in rows for key in entry} == {"item", "what", "theirs", "ours", "error", "kind", "note"}
    assert all(abs(entry["error"]) <= 0.03 for entry in rows)
    assert {entry["kind"] for entry in rows if "deepseek-v3," in entry["what"]} == {"fitted"}
    page = (tmp_path / "results" / "paper.md").read_text()
    assert all(entry["what"] in page for entry in rows)
    assert "10 are within 10 %" in page
    assert (tmp_path / "results" / "paper.png").read_bytes().startswith(b"\x89PNG")
    assert "cache-compute" in capsys.readouterr().out


@pytest.mark.slow
def test_an_ablation_at_a_small_scale() -> None:
    """Directions hold at any scale; each simulation is run once however often it is asked for."""
    ran: list[str] = []
    runner = Runner(scale=0.06, announce=ran.append)
    rows = [*ITEMS["ablation"](runner), *ITEMS["ablation"](runner)]
    less_jct = [entry.ours for entry in rows[:3]]
    assert 0 < less_jct[0] < less_jct[1] <= less_jct[2] + 5
    assert len(ran) == len(set(ran)) == 8
    assert len(runner.runs()) == 8
    assert rows[:3] == rows[3:]


@pytest.mark.slow
def test_processes_change_nothing_and_share_what_items_have_in_common() -> None:
    """Two items of the same simulations, on two processes and on none."""
    names = ["ablation", "balance"]
    alone = Runner(scale=0.01)
    expected = {found[0][0].item: found[0] for found in together(names, alone)}
    asked: list[str] = []
    ended: list[None] = []
    with process_pool(2) as pool:
        runner = Runner(scale=0.01, announce=asked.append, pool=pool, on_done=lambda: ended.append(None))
        found = {rows[0].item: rows for rows, _ in together(names, runner)}
    assert found == expected
    assert len(asked) == len(set(asked)) == len(ended) == 8
    key = operator.attrgetter("system", "agents")
    assert [one.simulated_s for one in sorted(runner.runs(), key=key)] == [
        one.simulated_s for one in sorted(alone.runs(), key=key)
    ]


def test_a_simulation_that_fails_reaches_whoever_asked() -> None:
    with process_pool(2) as pool, pytest.raises(ClusterError, match="no cluster 'nowhere'"):
        Runner(pool=pool).offline("nowhere", "dualpath", 8)


def test_a_working_set_is_arrivals_times_stay_times_half_the_context() -> None:
    outcome = SimpleNamespace(agent_s=600.0, mean_total_tokens=50_000.0, kv_bytes_per_token=40_000)
    runner = SimpleNamespace(online=lambda *_: outcome)
    low, high = working_set(runner)  # type: ignore[arg-type]
    assert low.ours == pytest.approx(0.1 * 600 * 25_000 * 40_000 / 1e9)
    assert high.ours == pytest.approx(4.5 * low.ours)


@pytest.mark.slow
def test_scheduling_evens_out_what_round_robin_does_not() -> None:
    """Under load: with empty queues every read is the PE side's."""
    round_robin, scheduled, attention = ITEMS["balance"](Runner(scale=0.3))
    assert round_robin.ours > scheduled.ours >= 1
    assert attention.ours >= 1


def test_the_command_line_names_every_item(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["paper", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ITEMS)
    assert cli.main(["paper", "everything"]) == 2
    assert "no item 'everything'" in capsys.readouterr().err
    assert cli.main(["paper", "pd-range", "--scale", "2"]) == 2
    assert "scale is 2" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [0.07, 0.3, 0.5, 1.9])
def test_capacity_is_narrowed_down_from_either_side(limit: float) -> None:
    runner = SimpleNamespace(sustains=lambda preset, system, agents_per_s: agents_per_s <= limit)
    found = capacity(runner, "any", "any", 0.5)  # type: ignore[arg-type]
    assert limit / (1 + CAPACITY_STEP) / 1.0001 <= found <= limit


class Latencies:
    """Stands for a simulator: ten turns a second whose latencies are functions of time."""

    def __init__(self, ttft_s: "Callable[[float], float]", tpot_s: float = 0.03) -> None:
        self.measured = SimpleNamespace(ttft_s=array("f"), tpot_s=array("f"), finished=0)
        self.now_s = 0
        self._ttft_s = ttft_s
        self._tpot_s = tpot_s

    def run(self, until_ns: int) -> None:
        while self.now_s < until_ns // 10**9:
            self.now_s += 1
            for _ in range(10):
                self.measured.ttft_s.append(self._ttft_s(self.now_s))
                self.measured.tpot_s.append(self._tpot_s)
                self.measured.finished += 1


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "sustained", "ends_s"),
    [
        (lambda now_s: 1.0, 0.03, True, 1950),
        (lambda now_s: 1.0, 0.051, False, 150),
        (lambda now_s: 5.0, 0.03, False, 150),
        (lambda now_s: 0.5 + now_s / 1000, 0.03, False, 3600),  # slower and slower, and at last too slow
        (lambda now_s: 3.0 - 2.0 * 0.5 ** (now_s / 900), 0.03, True, 5250),  # levels out
    ],
)
def test_steady_or_too_slow(ttft_s: "Callable[[float], float]", tpot_s: float, sustained: bool, ends_s: int) -> None:
    latencies = Latencies(ttft_s, tpot_s)
    assert sustains(latencies) is sustained  # type: ignore[arg-type]
    assert latencies.now_s == pytest.approx(ends_s, abs=300)


def test_items_replace_what_the_directory_has_of_them(tmp_path: Path) -> None:
    def known(*rows: Row, scale: float = 1.0) -> "list[float]":
        archive = merged(tmp_path, rows, [], Runner(scale))
        write_results(archive, tmp_path)
        return [entry.ours for entry in archive.rows]

    assert known(row("pd-range", "x", 1.0, 1.0), row("cache-compute", "y", 1.0, 2.0)) == [2.0, 1.0]
    assert known(row("pd-range", "x", 1.0, 3.0)) == [2.0, 3.0]
    assert known(row("pd-range", "x", 1.0, 4.0), scale=0.5) == [4.0]  # another question: the rest goes
    (tmp_path / "paper.json").write_text("{")
    with pytest.raises(ArchiveError, match=r"paper\.json"):
        merged(tmp_path, [], [], Runner())


def test_errors_are_relative() -> None:
    assert row("x", "y", 2.0, 2.5).error == pytest.approx(0.25)
    with pytest.raises(ValueError, match="zero"):
        row("x", "y", 0.0, 1.0)
