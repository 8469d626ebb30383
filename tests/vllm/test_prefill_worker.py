"""A prefill engine's worker on CPU tensors: layers in, layers out, and nothing after a drop."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualpath.cluster.vllm_attachment import Drop, Expect, LayerSaved, LayersReady, Quiet, Saved, StepSaved
from dualpath.vllm import prefill_worker
from dualpath.vllm.prefill_worker import PrefillWorker
from dualpath.vllm.steps import Chunk, PrefillStep
from tests.vllm.fakes import LAYOUT, Device, Said

OWNER = (3, 1)
EXPECT = Expect(OWNER, [10, 11, 12], 64, 150)
CHUNK = Chunk(OWNER, 1, [5, 6], 150, [4])


class Bench:
    def __init__(self, folder: Path) -> None:
        self.device, self.said = Device(folder), Said()
        self.worker = PrefillWorker(self.device.copies, self.said.append)
        self.worker.attached(self.device.pool)

    def begin(self, *chunks: Chunk) -> None:
        self.worker.begin(PrefillStep(list(chunks)))
        self.worker.start()

    def run(self, *chunks: Chunk) -> None:
        self.begin(*chunks)
        for layer in range(LAYOUT.layers):
            self.worker.load(layer)
            self.worker.save(layer)
        self.worker.end()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(prefill_worker, "EXPECT_S", 0.05)
    made = Bench(tmp_path)
    yield made
    made.device.pool.close()


def test_hit_blocks_in_and_computed_blocks_out(bench: Bench) -> None:
    bench.device.paint_page(10, 20)
    bench.device.paint(5, 50)
    bench.device.paint(6, 60)
    bench.worker.handle(EXPECT)
    bench.worker.handle(LayersReady(OWNER, 3))
    bench.run(CHUNK)
    assert bench.device.is_painted(4, 20)
    assert bench.device.page_is(11, 50)
    assert bench.device.page_is(12, 60)
    saved = [LayerSaved(layer, [Saved(OWNER, 1, 2)]) for layer in range(3)]
    assert bench.said.take() == [*saved, StepSaved([(OWNER, 150)])]
    assert bench.worker.take_errors() == set()


def test_a_layer_is_waited_for(bench: Bench) -> None:
    bench.device.paint_page(10, 20)
    bench.worker.handle(EXPECT)
    bench.worker.handle(LayersReady(OWNER, 1))
    bench.begin(CHUNK)
    bench.worker.load(0)
    waiting = threading.Thread(target=bench.worker.load, args=(1,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    bench.worker.handle(LayersReady(OWNER, 2))
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize("gone", ["drop", "detached"])
def test_a_wait_ends_when_nothing_comes_any_more(bench: Bench, gone: str) -> None:
    bench.worker.handle(EXPECT)
    bench.begin(CHUNK)
    waiting = threading.Thread(target=bench.worker.load, args=(0,))
    waiting.start()
    if gone == "drop":
        bench.worker.handle(Drop(OWNER))
    else:
        bench.worker.detached()
    waiting.join(10)
    assert not waiting.is_alive()
    assert bench.worker.take_errors() == {4}
    for layer in range(3):
        bench.worker.save(layer)
    bench.worker.end()
    assert bench.said.take() == ([Quiet(OWNER)] if gone == "drop" else [])


def test_a_layer_that_never_comes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_worker, "LAYER_S", 0.05)
    bench.worker.handle(EXPECT)
    bench.run(CHUNK)
    assert bench.worker.take_errors() == {4}
    assert bench.said.take() == []


def test_nothing_is_written_after_a_drop(bench: Bench) -> None:
    bench.worker.handle(EXPECT)
    bench.worker.handle(LayersReady(OWNER, 3))
    bench.begin(CHUNK)
    bench.worker.load(0)
    bench.worker.save(0)
    bench.worker.handle(Drop(OWNER))
    for page in EXPECT.pages:
        bench.device.paint_page(page, 200)
    for layer in (1, 2):
        bench.worker.load(layer)
        bench.worker.save(layer)
    bench.worker.end()
    bench.run(CHUNK)
    assert all(bench.device.page_is(page, 200) for page in EXPECT.pages)
    assert bench.said.take() == [LayerSaved(0, [Saved(OWNER, 1, 2)]), Quiet(OWNER)]


def test_a_complete_prompt_is_forgotten(bench: Bench) -> None:
    bench.worker.handle(EXPECT)
    bench.worker.handle(LayersReady(OWNER, 3))
    bench.run(CHUNK)
    for page in EXPECT.pages:
        bench.device.paint_page(page, 200)
    bench.run(CHUNK)
    assert all(bench.device.page_is(page, 200) for page in EXPECT.pages)


def test_an_agent_that_attaches_while_a_step_begins(tmp_path: Path) -> None:
    device, said = Device(tmp_path), Said()
    worker = PrefillWorker(device.copies, said.append)

    def attach() -> None:
        worker.attached(device.pool)
        worker.handle(Expect(OWNER, [10, 11, 12], 0, 150))

    attaching = threading.Timer(0.05, attach)
    attaching.start()
    worker.begin(PrefillStep([Chunk(OWNER, 0, [4, 5, 6], 150)]))
    for layer in range(LAYOUT.layers):
        worker.save(layer)
    worker.end()
    attaching.join()
    assert said[-1] == StepSaved([(OWNER, 150)])
    device.pool.close()


def test_a_prompt_that_nobody_expects_is_computed_for_nobody(bench: Bench) -> None:
    bench.run(CHUNK)
    assert bench.worker.take_errors() == {4}
    assert bench.said.take() == []


@pytest.mark.parametrize("pages", [[10, 11], [10, 11, 1000]])
def test_pages_that_can_not_be(bench: Bench, pages: list[int]) -> None:
    bench.worker.handle(Expect(OWNER, pages, 64, 150))
    bench.run(CHUNK)
    assert bench.said.take() == []


def test_a_layer_that_ran_without_its_hook_is_noticed(bench: Bench) -> None:
    """As in a CUDA graph of the whole model."""
    bench.worker.handle(EXPECT)
    bench.worker.handle(LayersReady(OWNER, 3))
    bench.begin(CHUNK)
    bench.worker.load(0)
    bench.worker.save(0)
    bench.worker.end()
    assert not any(isinstance(each, StepSaved) for each in bench.said)


def test_a_prompt_whose_first_step_was_missed_is_never_complete(bench: Bench) -> None:
    """As when the agent has just attached: its word comes after the step."""
    bench.run(Chunk(OWNER, 0, [4, 5], 128))
    bench.worker.handle(Expect(OWNER, [10, 11, 12], 0, 150))
    bench.run(Chunk(OWNER, 2, [6], 150))
    bench.run(Chunk(OWNER, 2, [6], 150))
    assert bench.said.take() == []


def test_a_prompt_in_two_steps(bench: Bench) -> None:
    bench.worker.handle(Expect(OWNER, [10, 11, 12], 0, 150))
    bench.run(Chunk(OWNER, 0, [4, 5], 100))
    bench.run(Chunk(OWNER, 1, [5, 6], 150))
    steps = [each for each in bench.said if isinstance(each, StepSaved)]
    assert steps == [StepSaved([(OWNER, 100)]), StepSaved([(OWNER, 150)])]
