"""Random steps: they hit the table, they find what is broken, and what they find is short and can be run again."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dualpath import cli
from dualpath.core import withdrawal
from dualpath.core.ledger import Key
from dualpath.core.policy import Constants, Limits, Policy
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import Abort, Role
from dualpath.lab.faults.matrix import Fault, Victim, combinations
from dualpath.lab.faults.sim import episodes
from dualpath.lab.faults.sim.episodes import Failed, Script, play, read, replay, run, shrink, write
from dualpath.lab.faults.sim.world import LEASE_NS, Setting, Step, World

SETTING = Setting(system="dualpath-split", tight=False)


class Leaky(Scheduler):
    """Forgets a block when a second attempt gives its blocks back."""

    def __init__(self, policy: Policy, constants: Constants, limits: Limits) -> None:
        super().__init__(policy, constants, limits)
        ledger, give_back = self.life.ledger, self.life.ledger.give_back

        def forgetful(engine: int, key: Key) -> None:
            give_back(engine, key)
            ledger.accounts[engine].buffer_free_blocks -= key[1] == 1

        ledger.give_back = forgetful  # type: ignore[method-assign]


class Hasty(Scheduler):
    """Frees a cancelled request's blocks before its engines have let go."""

    def cancel(self, now: int, request: int) -> None:
        super().cancel(now, request)
        for at in [at for at in self.life.aborts.in_time if at[1] == request]:
            withdrawal.abort_answered(self.life, at)


class Bold(Scheduler):
    """Aborts a DE while its PE still writes."""

    def cancel(self, now: int, request: int) -> None:
        super().cancel(now, request)
        for at, decode in list(self.life.aborts.behind.items()):
            del self.life.aborts.behind[at]
            self.life.outbox.append(self.life.aborts.send(now, (decode, *at[1:])))


@pytest.mark.parametrize("seed", range(4))
def test_twenty_thousand_steps_break_nothing_and_hit_most_of_the_table(seed: int) -> None:
    report = run(20_000, seed)
    assert report.failure is None
    assert (report.steps, report.audited, report.episodes) == (20_000, 20_000, 20)
    table = {str(at) for at in combinations("sim")}
    assert report.hit.keys() <= table
    assert len(report.hit) > len(table) / 3
    for outcome in ("finished", "cancelled", "failed_timeout", "retried_engine_lost", "dropped_loaded"):
        assert report.outcomes[outcome] > 0, outcome


@pytest.mark.slow
def test_many_steps_hit_nearly_the_whole_table() -> None:
    report = run(300_000, 11, audit_every=10)
    assert report.failure is None and report.audited == 30_000
    pairs = Counter(key.split()[0] for key in report.hit)
    assert pairs.keys() == {f"{at.fault}:{at.victim}" for at in combinations("sim")}
    assert len(report.hit) > 0.8 * sum(1 for _ in combinations("sim"))


def test_the_same_seed_takes_the_same_steps() -> None:
    one, other = run(3_000, 5), run(3_000, 5)
    assert (one.outcomes, one.hit) == (other.outcomes, other.hit)
    assert one.outcomes != run(3_000, 6).outcomes


@pytest.mark.parametrize("broken", [Leaky, Hasty, Bold])
def test_a_broken_scheduler_is_caught_and_the_steps_are_few(broken: type[Scheduler], tmp_path: Path) -> None:
    report = run(50_000, 1, broken)
    script = report.failure
    assert script is not None and script.failure.startswith("AssertionError")
    assert len(script.steps) <= 12
    write(script, tmp_path / "found.jsonl")
    again = read(tmp_path / "found.jsonl")
    assert again == script
    with pytest.raises(Failed) as failed:
        replay(again, lambda _: None, broken)
    assert str(failed.value) == script.failure
    replay(again, lambda _: None)  # core itself takes the same steps well


def test_shrinking_keeps_to_the_failure_it_began_with() -> None:
    setting, steps = episodes.episode(1, 0, 1_000)
    with pytest.raises(Failed) as failed:
        play(setting, steps, Leaky)
    script = shrink(setting, steps[: failed.value.taken], failed.value, Leaky)
    assert script.failure.split(":")[0] == str(failed.value).split(":")[0]
    for index in range(len(script.steps)):  # none can be left out
        with_one_less = [*script.steps[:index], *script.steps[index + 1 :]]
        try:
            play(setting, with_one_less, Leaky)
        except Failed as other:
            assert other.where != failed.value.where


def test_a_partition_holds_messages_up_until_it_heals_or_the_lease_ends() -> None:
    world = World(SETTING)
    decode = next(n for n, e in world.cluster.engines.items() if e.facts.role is Role.DECODE)
    world.take(Step("partition_to:DE", 0))
    world.take(Step("submit", 3, 0, 0))
    engine = world.cluster.engines[decode]
    assert engine.cut_to and not engine.cut_from
    world.take(Step("heal", 0))
    assert not engine.inbox and engine.silent_since is None
    world.take(Step("partition:DE", 0))
    world.cluster.now += LEASE_NS
    world.take(Step("pass_time", 200, 0, 1))
    assert decode not in world.cluster.engines
    world.end()


def test_an_agent_takes_all_engines_of_its_node_along() -> None:
    world = World(SETTING)
    world.take(Step("join", 0, 0, 8))
    nodes = Counter(engine.facts.node for engine in world.cluster.engines.values())
    ((node, two),) = [(node, n) for node, n in nodes.items() if n > 1]
    assert two == 2
    which = [engine.facts.node for engine in world.cluster.engines.values()].index(node)
    world.take(Step(f"{Fault.KILL}:{Victim.AGENT}", which))
    assert node not in {engine.facts.node for engine in world.cluster.engines.values()}
    world.end()


def test_the_model_notices_blocks_that_are_given_away_too_early() -> None:
    world = World(SETTING)
    world.take(Step("submit", 5, 0, 0))
    engine = next(engine for engine in world.cluster.engines.values() if engine.buffer)
    world.check()
    key = next(iter(engine.buffer))
    engine.buffer[key] += 1
    with pytest.raises(AssertionError, match="gave away a part of the buffer"):
        world.check()


def test_a_dead_engine_gets_no_command() -> None:
    world = World(SETTING)
    world.take(Step("submit", 5, 0, 0))
    world.core.life.outbox.append(Abort(0, 0, 77))
    with pytest.raises(AssertionError, match="engine 77, which is gone"):
        world.cluster.carry_out()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: "),
        ('{"faults":9,"setting":{"system":"basic","tight":true}}', "version 9, this program reads 1"),
        ('{"faults":1,"setting":{"system":"basic","tight":true}}\n["dance"]', "line 2: 'dance' is no step"),
        ('{"faults":1,"setting":{"system":"basic","tight":true}}\n["deliver","x"]', "line 2: "),
    ],
)
def test_a_file_that_is_no_script_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "found.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "found.jsonl")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    report, found = tmp_path / "report.json", tmp_path / "found.jsonl"
    assert cli.main(["faults", "sim", "--steps", "2000", "--seed", "3", "--json", str(report)]) == 0
    assert "nothing broke" in capsys.readouterr().out
    assert json.loads(report.read_bytes())["steps"] == 2_000
    assert cli.main(["faults", "table", "--only", "victim=store"]) == 0
    assert "a full store can be read" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    write(Script(setting=SETTING, steps=(Step("submit", 5), Step("kill:DE")), failure="Bug: x"), found)
    assert cli.main(["faults", "replay", str(found)]) == 0
    shown = capsys.readouterr().out
    assert "2. kill:DE 0 0 0" in shown and '"call":"engine_lost"' in shown and "nothing breaks" in shown

    wrong = Script(setting=SETTING, steps=(Step("submit", 5),), failure="AssertionError: x")

    def fail(*_: object, **__: object) -> episodes.Report:
        return episodes.Report(seed=1, steps=7, episodes=1, audited=7, seconds=1.0, outcomes={}, hit={}, failure=wrong)

    monkeypatch.setattr(episodes, "run", fail)
    assert cli.main(["faults", "sim", "--found", str(found)]) == 1
    assert f"1 steps lead there: dualpath faults replay {found}" in capsys.readouterr().err
    assert read(found) == wrong
    assert cli.main(["faults", "table", "--only", "fault=rain"]) == 2
