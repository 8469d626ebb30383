"""A decode engine's worker on CPU tensors: which calls are carried out when, and what each end gives back."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dualpath.cluster.attachment import Admit, Begin, CopyOut, Fill, Release, Reply, Stop
from dualpath.cluster.vllm_attachment import Generated
from dualpath.spec.sampling import SamplingParams
from dualpath.vllm.decode_worker import DecodeWorker
from dualpath.vllm.device_sequence import ADMIT_S, HOLD_S, LOAD_S
from dualpath.vllm.steps import DecodeStep, End, Load, Progress
from tests.vllm.fakes import Device, Inline, Said

OWNER, SEQUENCE = (3, 1), 5
ADMIT = Admit(1, SEQUENCE, OWNER, 100, 0, SamplingParams(max_tokens=1), 0)
FILL = Fill(2, SEQUENCE, [(0, 10, 64), (1, 11, 36)])
LOAD = DecodeStep(loads=[Load("r", OWNER, 0, [4, 5])])


class Bench:
    """A worker with its threads in the test's hands."""

    def __init__(self, folder: Path, block_size: int = 64) -> None:
        self.device, self.said, self.thread = Device(folder, block_size=block_size), Said(), Inline()
        self.now_s = 100.0
        self.worker = DecodeWorker(self.device.copies, self.said.append, self.thread, now_s=lambda: self.now_s)
        self.worker.attached(self.device.pool)

    def handle(self, *messages: object) -> list[object]:
        for message in messages:
            self.worker.handle(message)  # type: ignore[arg-type]
        self.thread.run()
        return self.said.take()

    def step(self, step: DecodeStep) -> list[object]:
        self.worker.begin(step)
        self.worker.load(step)
        self.thread.run()
        return self.said.take()

    def outcome(self) -> tuple[set[str], set[str], set[int]]:
        """Returns what vLLM is told: blocks to free, loads that have ended, blocks that were not loaded."""
        return (*self.worker.take_finished(), self.worker.take_errors())

    def run(self) -> None:
        """Bring the sequence to decoding."""
        self.handle(ADMIT, FILL)
        self.step(LOAD)
        self.handle(Begin(3, SEQUENCE))
        assert self.outcome() == (set(), {"r"}, set())


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.device.pool.close()


def test_a_load_waits_for_vllms_blocks(bench: Bench) -> None:
    bench.device.paint_page(10, 20)
    bench.device.paint_page(11, 30)
    assert bench.handle(ADMIT, FILL) == []
    assert bench.step(LOAD) == [Reply(1), Reply(2)]
    assert bench.device.is_painted(4, 20)
    assert bench.device.is_painted(5, 30)
    assert bench.outcome() == (set(), set(), set())
    assert bench.handle(Begin(3, SEQUENCE)) == [Reply(3)]
    assert bench.outcome() == (set(), {"r"}, set())


def test_a_load_waits_for_its_agent(bench: Bench) -> None:
    bench.device.paint_page(10, 20)
    assert bench.step(LOAD) == []
    assert bench.handle(ADMIT, FILL) == [Reply(1), Reply(2)]
    assert bench.device.is_painted(4, 20)


def test_what_vllm_has_itself_is_not_written(bench: Bench) -> None:
    bench.device.paint_page(10, 20)
    bench.device.paint(4, 90)
    bench.handle(ADMIT, FILL)
    bench.step(DecodeStep(loads=[Load("r", OWNER, 64, [4, 5])]))
    assert bench.device.is_painted(4, 90)
    assert bench.handle(Stop(SEQUENCE)) == []
    assert bench.outcome() == (set(), {"r"}, {5})


def test_device_blocks_of_sixteen_tokens(tmp_path: Path) -> None:
    bench = Bench(tmp_path, block_size=16)
    bench.device.paint_page(10, 20)
    bench.handle(ADMIT, Fill(2, SEQUENCE, [(0, 10, 64), (1, 10, 36)]))
    bench.step(DecodeStep(loads=[Load("r", OWNER, 32, [0, 1, 2, 3, 4, 5, 6])]))
    assert [bench.device.is_painted(block, 20) for block in range(8)] == [False] * 2 + [True] * 5 + [False]
    bench.device.pool.close()


@pytest.mark.parametrize("patience_s", [ADMIT_S])
def test_no_admit(bench: Bench, patience_s: float) -> None:
    bench.step(LOAD)
    bench.now_s += patience_s
    assert bench.outcome() == (set(), set(), set())
    bench.now_s += 0.1
    assert bench.outcome() == (set(), {"r"}, {4, 5})
    (reply,) = bench.handle(ADMIT)
    assert "does not wait" in reply.error  # type: ignore[attr-defined]
    bench.step(DecodeStep(ended=[End("r", OWNER, True, "length")]))
    assert bench.outcome() == ({"r"}, set(), set())
    assert bench.handle(ADMIT) == []  # the next coordinator's owners have the same numbers


def test_an_agent_that_falls_silent_in_a_load(bench: Bench) -> None:
    bench.handle(ADMIT)
    bench.step(LOAD)
    bench.now_s += LOAD_S + 1
    assert bench.outcome() == (set(), {"r"}, {4, 5})
    bench.device.paint_page(10, 20)
    assert "no sequence" in bench.handle(FILL)[0].error  # type: ignore[attr-defined]
    assert not bench.device.is_painted(4, 20)


def test_a_stop_before_vllm_has_blocks(bench: Bench) -> None:
    first, second = bench.handle(ADMIT, FILL, Stop(SEQUENCE))
    assert "stopped" in first.error  # type: ignore[attr-defined]
    assert "stopped" in second.error  # type: ignore[attr-defined]
    assert bench.handle(Release(4, SEQUENCE)) == [Reply(4)]
    bench.step(LOAD)
    assert bench.outcome() == (set(), {"r"}, {4, 5})


def test_a_stop_of_an_earlier_coordinator_does_not_count(bench: Bench) -> None:
    bench.handle(ADMIT, Stop(SEQUENCE))
    assert bench.handle(ADMIT) == []
    assert bench.step(LOAD) == [Reply(1)]


def test_a_copy_that_runs_ends_before_a_failed_load_is_told(bench: Bench) -> None:
    bench.handle(ADMIT)
    bench.step(LOAD)
    outcomes = []
    to_device = bench.device.copies.to_device

    def copy_while_it_fails(*arguments: object) -> None:
        bench.worker.handle(Stop(SEQUENCE))
        outcomes.append(bench.outcome())
        to_device(*arguments)  # type: ignore[arg-type]

    bench.device.copies.to_device = copy_while_it_fails  # type: ignore[method-assign]
    (reply,) = bench.handle(FILL)
    assert "stopped" in reply.error  # type: ignore[attr-defined]
    assert set(map(str, outcomes)) == {str((set(), set(), set()))}
    assert bench.outcome() == (set(), {"r"}, {4, 5})


def test_vllm_ends_a_request_that_loads(bench: Bench) -> None:
    bench.handle(ADMIT)
    bench.step(LOAD)
    bench.step(DecodeStep(ended=[End("r", OWNER, False, "abort")]))
    assert bench.outcome() == (set(), {"r"}, set())
    assert "no sequence" in bench.handle(FILL)[0].error  # type: ignore[attr-defined]
    assert bench.outcome() == (set(), set(), set())


def test_vllm_ends_a_request_whose_load_has_just_ended(bench: Bench) -> None:
    """It takes the load's end, which it has not seen yet, for the request's."""
    bench.run()
    end = DecodeStep(ended=[End("r", OWNER, False, "abort")])
    assert bench.step(end) == [Generated(SEQUENCE, [], "abort")]
    assert bench.outcome() == (set(), set(), set())


def test_a_full_block_is_copied_at_the_start_of_a_step(bench: Bench) -> None:
    bench.run()
    bench.device.paint(4, 40)
    bench.device.paint(5, 50)
    assert bench.handle(CopyOut(6, SEQUENCE, 1, 12)) == []  # not complete yet
    assert bench.step(DecodeStep(progress=[Progress(OWNER, 128, [7, 8])])) == [
        Generated(SEQUENCE, [7, 8]),
        Reply(6),
    ]
    assert bench.device.page_is(12, 50)
    assert bench.handle(CopyOut(7, SEQUENCE, 0, 13)) == []
    assert bench.step(DecodeStep()) == [Reply(7)]
    assert bench.device.page_is(13, 40)


def test_a_preempted_sequence_is_copied_before_its_blocks_are_given_away(bench: Bench) -> None:
    bench.run()
    bench.step(DecodeStep(progress=[Progress(OWNER, 128, [7])]))
    bench.device.paint(4, 40)
    bench.handle(CopyOut(6, SEQUENCE, 0, 12))
    assert bench.step(DecodeStep(preempted=[OWNER])) == [Reply(6)]
    assert bench.device.page_is(12, 40)
    bench.device.paint(5, 50)
    bench.handle(CopyOut(7, SEQUENCE, 1, 12))
    assert bench.step(DecodeStep()) == []
    bench.device.paint(9, 60)
    assert bench.step(DecodeStep(grown=[(OWNER, 0, [8, 9])])) == []
    assert bench.step(DecodeStep(progress=[Progress(OWNER, 128, [])])) == [Reply(7)]
    assert bench.device.page_is(12, 60)


def test_an_ended_requests_blocks_are_held_until_they_are_released(bench: Bench) -> None:
    bench.run()
    bench.device.paint(4, 40)
    end = End("r", OWNER, True, "stop", [9], 128, [4, 5])
    assert bench.step(DecodeStep(ended=[end])) == [Generated(SEQUENCE, [9], "stop")]
    assert bench.outcome() == (set(), set(), set())
    assert bench.handle(CopyOut(6, SEQUENCE, 0, 12)) == [Reply(6)]  # without a step
    assert bench.device.page_is(12, 40)
    (reply,) = bench.handle(CopyOut(7, SEQUENCE, 2, 12))
    assert "not on the device" in reply.error  # type: ignore[attr-defined]
    assert bench.handle(Release(8, SEQUENCE)) == [Reply(8)]
    assert bench.outcome() == ({"r"}, set(), set())


def test_a_page_that_is_not_there_is_an_error(bench: Bench) -> None:
    bench.run()
    bench.step(DecodeStep(ended=[End("r", OWNER, True, "stop", [9], 128, [4, 5])]))
    (reply,) = bench.handle(CopyOut(6, SEQUENCE, 0, 1000))
    assert "outside" in reply.error  # type: ignore[attr-defined]


def test_released_before_vllm_has_ended_it(bench: Bench) -> None:
    bench.run()
    assert bench.handle(Release(6, SEQUENCE)) == [Reply(6)]
    assert bench.outcome() == (set(), set(), set())
    assert bench.step(DecodeStep(ended=[End("r", OWNER, True, "abort")])) == []
    assert bench.outcome() == ({"r"}, set(), set())


def test_an_agent_that_forgets_to_release(bench: Bench) -> None:
    bench.run()
    bench.step(DecodeStep(ended=[End("r", OWNER, True, "stop", [9], 128, [4, 5])]))
    bench.now_s += HOLD_S + 1
    assert bench.outcome() == ({"r"}, set(), set())


@pytest.mark.parametrize("stage", ["asked", "waiting", "loading", "running", "held"])
def test_the_agent_is_gone(bench: Bench, stage: str) -> None:
    if stage in ("running", "held"):
        bench.run()
    if stage in ("asked", "loading"):
        bench.handle(ADMIT)
    if stage in ("waiting", "loading"):
        bench.step(LOAD)
    if stage == "held":
        bench.step(DecodeStep(ended=[End("r", OWNER, True, "stop", [9], 128, [4, 5])]))
    bench.worker.detached()
    ended = {"asked": (set(), set(), set()), "running": (set(), set(), set()), "held": ({"r"}, set(), set())}
    assert bench.outcome() == ended.get(stage, (set(), {"r"}, {4, 5}))
    if stage == "running":
        bench.step(DecodeStep(ended=[End("r", OWNER, True, "stop", [9], 128, [4, 5])]))
        assert bench.outcome() == ({"r"}, set(), set())


def test_without_an_agent_vllm_computes_at_once(bench: Bench) -> None:
    bench.worker.detached()
    bench.step(LOAD)
    assert bench.outcome() == (set(), {"r"}, {4, 5})


def test_what_vllm_declines_is_answered(bench: Bench) -> None:
    bench.handle(ADMIT)
    (reply,) = bench.step(DecodeStep(declined=[OWNER]))
    assert "takes nothing" in reply.error  # type: ignore[attr-defined]


def test_what_vllm_has_declined_already_is_answered(bench: Bench) -> None:
    bench.step(DecodeStep(declined=[OWNER]))
    (reply,) = bench.handle(ADMIT)
    assert "does not wait" in reply.error  # type: ignore[attr-defined]
    bench.now_s += 60
    assert bench.handle(ADMIT) == []
