"""Predictions as result files: what they say, what they do not look at, and what they refuse."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from prediction_world import REFERENCE_NS, agents, busy_machine, machine, result_file

from dualpath.cli import main
from dualpath.prediction import MachineError, comparison_table, load_machine, predict
from dualpath.prediction.machine import PrefillCost, new_pairs
from dualpath.report.result_file import ResultFile, load
from dualpath.workload import Round
from dualpath.workload.result import TurnFailure, TurnResult


def scrambled(measured: ResultFile) -> ResultFile:
    """The same runs with other measured figures, turns and failures."""
    turn = TurnResult(
        trajectory="agent-0000", round_index=1, tries=3, start_s=9.0, ttft_s=77.0, ttst_s=5.0, tpot_s=5.0,
        latency_s=99.0, prompt_tokens=1, loaded_tokens=0, generated_tokens=3, output_digest="x",
    )  # fmt: skip
    failure = TurnFailure(trajectory="agent-0001", round_index=1, tries=1, message="no", abandoned_rounds=1)
    runs = [
        msgspec.structs.replace(
            run,
            jct_s=run.jct_s * (7 + number),
            ratio_to_basic=0.1,
            ttft_p50_s=123.0,
            hit_rate=0.01,
            snic_bytes={"PE0": 1},
            turns=1,
            errors=2,
            retries=5,
            turn_results=[turn],
            failures=[failure],
        )
        for number, run in enumerate(measured.runs)
    ]
    return msgspec.structs.replace(measured, runs=runs)


def paused(round_: Round, gap_s: float) -> Round:
    return msgspec.structs.replace(round_, gap_s=gap_s)


def test_measured_times_are_not_looked_at():
    measured = result_file(agents(4), topologies=("1P1D", "1P2D"))
    assert predict(measured, busy_machine()) == predict(scrambled(measured), busy_machine())


def test_a_run_on_a_slower_machine_is_predicted_longer_unless_as_calibrated():
    usual, slow = (result_file(agents(4), reference_ns=share * REFERENCE_NS) for share in (1.0, 1.5))
    rates = busy_machine(control=msgspec.structs.replace(busy_machine().control, hop_ns=0))
    (*_, oracle), (*_, slowed) = predict(usual, rates).runs, predict(slow, rates).runs
    assert slowed.jct_s == pytest.approx(1.5 * oracle.jct_s, rel=0.1)  # but for waiting for the disk
    assert slowed.reference_ns == 1.5 * REFERENCE_NS
    assert predict(slow, rates, as_calibrated=True).runs == predict(usual, rates).runs
    unknown = predict(result_file(agents(4)), rates).runs
    assert [run.jct_s for run in unknown] == [run.jct_s for run in predict(usual, rates).runs]


def test_a_prediction_is_a_result_file_with_the_same_runs(tmp_path: Path):
    measured = result_file(agents(4), parameters={"agents": 4.0}, repeat=2)
    predicted = predict(measured, busy_machine(), "dualpath simulate --like x")
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(predicted))
    assert load(tmp_path / "p.json") == predicted
    assert predicted.kind == "prediction" and predicted.command == "dualpath simulate --like x"
    for one, other in zip(measured.runs, predicted.runs, strict=True):
        assert (one.topology, one.system, one.parameters, one.repeat) == (
            other.topology, other.system, other.parameters, other.repeat,
        )  # fmt: skip
        assert len(other.turn_results) == 8 == other.turns
    basic, dualpath, oracle = predicted.runs
    assert basic.ratio_to_basic == 1
    assert dualpath.ratio_to_basic == pytest.approx(basic.jct_s / dualpath.jct_s)
    assert dualpath.ideal_ratio == pytest.approx(min(2, basic.jct_s / oracle.jct_s))
    assert basic.snic_bytes["DE0"] == 0 and dualpath.snic_bytes["DE0"] > 0
    assert dualpath.snic_max_over_avg >= 1


def test_timings_of_a_turn_add_up_to_the_servers_first_token():
    turns = predict(result_file(agents(4)), busy_machine()).runs[1].turn_results
    for turn in turns:
        timings = turn.timings
        server_s = timings.scheduling_s + timings.allocation_s + timings.read_s + timings.prefill_s
        assert 0 < server_s < turn.ttft_s
        assert timings.pe_read_tokens + timings.de_read_tokens == turn.loaded_tokens
        assert timings.prefill_engine == "PE0" and timings.decode_engine == "DE0"


def test_a_replay_is_predicted_from_its_first_turns_and_with_its_pauses():
    late = tuple(
        msgspec.structs.replace(one, rounds=(paused(one.rounds[0], 2.0), *one.rounds[1:])) for one in agents(3)
    )
    replays = [
        predict(result_file(late, systems=("dualpath",), kind="replay", first_round=0, gap_scale=scale), machine())
        for scale in (0.0, 0.5)
    ]
    at_once, paused_half = (one.runs[0] for one in replays)
    assert at_once.turns == 9 and at_once.hit_rate < 0.8  # the first turns too, which hit nothing
    assert {turn.start_s for turn in paused_half.turn_results if turn.round_index == 0} == {1.0}
    assert paused_half.jct_s == pytest.approx(at_once.jct_s + 1)
    assert (at_once.gap_scale, paused_half.gap_scale) == (0, 0.5)


def test_agents_that_pause_first_arrive_later():
    late = [
        msgspec.structs.replace(one, rounds=(one.rounds[0], paused(one.rounds[1], i)))
        for i, one in enumerate(agents(3))
    ]
    turns = predict(result_file(tuple(late), systems=("oracle",), agents_per_s=1.0), machine()).runs[0].turn_results
    assert sorted(turn.start_s for turn in turns) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("run", "rates", "complaint"),
    [
        ({"cluster": None}, {}, "does not say what its cluster was"),
        ({"trajectories": ""}, {}, "does not say what its agents asked"),
        ({"kind": "replay", "agents_per_s": 1.0}, {}, "whose agents all start at once"),
        ({"topology": "four"}, {}, "only runs of a topology"),
        ({"system": "vllm"}, {}, "only runs of a topology"),
        ({}, {"layers": 9}, "ran with 4 layers, the machine was measured with 9"),
        ({}, {"threads": 2}, "ran with 1 threads"),
        ({}, {"dtype": "bfloat16"}, "dtype"),
        ({}, {"transports": {}}, "moved KV over 'shm'"),
    ],
)
def test_what_can_not_be_predicted_says_why(run, rates, complaint):
    measured = result_file(agents(1), systems=("dualpath",), **run)
    with pytest.raises(MachineError, match=complaint):
        predict(measured, machine(**rates))


def test_a_turn_that_no_engine_can_hold_is_refused():
    small = msgspec.structs.replace(machine().limits, hbm_bytes=2**20)
    with pytest.raises(ValueError, match=r"agent-0000, turn 1: the cluster refuses it \(too_large\)"):
        predict(result_file(agents(1)), machine(limits=small))


def test_errors_of_a_comparison_are_relative_to_the_measurement(capsys):
    from rich.console import Console

    measured = result_file(agents(2), systems=("oracle",))
    predicted = predict(measured, machine())
    half = msgspec.structs.replace(predicted.runs[0], jct_s=5.0)
    Console(width=120).print(comparison_table(measured, msgspec.structs.replace(predicted, runs=[half]), machine()))
    assert "-50.0%" in capsys.readouterr().out


def test_costs_are_sums():
    cost = PrefillCost(fixed_ns=1, item_ns=10, token_ns=100, cached_pair_ns=1000, new_pair_ns=10_000)
    assert cost.chunk_ns(3, 2) == 10 + 200 + 6_000 + new_pairs(2) * 10_000
    assert new_pairs(4) == 1 + 2 + 3 + 4


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "result.json").write_bytes(msgspec.json.encode(result_file(agents(2))))
    (tmp_path / "machine.json").write_bytes(msgspec.json.encode(busy_machine()))
    return str(tmp_path / "result.json"), str(tmp_path / "machine.json")


def test_simulate_like_prints_a_table_and_writes_a_result_file(files, tmp_path: Path, capsys):
    out = tmp_path / "predicted.json"
    assert main(["simulate", "--like", files[0], "--machine", files[1], "--json", str(out)]) == 0
    assert load(out).kind == "prediction"
    assert "1P1D dualpath" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--like", "nowhere.json"], "nowhere.json can't be read"),
        ([], "name a CLUSTER, or give a result file"),
        (["ds27b-1p1d", "--like", "x.json"], "one of the two"),
    ],
)
def test_simulate_like_says_what_is_wrong(argv, complaint, capsys):
    assert main(["simulate", *argv]) == 2
    assert complaint in capsys.readouterr().err


def test_a_machine_file_of_something_else_is_refused(files, tmp_path: Path, capsys):
    (tmp_path / "other.json").write_text('{"model": 1}')
    assert main(["simulate", "--like", files[0], "--machine", str(tmp_path / "other.json")]) == 2
    assert "not what dualpath calibrate writes" in capsys.readouterr().err
    with pytest.raises(MachineError, match="make one with dualpath calibrate"):
        load_machine(tmp_path / "none.json")


def test_prediction_loads_no_torch():
    code = "import sys, dualpath.prediction; sys.exit('torch' in sys.modules or 'zmq' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
