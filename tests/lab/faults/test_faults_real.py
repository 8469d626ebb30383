"""The real body: what it calls right, how it hurts, and a few combinations on a real cluster."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from dualpath import cli
from dualpath.lab.faults.matrix import Combination, Fault, Phase, Victim
from dualpath.lab.faults.matrix import Path as ReadPath
from dualpath.lab.faults.real import soak, trial
from dualpath.lab.faults.real.asking import Answer, Prompt, until, verdict
from dualpath.lab.faults.real.harm import Scene, Skip, harm
from dualpath.lab.faults.real.namespaces import Namespaced
from dualpath.lab.faults.real.served import Resources, Served
from dualpath.lab.faults.real.soak import Sample, grown
from dualpath.lab.faults.real.stages import STAGES, Stage, stage_of
from dualpath.lab.faults.real.store_server import StoreServer, store_server
from dualpath.lab.faults.real.trial import BACKGROUND, Bench, Trial, run
from dualpath.lab.testbed.network import Testbed
from dualpath.lab.testbed.plan import Rates, make_plan


def at(fault: str, victim: str, phase: str) -> Combination:
    return Combination(Fault(fault), Victim(victim), ReadPath.PE, Phase(phase))


@pytest.mark.parametrize(
    ("tokens", "error", "may_break", "said"),
    [
        ([1, 2, 3], "", False, "right"),
        ([1, 2], "", False, "WRONG: tokens are missing"),
        ([1, 9, 3], "", False, "WRONG tokens"),
        ([1, 2, 3, 4], "", False, "WRONG tokens"),
        ([1, 2], "no_engine", False, "error no_engine"),
        ([9], "no_engine", False, "WRONG tokens"),
        ([1], "broken: reset", False, "WRONG end: broken: reset"),
        ([1], "broken: reset", True, "error broken: reset"),
        ([], "late: no end after 60 s", True, "WRONG end: late: no end after 60 s"),
        ([1], "hung up", False, "hung up"),
    ],
)
def test_an_answer_is_right_or_ends_with_a_clear_error(
    tokens: list[int], error: str, may_break: bool, said: str
) -> None:
    assert verdict(Answer(tokens=tokens, error=error), [1, 2, 3], may_break) == said


def test_prompts_share_what_is_in_the_store_and_nothing_else() -> None:
    for phase in Phase:
        one, other = stage_of(phase, 0), stage_of(phase, 1)
        hit = one.look.hit
        assert one.look.tokens[:hit] == other.look.tokens[:hit] == one.look.stored.tokens
        assert one.look.tokens[hit : hit + 8] != other.look.tokens[hit : hit + 8]
        assert len(one.look.tokens) + one.look.new <= 4096
    assert set(STAGES) == set(Phase)
    assert Prompt(64, 0, 1, 0, prefix=1).tokens != Prompt(64, 0, 1, 0).tokens


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Parts(Served):
    """A cluster with these processes, of which nothing runs."""

    def __init__(self, pids: list[int], work: Path) -> None:
        super().__init__((), work)
        self._temporary.cleanup()
        self.found = pids

    def parts(self, victim: Victim) -> list[int]:
        return self.found


def test_processes_are_stopped_slowed_and_killed(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    scene = Scene(Parts([sleeper.pid], tmp_path), tmp_path, [])
    heal = harm(at("stop", "DE", "decoding"), scene)
    assert until(lambda: state(sleeper.pid) == "T", 10)
    heal()
    assert until(lambda: state(sleeper.pid) != "T", 10)
    heal = harm(at("slow", "PE", "reading"), scene)
    assert until(lambda: state(sleeper.pid) == "T", 10, 0.001)
    heal()
    assert until(lambda: state(sleeper.pid) != "T", 10)
    harm(at("kill", "coordinator", "decoding"), scene)
    assert sleeper.wait(10) == -signal.SIGKILL


def test_what_is_not_there_is_skipped_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(Skip, match="no agent process"):
        harm(at("kill", "agent", "decoding"), Scene(Parts([], tmp_path), tmp_path, []))


def test_a_store_is_taken_away_filled_damaged_and_brought_back(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    block = store / "block.kv"
    block.write_bytes(bytes(64))
    scene = Scene(Parts([], tmp_path), store, [block])
    heal = harm(at("kill", "store", "reading"), scene)
    assert not store.exists()
    (store / "space").mkdir(parents=True)
    (store / "space" / "meanwhile.kv").write_bytes(b"x")
    heal()
    assert block.read_bytes() == bytes(64)
    assert (store / "space" / "meanwhile.kv").read_bytes() == b"x"
    harm(at("corrupt", "store", "reading"), scene)
    assert sum(block.read_bytes()) == 1


def asked(server: StoreServer, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    with closing(HTTPConnection(server.url.removeprefix("http://"), timeout=30)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_the_faulty_object_server_serves_and_fails_on_demand(tmp_path: Path) -> None:
    with store_server(tmp_path) as server:
        assert asked(server, "PUT", "/a/b.kv", b"0123456789") == (201, b"")
        assert asked(server, "GET", "/a/b.kv") == (200, b"0123456789")
        assert asked(server, "GET", "/a/b.kv", Range="bytes=2-4") == (206, b"234")
        assert asked(server, "GET", "/a/c.kv")[0] == 404
        status, listed = asked(server, "PROPFIND", "/a", Depth="1")
        assert status == 207 and b"<D:href>/a/b.kv</D:href>" in listed
        server.fault = Fault.WRONG
        assert asked(server, "GET", "/a/b.kv")[0] == 500
        server.fault = Fault.HUNG
        ended = threading.Event()

        def hang() -> None:
            with pytest.raises(OSError):
                asked(server, "GET", "/a/b.kv")
            ended.set()

        threading.Thread(target=hang, daemon=True).start()
        assert not ended.wait(0.2)
        server.fault = None
        server.healed.set()
        assert ended.wait(30)
        assert asked(server, "DELETE", "/a/b.kv") == (204, b"")


def test_what_has_grown_is_told() -> None:
    before = Resources(4, 40, 80, 900, 2)
    assert trial._grown(before, before) == []
    assert trial._grown(before, Resources(5, 40, 80, 900, 3)) == [
        "processes: 4 before, 5 after",
        "shared_memory: 2 before, 3 after",
    ]
    assert trial._grown(before, Resources(4, 400, 80, 9000, 2)) == [
        "threads: 40 before, 400 after",
        "resident_mib: 900 before, 9000 after",
    ]


def sampled(minute: int, *, all_threads: int = 80, shm: int = 4, mib: int = 20, **one: int) -> Sample:
    process = Resources(
        **{"processes": 1, "threads": 10, "descriptors": 30, "resident_mib": 300, "shared_memory": 2} | one
    )
    return Sample(minute, Resources(8, all_threads, 240, 1500, shm), {7: process, 1000 + minute: process}, 300, mib)


def test_a_soak_tells_what_has_grown_in_processes_that_live_on() -> None:
    flat = [sampled(minute) for minute in range(12)]
    assert grown(flat) == []
    assert grown(flat[:2]) == []
    assert grown([*flat[:11], sampled(11, shm=5)]) == ["shared_memory: 4 after warm-up, 5 at the end"]
    assert grown([*flat[:11], sampled(11, mib=90)]) == ["the store has 90 MiB, its quota is 24"]
    assert grown([sampled(minute, resident_mib=300 + 10 * minute) for minute in range(12)]) == [
        "process 7: resident_mib 365, later 405"
    ]
    assert grown([sampled(minute, descriptors=30 + 40 * (minute == 8)) for minute in range(12)]) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("needs_torch")
def test_a_soak_compares_every_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "MINUTE_S", 4.0)
    monkeypatch.setattr(soak, "CHATS", 2)
    monkeypatch.setattr(soak, "LOOKS", 2)
    bench, shown = Bench(tmp_path, "1P1D", 1.0), list[str]()
    done = soak.run(bench, [at("slow", "client", "decoding"), at("hung", "store", "reading")], 2, 1, shown.append)
    assert done.found == [] and done.verdicts["right"] > 10
    assert set(done.faults) <= {"slow:client", "hung:store"} and len(shown) == len(done.samples) == 2
    bench.right = {prompt: [7] * len(tokens) for prompt, tokens in bench.right.items()}
    monkeypatch.setattr(Bench, "prepare", lambda *_: None)
    monkeypatch.setattr(Bench, "is_served", lambda *_: True)
    assert any(
        "WRONG tokens" in text for text in soak.run(bench, [at("slow", "client", "decoding")], 1, 1, shown.append).found
    )
    with pytest.raises(ValueError, match="need network namespaces"):
        soak.run(bench, [at("partition", "DE", "decoding")], 1, 1, shown.append)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("needs_torch")
def test_a_client_that_leaves_and_a_store_that_rots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    only = "fault=kill,fault=corrupt,victim=client,victim=store,phase=reading,path=PE"
    code = cli.main(["faults", "real", "--only", only, "--hold", "1", "--json", str(report)])
    shown = capsys.readouterr().out
    trials = json.loads(report.read_bytes())
    assert code == 0, shown
    assert [(one["combination"], one["outcome"], one["looked_at"]) for one in trials] == [
        ("kill:store reading path=PE", "ok", "right"),
        ("kill:client reading path=PE", "ok", "hung up"),
        ("corrupt:store reading path=PE", "ok", "right"),
    ]
    assert all(one["in_phase"] and one["others"]["right"] > 0 for one in trials)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("needs_torch")
def test_wrong_tokens_and_what_is_held_fail_a_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(Bench):
        def prepare(self, stages: Sequence[Stage], chats: int = 0) -> None:
            super().prepare(stages, chats)
            for prompt in BACKGROUND:
                self.right[prompt] = [7] * prompt.new

    monkeypatch.setattr(Served, "held", lambda _: ["a block 1.0"])
    monkeypatch.setattr(trial, "LET_GO_S", 0.1)
    found: list[Trial] = []
    run(Strict(tmp_path, "1P1D", 0.5), [at("kill", "client", "decoding")], found.append)
    (one,) = found
    assert one.outcome == "FAILED"
    assert any("WRONG tokens" in text for text in one.found) and "held: a block 1.0" in one.found


def test_options_of_the_caller_come_last_in_namespaces_too(tmp_path: Path) -> None:
    """The last one counts: `-- --transport nixl` must not be served over tcp."""
    testbed = Testbed(make_plan("faults", 1, 1, "10.91"), Rates())
    served = Namespaced(testbed, ("--transport", "nixl"), tmp_path)
    for command in (served._command, *served._engines.values()):
        chosen = [command[at + 1] for at, word in enumerate(command) if word == "--transport"]
        assert chosen[-1] == "nixl"
