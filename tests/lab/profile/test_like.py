"""What a profile changes in a plan and in a simulation, and a result file's runs simulated again."""

import json

import msgspec
import numpy as np
import pytest
from small_profile import KV_BYTES, RATE, prefill_ns, small_profile, small_result, written

from dualpath.cli import main
from dualpath.lab.facts.profile import Machine, ProfileError, Rates, load_profile
from dualpath.lab.profile.like import predict
from dualpath.lab.report.html import render
from dualpath.results.file import load_results
from dualpath.traces.trajectory import Round, Trajectory

FAST = {"version": 1, "model": "qwen2.5-32b", "rates": {"store_read_bytes_per_s": 2e9}, "request_ns": 5e6}
SHAPES = ((0, 1000), (0, 4000), (30_000, 1000), (30_000, 4000))


def qwen(factor=1.0, **changed):
    prefill = [{"cached_tokens": c, "new_tokens": n, "ns": factor * (n * 5e4 + n * c)} for c, n in SHAPES]
    decode = [{"batch": b, "context_tokens": c, "ns": 2e7 + b * (1e5 + c)} for b in (1, 64) for c in (8192, 65536)]
    return FAST | {"prefill": prefill, "decode": decode} | changed


def plus(ns, samples):
    return [sample | {"ns": sample["ns"] + ns} for sample in samples]


def outcome(tmp_path, command, document, *argv):
    out = tmp_path / "out.json"
    profile = () if document is None else ("--profile", str(written(tmp_path, document)))
    assert main([command, "qwen32b-1p2d", "--trace", "32K", *argv, *profile, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_a_plan_has_measured_steps_and_rates(tmp_path, capsys):
    plans = [outcome(tmp_path, "plan", document) for document in (None, qwen(), qwen(2.0))]
    assert [plan["snic_bytes_per_s"] for plan in plans[1:]] == [2e9, 2e9]
    compute = [next(d for d in plan["dualpath"]["demands"] if d["resource"] == "prefill compute") for plan in plans[1:]]
    assert compute[0]["unit"] == "s"
    assert compute[1]["per_turn"] == pytest.approx(2 * compute[0]["per_turn"], rel=1e-6)
    assert plans[1]["decode"] == plans[2]["decode"] != plans[0]["decode"]
    load = plans[1]["load"]
    new, seen = load["miss_tokens"], load["miss_pairs"]
    # n·c of the samples as pairs: the half of a chunk's own pairs is taken from the token's price.
    assert compute[0]["per_turn"] == pytest.approx((new * 5e4 + seen) / 1e9, rel=0.1)
    late, fixed = (
        outcome(tmp_path, "plan", document)
        for document in (qwen(request_ns=5e6 + 1e8), qwen(prefill=plus(1e9, qwen()["prefill"]), rates={}))
    )
    assert late["unloaded_ttft_s"] == pytest.approx(plans[1]["unloaded_ttft_s"] + 0.1)
    assert fixed["unloaded_ttft_s"] == pytest.approx(compute[0]["per_turn"] + 1 + 5e-3, rel=0.02)
    half, twice = outcome(tmp_path, "plan", qwen(30, rates={}))["sensitivity"]
    assert twice["dualpath_agents_per_s"] == pytest.approx(4 * half["dualpath_agents_per_s"], rel=1e-6)
    assert "ms" in capsys.readouterr().out


def test_a_simulation_has_measured_steps_and_overheads(tmp_path):
    plain, late, slow = (
        outcome(tmp_path, "simulate", document, "--agents", "1")
        for document in (qwen(rates={}, request_ns=0), qwen(rates={}, request_ns=1e9), qwen(30, rates={}, request_ns=0))
    )
    assert late["ttft_s"]["mean"] == pytest.approx(plain["ttft_s"]["mean"] + 1, abs=0.01)
    assert slow["ttft_s"]["mean"] > 2 * plain["ttft_s"]["mean"]
    assert plain["tpot_s"]["p50"] == pytest.approx(2e-2 + 1e-4 + 2e-5, rel=0.01)


def test_storage_bound_runs_take_what_their_bytes_take_at_the_rate():
    result = small_result()
    basic, dualpath, oracle = predict(result, small_profile(), "p.json").runs
    bytes_read = sum(turn.loaded_tokens for turn in basic.turn_results) * KV_BYTES
    assert bytes_read == sum(basic.snic_bytes.values()) == basic.snic_bytes["PE0"]
    assert basic.jct_s == pytest.approx(bytes_read / RATE, rel=0.05)
    assert dualpath.jct_s == pytest.approx(basic.jct_s / 2, rel=0.1)
    assert oracle.jct_s < dualpath.jct_s / 2
    assert all(run.turns == 18 and run.errors == 0 for run in (basic, dualpath, oracle))
    assert {turn.round_index for turn in basic.turn_results} == {1, 2, 3}


def test_engines_that_share_cores_take_longer():
    """One prefills and two decode, whose steps are most of it: on one core instead of many."""
    rounds = [Round(append_tokens=1000, generate_tokens=1), Round(append_tokens=1, generate_tokens=100)]
    agents = [Trajectory(id=str(n), rounds=tuple(rounds)) for n in range(4)]

    def jct_s(**cluster):
        result = small_result(("oracle",), "1P2D", **cluster)
        (run,) = predict(msgspec.structs.replace(result, trajectories={"agents": agents}), small_profile(), "").runs
        return run.jct_s

    assert jct_s(cores=1) == pytest.approx(2 * jct_s(cores=8), rel=0.1)
    assert jct_s(cores=2) == pytest.approx(jct_s(cores=8), rel=0.1)


def test_prefill_engines_that_share_cores_take_longer():
    rounds = (Round(append_tokens=1000, generate_tokens=1),) * 5
    agents = [Trajectory(id=str(n), rounds=rounds) for n in range(8)]

    def jct_s(cores):
        result = small_result(("oracle",), "2P1D", cores=cores)
        return (
            predict(msgspec.structs.replace(result, trajectories={"agents": agents}), small_profile(), "").runs[0].jct_s
        )

    assert 1.5 * jct_s(8) < jct_s(1) < 2.1 * jct_s(8)


def test_a_lone_first_token_takes_what_its_batch_takes():
    (run,) = predict(small_result(("oracle",), agents=1), small_profile(), "").runs
    for turn in run.turn_results:
        expected_ns = prefill_ns(turn.loaded_tokens, turn.prompt_tokens - turn.loaded_tokens)
        assert turn.ttft_s == pytest.approx(expected_ns / 1e9, abs=1e-4)


def test_pauses_and_overheads_are_part_of_the_time():
    result = small_result(("dualpath",), agents=1, rounds=3)
    paused = msgspec.structs.replace(
        result,
        trajectories={
            "agents": [
                Trajectory(id=one.id, rounds=tuple(msgspec.structs.replace(round_, gap_s=5.0) for round_ in one.rounds))
                for one in result.trajectories["agents"]
            ]
        },
    )
    plain_s, paused_s, late_s, slow_s = (
        predict(one, profile, "").runs[0].jct_s
        for one, profile in (
            (result, small_profile()),
            (paused, small_profile()),
            (result, small_profile(request_ns=1e9)),
            (result, small_profile(token_ns=1e8)),
        )
    )
    assert paused_s == pytest.approx(plain_s + 10)  # before the first measured turn as well
    assert late_s == pytest.approx(plain_s + 2)
    assert slow_s == pytest.approx(plain_s + 2 * 7 * 0.1)  # two turns of eight tokens, of which prefill makes one


def test_nothing_that_was_measured_is_used():
    result = small_result()
    rng = np.random.default_rng(0)

    def scrambled(run):
        turns = [msgspec.structs.replace(one, ttft_s=rng.random(), latency_s=9 * rng.random(), loaded_tokens=3)
                 for one in run.turn_results] * 3  # fmt: skip
        return msgspec.structs.replace(
            run, turn_results=turns, jct_s=rng.random(), ttft_p50_s=rng.random(), tpot_p99_s=rng.random(), turns=99,
            hit_rate=rng.random(), snic_bytes={"PE0": 5}, errors=2, retries=4, ratio_to_basic=7.0, ideal_ratio=3.0,
        )  # fmt: skip

    other = msgspec.structs.replace(result, runs=[scrambled(run) for run in result.runs])
    assert predict(other, small_profile(), "p") == predict(result, small_profile(), "p")


def test_a_link_of_the_file_is_no_faster_than_the_profile():
    slow = small_profile(rates=Rates(store_read_bytes_per_s=RATE / 2))
    result = small_result(("basic",))
    runs = [predict(result, profile, "").runs[0] for profile in (small_profile(), slow)]
    assert runs[1].jct_s == pytest.approx(2 * runs[0].jct_s, rel=0.05)


def test_whole_prompts_are_copied_at_the_measured_rate():
    result = small_result(("basic",), agents=1, rounds=2)
    (fast,), (slow,) = (
        predict(result, small_profile(rates=Rates(copy_bytes_per_s=rate)), "").runs for rate in (None, RATE)
    )
    copied_s = fast.turn_results[0].loaded_tokens * KV_BYTES / RATE
    assert slow.turn_results[0].ttft_s == pytest.approx(fast.turn_results[0].ttft_s + copied_s, rel=0.1)


def test_the_command_says_how_far_off_and_writes_what_report_reads(tmp_path, capsys):
    measured, out = written(tmp_path, small_result(), "measured.json"), tmp_path / "predicted.json"
    profile = written(tmp_path, small_profile())
    assert main(["simulate", "--like", str(measured), "--profile", str(profile), "--json", str(out)]) == 0
    said = capsys.readouterr().out
    predicted = load_results(out)
    error = predicted.runs[0].jct_s / 10 - 1
    assert f"{error:+.1%}" in said and "mean TTFT" in said and "1P1D dualpath" in said
    assert predicted.kind == "prediction"
    assert "Predicted job completion times are off by" in render([load_results(measured)], predicted)


def changed_run(**fields):
    result = small_result(("basic",))
    return msgspec.structs.replace(result, runs=[msgspec.structs.replace(result.runs[0], **fields)])


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (changed_run(cluster=None), "what its cluster was"),
        (changed_run(trajectories="others"), "what its agents asked"),
        (changed_run(topology="served"), "'served' is not a topology"),
        (changed_run(system="fast"), "dualpath's systems"),
        (msgspec.structs.replace(changed_run(agents_per_s=1.0), kind="replay"), "all start at once"),
        (small_result(dtype="bfloat16"), "'bfloat16' as its dtype"),
        (small_result(threads=2), "2 as its threads"),
        (small_result(kv_bytes_per_token=5), "5 as its bytes of KV"),
    ],
)
def test_a_run_that_can_not_be_simulated_is_named(result, said):
    with pytest.raises(ProfileError, match="run 0") as raised:
        predict(result, small_profile(), "p.json")
    assert said in str(raised.value)


def test_what_a_profile_does_not_say_is_not_checked():
    by_hand = small_profile(machine=Machine(), kv_bytes_per_token=None)
    assert predict(small_result(dtype="bfloat16", threads=2), by_hand, "").runs


def test_another_models_runs_are_refused():
    with pytest.raises(ProfileError, match="'demo' as its model"):
        predict(small_result(), small_profile(model="llama"), "p.json")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--like", "r.json"], "--like needs a --profile"),
        ([], "give either a CLUSTER"),
        (["ds27b-1p1d", "--like", "r.json"], "or a result file with --like"),
    ],
)
def test_a_wrong_question_is_one_line(argv, said, capsys):
    assert main(["simulate", *argv]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_files_of_a_profile_and_a_record_are_the_same(tmp_path):
    profile = small_profile()
    result = small_result(("dualpath",))
    again = load_profile(written(tmp_path, profile))
    assert predict(result, again, "p") == predict(result, profile, "p")
