"""``dualpath simulate`` from the command line: results, timelines, faults, and what it says to a wrong question."""

import json
from pathlib import Path

import pytest

from dualpath.cli import main
from dualpath.core.systems import SYSTEMS


def simulated(tmp_path: Path, *argv: str) -> "dict[str, object]":
    out = tmp_path / "result.json"
    assert main(["simulate", *argv, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("system", list(SYSTEMS.names()))
def test_every_system_finishes_every_turn(tmp_path: Path, system: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = simulated(tmp_path, "ds27b-1p1d", "--agents", "10", "--trace", "32K", "--system", system)
    assert result["agents_finished"] == 10
    assert result["turns"] > 100
    assert result["failed"] == {}
    for cost in ("cpu_s", "peak_rss_bytes", "turns_per_cpu_s"):
        assert result[cost] > 0
    assert "TTFT" in capsys.readouterr().out


def test_a_timeline_covers_every_turn(tmp_path: Path) -> None:
    timeline = tmp_path / "timeline.json"
    result = simulated(tmp_path, "ds27b-1p1d", "--agents", "4", "--trace", "32K", "--trace-out", str(timeline))
    spans = json.loads(timeline.read_text())
    decodes = [span for span in spans if span["name"] == "decode"]
    assert len(decodes) == result["turns"]
    assert all(span["dur"] >= 0 for span in spans if span["ph"] == "X")
    last_us = max(span["ts"] + span["dur"] for span in decodes)
    assert last_us == pytest.approx(result["simulated_s"] * 1e6, abs=1)
    assert {span["name"] for span in spans} == {"process_name", "prefill", "copy", "decode", "step"}


def test_an_open_ended_run_stops_on_time(tmp_path: Path) -> None:
    result = simulated(tmp_path, "ds27b-1p1d", "--agents", "200", "--aps", "0.5", "--duration", "300s")
    assert result["simulated_s"] == 300
    assert 0 < result["agents_finished"] < 200


def test_recorded_agents(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {
            "timestamp": 1000 * turn,
            "input_length": 1024 * (turn + 1),
            "output_length": 40,
            "hash_ids": list(range(2 * turn + 2)),
        }
        for turn in range(4)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    result = simulated(tmp_path, "qwen32b-1p2d", "--trace", str(trace), "--agents", "3")
    assert result["agents_finished"] == 3
    assert result["turns"] == 3 * 4 + 2  # the second and third have a round before the recorded ones


def test_stated_efficiencies_replace_the_fitted_ones(tmp_path: Path) -> None:
    from dualpath.lab.facts import cluster

    preset = Path(cluster.__file__).parent / "presets" / "ds27b-1p1d.toml"
    slow = tmp_path / "slow.toml"
    slow.write_text(preset.read_text() + "\n[efficiency]\ncompute = 0.05\nsnic = 0.2\n")
    plain, slowed = (simulated(tmp_path, str(name), "--agents", "8", "--trace", "32K") for name in ("ds27b-1p1d", slow))
    assert slowed["calibration"]["snic_efficiency"] == 0.2
    assert slowed["ttft_s"]["mean"] > 1.5 * plain["ttft_s"]["mean"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "no cluster 'nowhere'"),
        (["ds27b-1p1d", "--trace", "65K"], "no trace '65K'"),
        (["ds27b-1p1d", "--fault", "fire"], "'fire' is not a fault"),
        (["ds27b-1p1d", "--fault", "engine_lost:16@3s"], "numbered from 0"),
        (["ds27b-1p1d", "--exact", "--fault", "snic:0@3s*0.5"], "exact mode knows no faults"),
        (["ds27b-1p1d", "--model", "nothing"], "no model 'nothing'"),
    ],
)
def test_a_wrong_question_is_one_clear_line(
    argv: "list[str]", message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *argv]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
