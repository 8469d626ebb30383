"""`dualpath experiment` as people run it, on real clusters of a tiny model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dualpath.model.checkpoint import make_checkpoint
from dualpath.results import load_results

DEADLINE_S = 280.0


@pytest.mark.slow
def test_a_quick_experiment_compares_systems_turn_by_turn(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "tiny", "qwen3", seed=7)
    options = ["--quick", "--systems", "basic,dualpath", "--agents", "2", "--turns", "2", "--snic-rate", "4MB/s"]
    places = ["--model", model, "--out", tmp_path / "out", "--work", tmp_path / "store"]
    command = [sys.executable, "-m", "dualpath", "experiment", "ttft-breakdown", *options, *places]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    result = load_results(tmp_path / "out" / "ttft-breakdown.json")
    assert (tmp_path / "out" / "ttft-breakdown.html").exists()
    basic, dualpath = result.runs
    assert (basic.system, dualpath.system, basic.topology) == ("basic", "dualpath", "1P2D")
    assert basic.cluster is not None and basic.cluster.snic_bytes_per_s == 4_000_000
    for run in result.runs:
        assert (run.turns, run.errors) == (4, 0)
        for turn in run.turn_results:
            timings = turn.timings
            assert timings is not None
            stages_s = timings.scheduling_s + timings.allocation_s + timings.read_s + timings.prefill_s
            assert 0 < stages_s <= turn.ttft_s
            assert timings.pe_read_tokens + timings.de_read_tokens == turn.loaded_tokens > 0
        read = sum(turn.loaded_tokens for turn in run.turn_results) * basic.cluster.kv_bytes_per_token
        assert sum(run.snic_bytes.values()) == read
    assert basic.snic_bytes["DE0"] == basic.snic_bytes["DE1"] == 0
    assert dualpath.same_tokens_as_basic == 1.0
    assert (tmp_path / "out" / "ttft-breakdown.png").stat().st_size > 10_000
    page = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"1P2D: basic takes \d+\.\d\d s to a first token on average, \d+% of it", page)
    assert "1P2D: basic takes" in done.stdout
    assert list((tmp_path / "store").iterdir()) == []
