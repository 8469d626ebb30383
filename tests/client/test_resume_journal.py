import asyncio
import json
import os

import pytest

from dualpath.client.replay import ReplayError, replay
from dualpath.client.resume import Journal, JournalError, TurnLine
from dualpath.client.rollout import ReplayOptions
from dualpath.results.turns import TurnFailure, TurnResult
from dualpath.traces.trajectory import Round, Trajectory


def turn(trajectory="a", index=0, start_s=1.0, latency_s=0.5):
    return TurnResult(
        trajectory=trajectory,
        round_index=index,
        tries=1,
        start_s=start_s,
        ttft_s=0.1,
        ttst_s=None,
        tpot_s=None,
        latency_s=latency_s,
        prompt_tokens=10,
        loaded_tokens=0,
        generated_tokens=2,
        output_digest="d",
    )


def written(path, *turns, end=True, context="own"):
    """A journal as one part leaves it; without `end`, as a kill does."""
    journal = Journal.create(path, "id")

    async def part():
        async with journal.syncing():
            journal.begin(context)
            for one in turns:
                journal.turn(one, [7, 8])

    asyncio.run(part())
    journal.close()
    if not end:
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "turns.jsonl"


def test_what_was_answered_comes_back(path):
    written(path, turn(index=0), turn(index=1, start_s=3.0))
    journal = Journal.resume(path, "id")
    assert journal.answered == {
        ("a", 0): TurnLine(turn(index=0), [7, 8]),
        ("a", 1): TurnLine(turn(index=1, start_s=3.0), [7, 8]),
    }
    (part,) = journal.parts
    assert part.turns == 2 and part.wall_s >= 0 and part.started_at.startswith("20")


def test_a_part_that_was_killed_ends_with_its_last_answer(path):
    written(path, turn(start_s=1.0), turn(index=1, start_s=3.0, latency_s=0.25), end=False)
    assert Journal.resume(path, "id").parts[0].wall_s == 3.25


def test_parts_follow_one_another(path):
    written(path, turn(start_s=1.0, latency_s=1.0), end=False)
    journal = Journal.resume(path, "id")
    journal.begin("own")
    journal.turn(turn(index=1, start_s=2.5, latency_s=0.5), None)
    assert [part.turns for part in journal.all_parts()] == [1, 1]
    journal.close()
    assert [(part.turns, part.wall_s) for part in Journal.resume(path, "id").parts] == [(1, 2.0), (1, 1.0)]


@pytest.mark.parametrize("torn", [b'{"kind":"turn","turn":{"traj', b'{"kind":"end","wall_s":1.5}', b"\x00\x00"])
def test_a_last_line_that_was_cut_off_is_dropped_and_written_over(path, torn):
    written(path, turn(), end=False)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    journal = Journal.resume(path, "id")
    assert list(journal.answered) == [("a", 0)]
    journal.begin("own")
    journal.close()
    assert path.read_bytes().startswith(whole + b'{"kind":"part","number":1')
    for line in path.read_text().splitlines():
        json.loads(line)


def test_a_line_damaged_in_the_middle_is_named(path):
    written(path, turn(), turn(index=1))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(JournalError, match=r"line 2 is damaged.*start again without --resume"):
        Journal.resume(path, "id")


def test_what_is_not_its_journal_is_refused(path, tmp_path):
    with pytest.raises(JournalError, match="nothing to resume"):
        Journal.resume(path, "id")
    written(path, turn())
    with pytest.raises(JournalError, match="of another replay"):
        Journal.resume(path, "other")
    journal = Journal.resume(path, "id")
    with pytest.raises(JournalError, match="has own contexts, and this server gives filled ones"):
        journal.begin("filled")
    journal.close()
    path.write_text('{"kind":"end","wall_s":1}\n')
    with pytest.raises(JournalError, match="not the journal of a replay"):
        Journal.resume(path, "id")
    with pytest.raises(JournalError, match="can't be opened"):
        Journal.create(tmp_path / "absent" / "turns.jsonl", "id")


def test_two_replays_do_not_share_a_journal(path):
    first = Journal.create(path, "id")
    with pytest.raises(JournalError, match="is being written by another replay"):
        Journal.create(path, "id")
    first.close()
    Journal.create(path, "id").close()


def test_a_new_journal_takes_the_place_of_an_old_one_once_it_begins(path):
    written(path, turn())
    before = path.read_bytes()
    journal = Journal.create(path, "id")
    assert path.read_bytes() == before, "a replay that can't begin has thrown away another one's turns"
    journal.begin("own")
    journal.close()
    assert path.read_bytes().startswith(b'{"kind":"part","number":0') and path.read_bytes().count(b"\n") == 1


def test_a_failure_is_written_and_the_turn_is_sent_again(path):
    journal = Journal.create(path, "id")
    journal.begin("own")
    journal.failure(TurnFailure(trajectory="a", round_index=0, tries=3, message="m", abandoned_rounds=1))
    journal.close()
    assert Journal.resume(path, "id").answered == {}
    assert '"failure"' in path.read_text()


def test_a_full_disk_ends_the_replay_with_its_reason(fake, path):
    journal = Journal.create(path, "id")
    journal._file.close()
    journal._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0)
    one = Trajectory(id="a", rounds=(Round(append_tokens=5, generate_tokens=1),))
    with pytest.raises(ReplayError, match=r"turns.jsonl can't be written: No space left on device"):
        asyncio.run(replay(fake.url, [one], ReplayOptions(), journal=journal))
    journal.close()


def test_a_disk_that_can_not_sync_ends_it_too(fake, path, monkeypatch):
    def broken(_descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("dualpath.client.resume.os.fsync", broken)
    monkeypatch.setattr("dualpath.client.resume.SYNC_EVERY_S", 0.05)
    fake.step_s = 0.1
    journal = Journal.create(path, "id")
    one = Trajectory(id="a", rounds=(Round(append_tokens=5, generate_tokens=3),) * 9)
    with pytest.raises(ReplayError, match=r"turns.jsonl can't be synced: Input/output error"):
        asyncio.run(replay(fake.url, [one], ReplayOptions(), journal=journal))
    journal.close()
    assert len(fake.prompts) < 9, "it went on although nothing was kept"
