"""`dualpath replay` from its command line to its result file."""

import json

import msgspec
import pytest

from dualpath.cli import main
from dualpath.lab.replay.replay_table import replay_sentences
from dualpath.results import Capacity, load_results
from dualpath.results.turns import Part

pytestmark = pytest.mark.slow


@pytest.fixture
def replay(fake, tmp_path, capsys):
    """Runs the command against the fake; returns (exit code, result file or None, output, errors)."""

    def run(*arguments, url=fake.url):
        code = main(["replay", url, "--out", str(tmp_path / "out"), *map(str, arguments)])
        said = capsys.readouterr()
        path = tmp_path / "out" / "replay.json"
        return code, load_results(path) if path.exists() else None, said.out, said.err

    return run


SMALL = ("--agents", 3, "--turns", 3, "--context", 100, "--append", 20, "--generate", 4)


def test_generated_agents_at_once(replay, tmp_path):
    code, result, said, _ = replay(*SMALL, "--seed", 5, "--json", tmp_path / "copy.json")
    (run,) = result.runs
    assert code == 0
    assert (result.kind, run.topology, run.system, run.context) == ("replay", "served", "dualpath", "own")
    assert run.turns == len(run.turn_results) == 9 and run.errors == 0
    assert all(turn.timings.prefill_engine == "PE0" and turn.pacing_error_s >= 0 for turn in run.turn_results)
    assert result.trajectories[run.trajectories][0].rounds and result.workload.turns == 9
    assert result.configuration.model == "fake" and result.configuration.seed == 5
    assert result.command.startswith("dualpath replay http://") and "--seed 5" in result.command
    assert run.pacing.p99_s >= run.pacing.p50_s >= 0
    assert "generated, seed 5: 3 agents, 9 turns" in said and "server: dualpath, model fake" in said
    assert json.loads((tmp_path / "copy.json").read_bytes()) == json.loads((tmp_path / "out/replay.json").read_bytes())
    assert (tmp_path / "out" / "replay.html").read_text().startswith("<!DOCTYPE html>")


def test_recorded_agents_are_cut_and_dealt_out(replay, tmp_path):
    trace = tmp_path / "mini.jsonl"
    lines = [{"timestamp": t, "input": "a" * 1600 * t, "output": "b" * 160, "session_id": "s"} for t in (1, 2, 3)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, result, _, _ = replay("--trace", trace, "--scale", 4, "--agents", 2, "--turns", 2)
    assert code == 0
    assert [turn.prompt_tokens for turn in sorted(result.runs[0].turn_results, key=lambda t: t.round_index)] == [
        *[100] * 2,
        *[200] * 2,
    ]
    assert "counted as bytes over 4; token counts divided by 4; at most 2 turns each" in result.workload.source


def test_a_server_without_token_ids_is_said_to_have_filled_contexts(replay, fake):
    fake.owned_by, fake.strict = "sglang", True
    _, result, said, _ = replay(*SMALL)
    assert result.runs[0].context == "filled" and "ids chosen by the replay stand for what was" in said


def test_arrivals_at_a_rate(replay):
    code, result, said, _ = replay(*SMALL, "--aps", 8, "--duration", "1s", "--ttft", "30s", "--tpot", "30s")
    (run,) = result.runs
    assert code == 0
    assert run.agents_per_s == 8 and run.verdict in ("steady", "duration") and run.windows[-1].end_s == 1.0
    assert result.slo.ttft_s == 30 and len(result.trajectories["agents"]) >= 1
    assert {turn.trajectory for turn in run.turn_results} <= {one.id for one in result.trajectories["agents"]}
    assert "holds" in said and "SLO: TTFT 30 s" in said


def test_a_search_keeps_every_probe_and_says_what_ended_it(replay, fake):
    fake.step_s = 0.05
    code, result, said, _ = replay(*SMALL, "--find-aps", "4:9", "--duration", "1s", "--tpot", "1ms", "--ttft", "30s")
    assert code == 1
    assert result.capacity.holds_agents_per_s is None and result.capacity.ended_by == "tpot"
    assert [(run.agents_per_s, run.parameters["probe"], run.verdict) for run in result.runs] == [(4, 0, "tpot")]
    assert "4 APS: does not hold (tpot)" in said and "Capacity: below the lowest rate" in said


def test_a_search_whose_highest_rate_holds_says_so(replay, monkeypatch):
    monkeypatch.setattr("dualpath.lab.replay.replaying.SETTLE_S", 0.0)
    code, result, said, _ = replay(*SMALL, "--find-aps", "4:9", "--duration", "1s", "--tpot", "30s", "--ttft", "30s")
    assert code == 0
    assert [run.agents_per_s for run in result.runs] == [4, 9]
    ids = [{turn.trajectory for turn in run.turn_results} for run in result.runs]
    assert not ids[0] & ids[1], "probes share agents, so also what is in storage"
    assert "Capacity: at least 9 agents a second" in said


def test_turns_that_fail_make_the_exit_code_one(replay, fake):
    fake.faults = [(400, {})]
    code, result, said, _ = replay(*SMALL)
    assert code == 1 and result.runs[0].errors == 3 and result.runs[0].error_messages
    assert "3" in said


def test_no_server_is_one_line(replay):
    code, result, _, errors = replay(url="http://127.0.0.1:9")
    assert code == 1 and result is None
    assert (
        errors.startswith("dualpath replay: http://127.0.0.1:9: /v1/models does not answer") and errors.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--aps", 1, "--find-aps", "1:2"), "--aps replays at one rate"),
        (("--aps", 1, "--resume"), "--resume continues agents that all started at once"),
        (("--aps", 1, "--duration", "1s", "--window", "2s"), "--window (2 s) is longer than --duration (1 s)"),
        (("--trace", "absent"), "no trace 'absent'"),
        (("--scale", 2), "--scale, --max-context and --tokenizer only apply to traces"),
        (("--token-ids-below", 1), "token_ids_below must be at least 2"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_sent(replay, fake, arguments, message):
    code, _, _, errors = replay(*arguments)
    assert code == 2 and message in errors
    assert fake.prompts == []


@pytest.mark.parametrize(
    "arguments", [("--find-aps", "2:1"), ("--find-aps", "2"), ("--gap-scale", "-1"), ("--turns", "0")]
)
def test_values_are_checked_while_they_are_parsed(replay, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        replay(*arguments)
    assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_resume_without_a_journal_says_so(replay):
    code, _, _, errors = replay(*SMALL, "--resume")
    assert code == 1 and "there is nothing to resume" in errors


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            Capacity(holds_agents_per_s=1.5, fails_agents_per_s=1.6, ended_by="ttft"),
            "Capacity: 1.5 agents a second (at 1.6: TTFT",
        ),
        (Capacity(holds_agents_per_s=None, fails_agents_per_s=0.1, ended_by="tpot"), "Capacity: below the lowest rate"),
        (
            Capacity(holds_agents_per_s=3, fails_agents_per_s=None, ended_by=None),
            "Capacity: at least 3 agents a second",
        ),
    ],
)
def test_sentences_say_what_was_found(replay, found, said):
    _, result, _, _ = replay(*SMALL)
    (run,) = result.runs
    parts = [Part(started_at="2026-01-01T00:00:00+00:00", wall_s=wall_s, turns=2) for wall_s in (1.5, 2.5)]
    resumed = msgspec.structs.replace(result, capacity=found, runs=[msgspec.structs.replace(run, parts=parts)])
    sentences = list(replay_sentences(resumed))
    assert any(sentence.startswith(said) for sentence in sentences)
    assert (
        "Resumed: 1.5 s (2 turns) + 2.5 s (2 turns). The JCT is the sum of the parts, and not comparable." in sentences
    )
    assert len(list(replay_sentences(result))) == 1
