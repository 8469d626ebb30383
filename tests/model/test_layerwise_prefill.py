"""Layerwise prefill: what is on the device, in what order things move, and what a failure touches."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from engine_world import BlockStore, BufferIO, DeBuffer, Engines, greedy, random_tokens, turn

from dualpath.model import LayerIOTimeoutError, LayerwisePrefill, PagedDecode, PrefillItem

Prefills = Callable[..., LayerwisePrefill]


def batch_with_hits(engines: Engines, prefill_of: Prefills, count: int = 3) -> tuple[list[DeBuffer], list[PrefillItem]]:
    """`count` prompts of different lengths whose first 128 tokens are hits."""
    store, shared = BlockStore(), random_tokens(130, seed=1)
    turn(prefill_of(engines.model), PagedDecode(engines.model, blocks=4), [shared], 2, store)
    prompts = [shared[:128] + random_tokens(10 + 17 * i, seed=2 + i) for i in range(count)]
    buffers = [DeBuffer(engines.model.layout, prompt, store) for prompt in prompts]
    items = [PrefillItem(b.prompt[b.hit_tokens :], b.hit_tokens, greedy(8)) for b in buffers]
    assert all(item.past_tokens == 128 for item in items)
    return buffers, items


@pytest.mark.parametrize("device_layers", [2, 3])
def test_only_a_few_layers_are_on_the_device(engines: Engines, prefill_of: Prefills, device_layers: int) -> None:
    buffers, items = batch_with_hits(engines, prefill_of)
    engine, io = prefill_of(engines.model, device_layers=device_layers), BufferIO(buffers, items)
    engine.run(items, io)
    batch_tokens = sum(len(b.prompt) for b in buffers)
    assert engine.statistics.batch_tokens == batch_tokens
    layer_bytes = batch_tokens * max(engines.model.layout.row_bytes)
    assert layer_bytes <= engine.statistics.peak_device_kv_bytes <= device_layers * layer_bytes
    if len(set(engines.model.layout.row_bytes)) == 1:
        assert len(io.addresses) == device_layers * len(items)
    layers = range(engines.model.layout.layers)
    assert io.loaded == io.shipped == [(layer, (0, 1, 2)) for layer in layers]


def test_without_layerwise_every_layer_is_on_the_device(qwen: Engines, prefill_of: Prefills) -> None:
    buffers, items = batch_with_hits(qwen, prefill_of)
    engine, io = prefill_of(qwen.model, layerwise=False), BufferIO(buffers, items)
    engine.run(items, io)
    batch_bytes = sum(len(b.prompt) for b in buffers) * qwen.model.layout.row_bytes[0]
    assert engine.statistics.peak_device_kv_bytes == qwen.model.layout.layers * batch_bytes


def test_loading_and_shipping_run_beside_the_compute(qwen: Engines, prefill_of: Prefills) -> None:
    """Layer 1 can be loaded while layer 0 is still being shipped, and layer 1 computed; layer 3 needs 0's buffer."""
    buffers, items = batch_with_hits(qwen, prefill_of)
    second_computed, third_asked = threading.Event(), threading.Event()

    class Overlapping(BufferIO):
        def load_layer(self, layer: int, destinations: list[np.ndarray | None]) -> list[Exception | None]:
            if layer == 3:
                third_asked.set()
            return super().load_layer(layer, destinations)

        def ship_layer(self, layer: int, rows: list[np.ndarray | None]) -> list[Exception | None]:
            if layer == 0:
                assert second_computed.wait(20), "layer 1 was not computed while layer 0 was being shipped"
                assert not third_asked.is_set(), "layer 3 was loaded over layer 0 before that was shipped"
            return super().ship_layer(layer, rows)

    def note_second(module: torch.nn.Module, arguments: object, output: object) -> None:
        second_computed.set()

    hook = qwen.model.network.get_decoder().layers[1].register_forward_hook(note_second)
    try:
        outputs = prefill_of(qwen.model).run(items, Overlapping(buffers, items))
    finally:
        hook.remove()
    assert [output.error for output in outputs] == [None] * 3
    assert third_asked.is_set()


def test_buffers_are_kept_from_run_to_run(qwen: Engines, prefill_of: Prefills) -> None:
    buffers, items = batch_with_hits(qwen, prefill_of)
    engine, first, second = prefill_of(qwen.model), BufferIO(buffers, items), BufferIO(buffers, items)
    assert engine.run(items, first) == engine.run(items, second)
    assert first.addresses == second.addresses


@pytest.mark.parametrize("failing_layer", [0, 2, 4])
def test_a_failed_load_spoils_only_its_item(engines: Engines, prefill_of: Prefills, failing_layer: int) -> None:
    buffers, items = batch_with_hits(engines, prefill_of)
    failure = OSError("checksum")
    io = BufferIO(buffers, items)
    io.load_errors = {(failing_layer, 1): failure}
    outputs = prefill_of(engines.model).run(items, io)
    assert outputs[1].error is failure and outputs[1].token is None
    for i in (0, 2):
        assert outputs[i].error is None
        assert [outputs[i].token.token_id] == engines.reference.generate(buffers[i].prompt, 1)
    layers = engines.model.layout.layers
    assert dict(io.loaded) == {n: (0, 1, 2) if n <= failing_layer else (0, 2) for n in range(layers)}
    shipped = dict(io.shipped)
    assert shipped[layers - 1] == (0, 2) and shipped[failing_layer] == (0, 2)


def test_rows_of_a_failed_item_may_hold_anything(engines: Engines, prefill_of: Prefills) -> None:
    buffers, items = batch_with_hits(engines, prefill_of)

    class Damaging(BufferIO):
        def load_layer(self, layer: int, destinations: list[np.ndarray | None]) -> list[Exception | None]:
            errors = super().load_layer(layer, destinations)
            if destinations[0] is not None:
                destinations[0][:] = 0xFF  # not numbers
                errors[0] = OSError("torn")
            return errors

    outputs = prefill_of(engines.model).run(items, Damaging(buffers, items))
    assert isinstance(outputs[0].error, OSError)
    for i in (1, 2):
        assert [outputs[i].token.token_id] == engines.reference.generate(buffers[i].prompt, 1)


def test_a_failed_shipment_spoils_only_its_item(qwen: Engines, prefill_of: Prefills) -> None:
    buffers, items = batch_with_hits(qwen, prefill_of)
    failure = ConnectionError("peer is gone")

    class Unshippable(BufferIO):
        def ship_layer(self, layer: int, rows: list[np.ndarray | None]) -> list[Exception | None]:
            super().ship_layer(layer, rows)
            return [failure if layer == 1 and i == 2 else None for i in range(len(rows))]

    io = Unshippable(buffers, items)
    outputs = prefill_of(qwen.model).run(items, io)
    assert [output.error for output in outputs] == [None, None, failure]
    assert [indices for _, indices in io.shipped] == [(0, 1, 2)] * 2 + [(0, 1)] * 3


def test_a_raising_load_fails_the_items_it_was_for(qwen: Engines, prefill_of: Prefills) -> None:
    buffers, items = batch_with_hits(qwen, prefill_of, count=2)
    alone = DeBuffer(qwen.model.layout, random_tokens(40, seed=9))
    buffers.append(alone)
    items.append(PrefillItem(alone.prompt, 0, greedy(4)))

    class Raising(BufferIO):
        def load_layer(self, layer: int, destinations: list[np.ndarray | None]) -> list[Exception | None]:
            raise RuntimeError("no channel")

    outputs = prefill_of(qwen.model).run(items, Raising(buffers, items))
    assert [str(output.error) for output in outputs[:2]] == ["no channel"] * 2
    assert [outputs[2].token.token_id] == qwen.reference.generate(alone.prompt, 1)


def test_a_load_with_too_few_results_is_an_error(qwen: Engines, prefill_of: Prefills) -> None:
    buffers, items = batch_with_hits(qwen, prefill_of)

    class Short(BufferIO):
        def load_layer(self, layer: int, destinations: list[np.ndarray | None]) -> list[Exception | None]:
            return super().load_layer(layer, destinations)[:2]

    outputs = prefill_of(qwen.model).run(items, Short(buffers, items))
    assert all("2 results for 3 items" in str(output.error) for output in outputs)


def test_when_every_item_has_failed_the_rest_is_skipped(qwen: Engines, prefill_of: Prefills) -> None:
    buffers, items = batch_with_hits(qwen, prefill_of)
    io = BufferIO(buffers, items)
    io.load_errors = {(1, i): OSError(f"item {i}") for i in range(3)}
    engine = prefill_of(qwen.model)
    assert [str(output.error) for output in engine.run(items, io)] == ["item 0", "item 1", "item 2"]
    assert max(layer for layer, _ in io.loaded) == 1
    assert all(layer <= 1 for layer, _ in io.shipped)
    again = engine.run(items, BufferIO(buffers, items))
    assert [output.error for output in again] == [None] * 3


def test_an_error_of_the_model_reaches_the_caller_and_the_next_run_works(qwen: Engines, prefill_of: Prefills) -> None:
    buffers, items = batch_with_hits(qwen, prefill_of)
    engine = prefill_of(qwen.model)

    def explode(module: torch.nn.Module, arguments: object) -> None:
        raise FloatingPointError("bad layer")

    hook = qwen.model.network.get_decoder().layers[2].register_forward_pre_hook(explode)
    try:
        with pytest.raises(FloatingPointError, match="bad layer"):
            engine.run(items, BufferIO(buffers, items))
    finally:
        hook.remove()
    outputs = engine.run(items, BufferIO(buffers, items))
    assert [o.token.token_id for o in outputs] == [qwen.reference.generate(b.prompt, 1)[0] for b in buffers]


@pytest.mark.parametrize("way", ["load_layer", "ship_layer"])
def test_a_callback_that_hangs_ends_the_run_and_the_engine(qwen: Engines, prefill_of: Prefills, way: str) -> None:
    buffers, items = batch_with_hits(qwen, prefill_of)
    engine, io, end = prefill_of(qwen.model, io_deadline_s=0.3), BufferIO(buffers, items), threading.Event()

    def hang(layer: int, spans: list[np.ndarray | None]) -> list[Exception | None]:
        end.wait(60)
        return [None] * len(spans)

    setattr(io, way, hang)
    try:
        with pytest.raises(LayerIOTimeoutError, match=r"no stage advanced for 0\.3 s"):
            engine.run(items, io)
        with pytest.raises(RuntimeError, match="can't run any more"):
            engine.run(items, BufferIO(buffers, items))
    finally:
        end.set()


def test_a_batch_that_can_not_be_run_is_refused(qwen: Engines, prefill_of: Prefills) -> None:
    engine, io = prefill_of(qwen.model, max_batch_tokens=5000), BufferIO([], [])
    with pytest.raises(ValueError, match="item 1 has 0 tokens to compute"):
        engine.run([PrefillItem([1], 0), PrefillItem([], 64)], io)
    with pytest.raises(ValueError, match="after -1 cached"):
        engine.run([PrefillItem([1], -1)], io)
    with pytest.raises(ValueError, match="item 0 reaches 4097 tokens"):
        engine.run([PrefillItem([1], 4096)], io)
    with pytest.raises(ValueError, match="the batch has 6000 tokens, above max_batch_tokens 5000"):
        engine.run([PrefillItem([1] * 3000, 0)] * 2, io)
    assert engine.run([], io) == []
    with pytest.raises(ValueError, match="device_layers=1"):
        LayerwisePrefill(qwen.model, device_layers=1)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.run([PrefillItem([1], 0)], io)


def test_the_token_may_end_the_request(qwen: Engines, prefill_of: Prefills) -> None:
    prompt = random_tokens(30, seed=4)
    (token,) = qwen.reference.generate(prompt, 1)
    params = [greedy(1), greedy(9), greedy(9, stop_token_ids=(token,)), greedy(9)]
    items = [PrefillItem(prompt, 0, p, generated_so_far=8 if i == 3 else 0) for i, p in enumerate(params)]
    buffers = [DeBuffer(qwen.model.layout, prompt) for _ in items]
    outputs = prefill_of(qwen.model).run(items, BufferIO(buffers, items))
    assert [output.finish_reason for output in outputs] == ["length", None, "stop", "length"]
    assert {output.token.token_id for output in outputs} == {token}
