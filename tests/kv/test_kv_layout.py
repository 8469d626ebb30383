from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.kv.layout import KVLayout, KVPart, LayerKV, layer_parts
from dualpath.spec.kv_bytes import KVBytes, Window

PARTS = st.lists(
    st.builds(KVPart, name=st.sampled_from(["k", "v"]), heads=st.integers(1, 8), dim=st.integers(1, 300)),
    min_size=1,
    max_size=3,
).map(tuple)
LAYERS = st.builds(LayerKV, parts=PARTS, window_tokens=st.none() | st.integers(1, 400))
LAYOUTS = st.builds(
    KVLayout.of,
    st.lists(st.integers(0, 2), min_size=1, max_size=70).flatmap(
        lambda kinds: st.lists(LAYERS, min_size=3, max_size=3).map(lambda layers: [layers[kind] for kind in kinds])
    ),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    block_tokens=st.integers(1, 128),
)


def test_sizes_of_known_models() -> None:
    qwen = KVLayout.alike(layers=64, parts=(KVPart("k", 8, 128), KVPart("v", 8, 128)), dtype="bfloat16")
    assert set(qwen.row_bytes) == {4096} and set(qwen.layer_block_bytes) == {262_144}
    assert (qwen.kv_bytes.bytes_per_token, qwen.full_block_bytes) == (262_144, 16_777_216)
    deepseek = KVLayout.alike(layers=61, parts=(KVPart("latent", 1, 512), KVPart("rope", 1, 64)), dtype="bfloat16")
    assert (deepseek.kv_bytes.bytes_per_token, deepseek.full_block_bytes) == (61 * 1152, 61 * 64 * 1152)


def test_layers_that_differ() -> None:
    """As in MiMo-V2-Flash: a window's layers keep twice as many heads."""
    whole = LayerKV((KVPart("k", 4, 192), KVPart("v", 4, 128)))
    sliding = LayerKV((KVPart("k", 8, 192), KVPart("v", 8, 128)), window_tokens=128)
    layout = KVLayout.of([whole, sliding, sliding, whole], "bfloat16")
    assert layout.kinds == (whole, sliding) and layout.layer_kinds == (0, 1, 1, 0)
    assert layout.row_bytes == (2560, 5120, 5120, 2560) and layout.kv_bytes == KVBytes(5120, (Window(128, 10_240),))
    assert [layout.layer_range(layer, 1, 2) for layer in (0, 1, 3)] == [
        (2560, 3 * 2560), (64 * 2560 + 5120, 64 * 2560 + 3 * 5120), (64 * 12_800 + 2560, 64 * 12_800 + 3 * 2560)
    ]  # fmt: skip


WINDOWED = KVLayout.of([LayerKV((KVPart("kv", 1, 1),), window) for window in (None, 1, 65, 66, 128, 1000)], "float32")


def test_blocks_that_a_window_sees() -> None:
    """After 192 tokens, the next token sees from 128 on with a window of 65, and from 127 on with one of 66."""
    assert [WINDOWED.layers_seen(block, 192) for block in range(3)] == [(0, 5), (0, 3, 4, 5), (0, 2, 3, 4, 5)]
    assert WINDOWED.kv_bytes.hit_bytes(192) == (2 + 4 + 5) * 64 * 4
    assert WINDOWED.kv_bytes.hit_bytes(0) == 0


@given(LAYOUTS, st.integers(0, 30))
def test_a_hit_reads_every_row_that_is_seen_and_no_other_block(layout: KVLayout, blocks: int) -> None:
    hit_tokens = blocks * layout.block_tokens
    seen = [layout.layers_seen(block, hit_tokens) for block in range(blocks)]
    for layer in range(layout.layers):
        window = layout.kind(layer).window_tokens or hit_tokens + 1
        rows = {token // layout.block_tokens for token in range(max(0, hit_tokens - window + 1), hit_tokens)}
        assert {block for block in range(blocks) if layer in seen[block]} == rows
    read_bytes = sum(layout.layer_block_bytes[layer] for layers in seen for layer in layers)
    assert layout.kv_bytes.hit_bytes(hit_tokens, layout.block_tokens) == read_bytes


@given(LAYOUTS)
def test_layers_tile_the_full_block(layout: KVLayout) -> None:
    ranges = [layout.layer_range(layer) for layer in range(layout.layers)]
    assert ranges[0][0] == 0 and ranges[-1][1] == layout.full_block_bytes
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


@given(LAYOUTS, st.data())
def test_token_ranges_tile_the_layer(layout: KVLayout, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, layout.layers - 1))
    split = data.draw(st.integers(0, layout.block_tokens))
    start, middle = layout.layer_range(layer, 0, split)
    assert middle - start == split * layout.row_bytes[layer]
    assert layout.layer_range(layer, split) == (middle, layout.layer_range(layer)[1])


@pytest.mark.parametrize(("layer", "first", "tokens"), [(-1, 0, 1), (3, 0, 1), (0, -1, 1), (0, 0, 65), (0, 60, -1)])
def test_a_range_outside_the_block_is_refused(layer: int, first: int, tokens: int) -> None:
    layout = KVLayout.alike(layers=3, parts=(KVPart("k", 1, 1),), dtype="float32")
    with pytest.raises(ValueError, match="outside a block of 3 layers"):
        layout.layer_range(layer, first, tokens)


def test_a_layout_without_bytes_is_refused() -> None:
    part = KVPart("k", 1, 1)
    with pytest.raises(ValueError, match="'int3' is unknown; use one of float32"):
        KVLayout.alike(1, (part,), "int3")
    with pytest.raises(ValueError, match="got 0 layers"):
        KVLayout.alike(0, (part,), "float32")
    with pytest.raises(ValueError, match="at least one part"):
        KVLayout.alike(1, (), "float32")
    with pytest.raises(ValueError, match="0 tokens"):
        KVLayout.alike(1, (part,), "float32", 0)
    with pytest.raises(ValueError, match="sliding window of 0"):
        LayerKV((part,), 0)
    with pytest.raises(ValueError, match=r"kinds \[0, 2\], and there are 1"):
        KVLayout((LayerKV((part,)),), (0, 2), "float32")
    with pytest.raises(ValueError, match="'rope' has 1 heads × 0"):
        KVPart("rope", 1, 0)


def test_an_indexer_is_a_third_part_of_the_layers_that_have_one() -> None:
    sizes = {"num_hidden_layers": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    latent, index = (KVPart("latent", 1, 512), KVPart("rope", 1, 64)), KVPart("index", 1, 128)
    assert layer_parts(SimpleNamespace(**sizes)) == (latent,) * 3
    indexed = sizes | {"index_head_dim": 128}
    assert layer_parts(SimpleNamespace(**indexed)) == ((*latent, index),) * 3
    types = ["indexed_attention", "full_attention", "indexed_attention"]
    assert layer_parts(SimpleNamespace(**indexed, layer_types=types)) == ((*latent, index), latent, (*latent, index))
    shared = ["full", "shared", "shared"]
    assert layer_parts(SimpleNamespace(**indexed, indexer_types=shared)) == ((*latent, index), latent, latent)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        layer_parts(SimpleNamespace(kv_lora_rank=512))
