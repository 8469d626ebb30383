"""Replays that were killed or interrupted go on where they were, with the same prompts as if nothing had happened."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from dualpath.client.replay import replay
from dualpath.client.resume import Journal
from dualpath.client.rollout import ReplayOptions, Rollout, identity_of
from dualpath.traces.trajectory import Round, Trajectory

pytestmark = pytest.mark.slow

CHILD = Trajectory(id="a1/0", rounds=(Round(append_tokens=20, generate_tokens=3),))
AGENTS = [
    Trajectory(
        id="a0", rounds=(Round(append_tokens=70, generate_tokens=4), *[Round(append_tokens=9, generate_tokens=4)] * 4)
    ),
    Trajectory(
        id="a1",
        rounds=(
            Round(append_tokens=90, generate_tokens=5, subagents=(CHILD,)),
            Round(append_tokens=10, generate_tokens=3),
            Round(append_tokens=10, generate_tokens=3, keep_tokens=64),
        ),
    ),
]
OPTIONS = ReplayOptions(seed=5, retries=0)
TURNS = 9


def whole(url, journal=None):
    return asyncio.run(replay(url, AGENTS, OPTIONS, journal=journal))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "turns.jsonl"


def interrupted(fake, path, after):
    """A replay cancelled when its turn number `after` has ended."""
    journal = Journal.create(path, identity_of(AGENTS, OPTIONS))

    async def part():
        enough = asyncio.Event()

        def on_turn(_):
            if journal.turns == after:
                enough.set()

        running = asyncio.create_task(replay(fake.url, AGENTS, OPTIONS, journal=journal, on_turn=on_turn))
        await enough.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(part())
    journal.close()
    for _ in range(2):  # what was on its way when the client left has reached the server by then
        urllib.request.urlopen(f"{fake.url}/models").read()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_resumed_replay_sends_what_was_left_with_the_same_prompts(fake, path, after, strict):
    fake.owned_by, fake.strict = "sglang" if strict else "dualpath", strict
    expected = whole(fake.url)
    prompts = sorted(fake.prompts)
    fake.prompts.clear()
    interrupted(fake, path, after)
    first_part = list(fake.prompts)
    fake.prompts.clear()
    journal = Journal.resume(path, identity_of(AGENTS, OPTIONS))
    done = len(journal.answered)
    result = whole(fake.url, journal)
    journal.close()
    assert done >= after and len(fake.prompts) == TURNS - done
    assert {tuple(p) for p in [*first_part, *fake.prompts]} == {tuple(p) for p in prompts}

    def digests(replayed):
        return sorted((turn.trajectory, turn.round_index, turn.output_digest) for turn in replayed.turns)

    assert digests(result) == digests(expected)
    assert [part.turns for part in result.parts] == [done, TURNS - done]
    assert result.jct_s == pytest.approx(sum(part.wall_s for part in result.parts), abs=1)
    starts = {(turn.trajectory, turn.round_index): turn.start_s for turn in result.turns}
    assert all(starts["a0", i] < starts["a0", i + 1] for i in range(4))


def test_a_finished_replay_resumes_to_the_same_result_and_sends_nothing(fake, path):
    journal = Journal.create(path, identity_of(AGENTS, OPTIONS))
    first = whole(fake.url, journal)
    journal.close()
    fake.prompts.clear()
    journal = Journal.resume(path, identity_of(AGENTS, OPTIONS))
    again = whole(fake.url, journal)
    assert fake.prompts == []
    assert sorted(again.turns, key=str) == sorted(first.turns, key=str)


def test_a_failed_turn_is_tried_again(fake, path):
    fake.faults = [(400, {})]
    journal = Journal.create(path, identity_of(AGENTS, OPTIONS))
    assert len(whole(fake.url, journal).failures) == 1
    journal.close()
    journal = Journal.resume(path, identity_of(AGENTS, OPTIONS))
    result = whole(fake.url, journal)
    assert not result.failures and len(result.turns) == TURNS


def test_other_agents_or_another_seed_are_another_replay():
    identity = identity_of(AGENTS, OPTIONS)
    assert identity == identity_of(list(AGENTS), ReplayOptions(seed=5, retries=7, gap_scale=2))
    assert identity != identity_of(AGENTS[:1], OPTIONS)
    assert identity != identity_of(AGENTS, ReplayOptions(seed=6))


def test_stop_lets_turns_under_way_end_and_sends_no_more(fake):
    from dualpath.client.replay import connected

    fake.step_s = 0.02

    async def work():
        async with connected(fake.url, 4, OPTIONS) as (client, server):
            run = Rollout(client, server, OPTIONS)
            agent = asyncio.create_task(run.agent(AGENTS[0], time.perf_counter()))
            while not run.waiting_since_s:
                await asyncio.sleep(0.001)
            run.stop()
            await agent
            return run.result()

    assert len(asyncio.run(work()).turns) == 1


def test_a_killed_command_leaves_a_journal_that_resumes(fake, tmp_path):
    fake.step_s = 0.02
    command = [sys.executable, "-m", "dualpath", "replay", fake.url, "--agents", "3", "--turns", "6", "--context", "80"]
    command += ["--generate", "5", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    journal = tmp_path / "turns.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b'"kind":"turn"') < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answered = journal.read_bytes().count(b'"kind":"turn"')
    time.sleep(0.3)  # what was under way still reaches the server
    sent_before = len(fake.prompts)
    again = subprocess.run(
        [*command, "--resume", "--json", str(tmp_path / "result.json")], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert len(fake.prompts) - sent_before == 18 - answered
    run = json.loads((tmp_path / "result.json").read_bytes())["runs"][0]
    assert run["turns"] == 18 and [part["turns"] for part in run["parts"]] == [answered, 18 - answered]
    assert "not comparable" in again.stdout


def heed_interrupts():
    """A shell's background jobs inherit "ignore"."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_how_to_go_on(fake, tmp_path, number):
    fake.step_s = 0.05
    command = [sys.executable, "-m", "dualpath", "replay", fake.url, "--agents", "2", "--context", "80"]
    command += ["--generate", "8", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    deadline = time.monotonic() + 60
    while len(fake.prompts) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    said = " ".join(said.split())  # lines break where the directory's name makes them
    assert "to continue:" in said and "--resume" in said and "of 8 turns are in" in said
    assert (tmp_path / "turns.jsonl").read_text().rstrip().splitlines()[-1].startswith('{"kind":"end"')
