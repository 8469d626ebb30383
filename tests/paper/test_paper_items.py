"""``dualpath paper``: the items that need no simulation, one that does, capacities, and what is written."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dualpath import cli
from dualpath.paper.items import ITEMS, rows_of
from dualpath.paper.online import CAPACITY_STEP, capacity, within_slo
from dualpath.paper.rows import row
from dualpath.paper.runner import Runner
from dualpath.sim.result import Distribution


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
    rows = rows_of(["ablation", "ablation"], runner)
    less_jct = [entry.ours for entry in rows[:3]]
    assert 0 < less_jct[0] < less_jct[1] <= less_jct[2] + 5
    assert len(ran) == len(set(ran)) == 8
    assert len(runner.runs()) == 8
    assert rows[:3] == rows[3:]


@pytest.mark.slow
def test_scheduling_evens_out_what_round_robin_does_not() -> None:
    """Under load: with empty queues every read is the PE side's."""
    round_robin, scheduled, attention = rows_of(["balance"], Runner(scale=0.3))
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
    def online(preset: str, system: str, agents_per_s: float) -> SimpleNamespace:
        ttft_s = 1.0 if agents_per_s <= limit else 9.0
        spread = [Distribution(mean, mean, mean, mean, mean) for mean in (ttft_s, 0.04)]
        return SimpleNamespace(ttft_s=spread[0], tpot_s=spread[1])

    found = capacity(SimpleNamespace(online=online), "any", "any", 0.5)  # type: ignore[arg-type]
    assert limit / (1 + CAPACITY_STEP) / 1.0001 <= found <= limit


def test_the_slo_is_both_of_them() -> None:
    def latencies(ttft_s: float, tpot_s: float) -> SimpleNamespace:
        return SimpleNamespace(ttft_s=SimpleNamespace(mean=ttft_s), tpot_s=SimpleNamespace(mean=tpot_s))

    assert within_slo(latencies(4.0, 0.05))  # type: ignore[arg-type]
    assert not within_slo(latencies(4.1, 0.01))  # type: ignore[arg-type]
    assert not within_slo(latencies(1.0, 0.051))  # type: ignore[arg-type]


def test_errors_are_relative() -> None:
    assert row("x", "y", 2.0, 2.5).error == pytest.approx(0.25)
    with pytest.raises(ValueError, match="zero"):
        row("x", "y", 0.0, 1.0)
