"""The rule that lets three threads share a ring of layer buffers."""

import threading

import pytest

from dualpath.model.layers import LayerIOTimeoutError, LayerProgress, RunAbortedError


def test_a_buffer_is_free_when_its_layer_is_attended_and_shipped() -> None:
    progress = LayerProgress(layers=4, slots=2, whole_context=False, deadline_s=20)
    reached: list[int] = []
    asked = threading.Semaphore(0)

    def load() -> None:
        for layer in range(4):
            progress.wait_slot(layer)
            reached.append(layer)
            asked.release()

    loader = threading.Thread(target=load)
    loader.start()
    assert asked.acquire(timeout=10) and asked.acquire(timeout=10)
    progress.advance("attended", 0)
    assert not asked.acquire(timeout=0.05)
    progress.advance("shipped", 0)
    assert asked.acquire(timeout=10)
    progress.advance("shipped", 1)
    assert not asked.acquire(timeout=0.05)
    progress.advance("attended", 1)
    loader.join(10)
    assert reached == [0, 1, 2, 3]
    assert progress.peak_resident_layers == 2


def test_layers_pass_a_stage_in_order() -> None:
    progress = LayerProgress(layers=4, slots=2, whole_context=False, deadline_s=1)
    progress.advance("loaded", 0)
    with pytest.raises(AssertionError, match="layer 2 is loaded out of order: 1 comes next"):
        progress.advance("loaded", 2)


def test_an_abort_ends_waits_of_now_and_later_with_the_first_cause() -> None:
    progress = LayerProgress(layers=4, slots=2, whole_context=False, deadline_s=20)
    causes: list[BaseException | None] = []

    def wait_loaded() -> None:
        try:
            progress.wait_loaded(0)
        except RunAbortedError as error:
            causes.append(error.__cause__)

    waiting = threading.Thread(target=wait_loaded)
    waiting.start()
    first = OSError("first")
    progress.abort(first)
    progress.abort(OSError("second"))
    waiting.join(10)
    assert causes == [first]
    with pytest.raises(RunAbortedError, match="layer 3 to be computed"):
        progress.wait_written(3)


def test_a_wait_of_the_compute_thread_ends_when_nothing_moves() -> None:
    progress = LayerProgress(layers=2, slots=2, whole_context=True, deadline_s=0.05)
    progress.advance("loaded", 0)
    stuck = r"no stage advanced for 0\.05 s while waiting for layer 1 to be loaded"
    with pytest.raises(LayerIOTimeoutError, match=stuck):
        progress.wait_loaded(0)
    progress.advance("loaded", 1)
    progress.wait_loaded(0)
    with pytest.raises(LayerIOTimeoutError, match="the last layers to be shipped"):
        progress.wait_all_shipped()
