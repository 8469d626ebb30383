"""The seam of copies between host and device: who holds memory and for how long, and what is copied."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from engine_world import BlockStore, DeBuffer, Engines, drain, enter, greedy, prefill, random_tokens, turn
from torch import Tensor

from dualpath.model import DeviceCopies, DeviceCopiesError, LayerwisePrefill, MemcpyCopies, PagedDecode
from dualpath.model.device_copies import Piece
from dualpath.model.layers import DeviceLayers, OwnMemory


class NotedCopies(MemcpyCopies):
    """Copies as usual, of memory that is held alone."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []
        self.most_held = 0
        self.calls: list[tuple[str, list[Piece]]] = []

    def hold(self, *memory: Tensor) -> Callable[[], None]:
        ranges = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in memory]
        self.held += ranges
        self.most_held = max(self.most_held, len(self.held))

        def let_go() -> None:
            for one in ranges:
                self.held.remove(one)

        return let_go

    def to_device(self, pieces: Sequence[Piece], stream: object = None) -> None:
        self._note("to device", pieces)
        super().to_device(pieces)

    def to_host(self, pieces: Sequence[Piece], stream: object = None) -> None:
        self._note("to host", pieces)
        super().to_host(pieces)

    def _note(self, way: str, pieces: Sequence[Piece]) -> None:
        for device, host in pieces:
            assert (device.shape, device.dtype) == (host.shape, host.dtype) and host.is_contiguous()
            assert any(first <= device.data_ptr() < end for first, end in self.held)
        self.calls.append((way, list(pieces)))


def test_a_block_is_one_call_with_a_piece_for_each_layer(
    qwen: Engines, prefill_of: Callable[..., LayerwisePrefill]
) -> None:
    copies = NotedCopies()
    decode = PagedDecode(qwen.model, 4, copies)
    prompt = random_tokens(70, seed=5)
    buffer = DeBuffer(qwen.model.layout, prompt)
    (first,) = prefill(prefill_of(qwen.model), [buffer], [greedy(20)])
    enter(decode, 0, buffer, first, greedy(20))
    layers = qwen.model.layout.layers
    assert [(way, [len(device) for device, _ in pieces]) for way, pieces in copies.calls] == [
        ("to device", [64] * layers),
        ("to device", [6] * layers),
    ]
    assert drain(decode)[0] == qwen.reference.generate(prompt, 20)[1:]
    page = np.empty(qwen.model.layout.full_block_bytes, np.uint8)
    decode.copy_block(0, 0, page)
    assert np.array_equal(page, buffer.pages[0])
    assert [way for way, _ in copies.calls] == ["to device", "to device", "to host"]


def test_decode_memory_is_held_while_it_is_there(qwen: Engines) -> None:
    copies = NotedCopies()
    decode = PagedDecode(qwen.model, 4, copies)
    assert len(copies.held) == qwen.model.layout.layers
    decode.release_memory()
    assert copies.held == []
    decode.restore_memory()
    assert len(copies.held) == qwen.model.layout.layers
    decode.admit(0, 64, 7, greedy(5))
    with pytest.raises(RuntimeError, match="hold blocks"):
        decode.release_memory()
    assert len(copies.held) == qwen.model.layout.layers


class AcceleratorLayers(DeviceLayers):
    """Takes the CPU for an accelerator: with host memory of its own, and copies."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self._streams = dict.fromkeys(("load", "ship"))  # type: ignore[assignment]

    def _pinned(self, slot: Tensor) -> Tensor:
        return slot

    def _unpin(self) -> None:
        self._staging = {}

    def mark(self, stage: str, layer: int) -> None:
        """Nothing runs beside the thread that computes."""


def test_an_accelerators_layers_are_copied_and_held_until_they_grow(qwen: Engines) -> None:
    copies = NotedCopies()
    model = qwen.model
    layers = AcceleratorLayers(model.layout, 2, model.device, model.dtype, OwnMemory(), copies)
    row_bytes = model.layout.row_bytes[1]
    for rows in (10, 40):
        layers.reserve(rows, 100)
        assert len(copies.held) == copies.most_held == 4  # two slots, two of staging
        loaded = np.random.default_rng(rows).integers(0, 255, (rows, row_bytes), np.uint8)
        layers.destination(1, 0, rows)[:] = loaded.reshape(-1)
        layers.rows(1).zero_()
        layers.upload(1, [(0, 3), (5, rows - 5)])
        expected = loaded.copy()
        expected[3:5] = 0
        assert np.array_equal(layers.rows(1)[:rows].view(torch.uint8).numpy(), expected)
        shipped = layers.download(1, [(2, 4), (6, 1)])
        assert [one.tobytes() for one in shipped] == [expected[2:6].tobytes(), expected[6:7].tobytes()]
    assert [(way, len(pieces)) for way, pieces in copies.calls] == [("to device", 2), ("to host", 2)] * 2
    layers.close()
    assert copies.held == []


def test_on_a_cpu_a_prefills_layers_are_not_copied(qwen: Engines, prefill_of: Callable[..., LayerwisePrefill]) -> None:
    copies = NotedCopies()
    prefill(
        prefill_of(qwen.model, copies=copies), [DeBuffer(qwen.model.layout, random_tokens(70, seed=1))], [greedy(2)]
    )
    assert (copies.calls, copies.most_held) == ([], 0)


@pytest.fixture
def as_if_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualpath.model.prefill.DeviceLayers", AcceleratorLayers)


@pytest.mark.parametrize("kind", ["noted", "cnic"])
def test_a_prefill_on_an_accelerator_gives_the_reference(
    qwen: Engines, prefill_of: Callable[..., LayerwisePrefill], as_if_on_an_accelerator: None, kind: str
) -> None:
    """Loader and shipper copy at once, layer by layer, with hits in the second turn."""
    if kind == "cnic":
        pytest.importorskip("nixl_cu12", reason="NIXL (dualpath[nixl]) is not installed")
        from dualpath.cluster.engines.cnic_copies import CnicCopies

        copies: DeviceCopies = CnicCopies(torch.device("cpu"))
    else:
        copies = NotedCopies()
    engine, decode, store = prefill_of(qwen.model, copies=copies), PagedDecode(qwen.model, 16), BlockStore()
    contexts = [random_tokens(n, seed=n) for n in (150, 70)]
    for hits in ([0, 0], [128, 64]):
        expected = [qwen.reference.generate(context, 3) for context in contexts]
        assert turn(engine, decode, contexts, 3, store) == (expected, hits)
        contexts = [context + output for context, output in zip(contexts, expected, strict=True)]
    if isinstance(copies, NotedCopies):
        assert {way for way, _ in copies.calls} == {"to device", "to host"}
    engine.release_memory()
    assert turn(engine, decode, contexts[:1], 3, store)[0] == [qwen.reference.generate(contexts[0], 3)]


def test_copies_that_can_not_go_on_end_the_run(
    qwen: Engines, prefill_of: Callable[..., LayerwisePrefill], as_if_on_an_accelerator: None
) -> None:
    class Failing(NotedCopies):
        def to_host(self, pieces: Sequence[Piece], stream: object = None) -> None:
            raise DeviceCopiesError("no way out")

    with pytest.raises(DeviceCopiesError, match="no way out"):
        prefill(
            prefill_of(qwen.model, copies=Failing()),
            [DeBuffer(qwen.model.layout, random_tokens(70, seed=1))],
            [greedy(2)],
        )
