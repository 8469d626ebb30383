"""A system of another package's: commands, the simulator and a real cluster know it by its name alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MAIN = (sys.executable, "-m", "dualpath")
Install = Callable[[str], dict[str, str]]


def run(environment: dict[str, str], *command: str) -> str:
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_commands_know_an_installed_system(install: Install, tmp_path: Path) -> None:
    environment = install("policy_plugin")
    assert "decode engines read long hits" in run(environment, *MAIN, "serve", "--help")
    result = tmp_path / "result.json"
    asked = ("simulate", "ds27b-1p1d", "--trace", "32K", "--agents", "3", "--system", "long-reads-decode")
    run(environment, *MAIN, *asked, "--json", str(result))
    read_bytes = json.loads(result.read_bytes())["snic_read_bytes"]
    assert read_bytes[1] > read_bytes[0] > 0  # the DE's node reads the long hits, the PE's some of the short ones


def test_without_the_package_its_name_is_refused() -> None:
    command = (*MAIN, "simulate", "ds27b-1p1d", "--system", "long-reads-decode")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "unknown system 'long-reads-decode'; choose from basic, " in ended.stderr


@pytest.mark.slow
def test_a_real_cluster_reads_as_an_installed_system_says(install: Install, tmp_path: Path) -> None:
    code = """
import sys
import dualpath
if __name__ == "__main__":
    model = str(dualpath.make_checkpoint(sys.argv[1] + "/tiny", "qwen3", seed=7))
    place = sys.argv[1] + "/store"
    config = dualpath.ClusterConfig(model=model, store=place, port=0, system="long-reads-decode")
    mix = dualpath.AgentMix(turns=2, first_context_tokens=2200, append_tokens=16, generate_tokens=4)
    with dualpath.Server(config) as server:
        result = dualpath.replay(server.url, dualpath.generate_trajectories(mix, 1, 0), measured_from=1)
    (turn,) = result.turns
    print(turn.loaded_tokens, turn.timings.pe_read_tokens, turn.timings.de_read_tokens)
"""
    script = tmp_path / "long.py"
    script.write_text(code)
    loaded, by_pe, by_de = map(
        int, run(install("policy_plugin"), sys.executable, str(script), str(tmp_path)).split()[-3:]
    )
    assert loaded == by_de > 2048 - 64
    assert by_pe == 0


@pytest.mark.slow
def test_the_comparison_of_policies_runs(install: Install) -> None:
    command = (sys.executable, str(EXAMPLES / "compare_policies.py"), "--agents", "4", "--real-agents", "2")
    command += ("--systems", "mine")
    shown = run(install("policy_plugin"), *command)
    assert shown.count("  mine  ") == 2 and "simulated" in shown and "measured" in shown
