from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.kv.layout import KVLayout, KVPart, parts_of

LAYOUTS = st.builds(
    KVLayout,
    layers=st.integers(1, 70),
    parts=st.lists(
        st.builds(KVPart, name=st.sampled_from(["k", "v"]), heads=st.integers(1, 8), dim=st.integers(1, 300)),
        min_size=1,
        max_size=3,
    ).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    block_tokens=st.integers(1, 128),
)


def test_sizes_of_known_models() -> None:
    qwen = KVLayout(layers=64, parts=(KVPart("k", 8, 128), KVPart("v", 8, 128)), dtype="bfloat16")
    assert (qwen.token_bytes, qwen.layer_block_bytes, qwen.full_block_bytes) == (4096, 262_144, 16_777_216)
    deepseek = KVLayout(layers=61, parts=(KVPart("latent", 1, 512), KVPart("rope", 1, 64)), dtype="bfloat16")
    assert (deepseek.token_bytes, deepseek.full_block_bytes) == (1152, 61 * 64 * 1152)


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
    assert middle - start == split * layout.token_bytes
    assert layout.layer_range(layer, split) == (middle, layout.layer_range(layer)[1])


@pytest.mark.parametrize(("layer", "first", "tokens"), [(-1, 0, 1), (3, 0, 1), (0, -1, 1), (0, 0, 65), (0, 60, -1)])
def test_a_range_outside_the_block_is_refused(layer: int, first: int, tokens: int) -> None:
    layout = KVLayout(layers=3, parts=(KVPart("k", 1, 1),), dtype="float32")
    with pytest.raises(ValueError, match="outside a block of 3 layers"):
        layout.layer_range(layer, first, tokens)


def test_a_layout_without_bytes_is_refused() -> None:
    part = KVPart("k", 1, 1)
    with pytest.raises(ValueError, match="'int3' is unknown; use one of float32"):
        KVLayout(1, (part,), "int3")
    with pytest.raises(ValueError, match="got 0 layers"):
        KVLayout(0, (part,), "float32")
    with pytest.raises(ValueError, match="0 parts"):
        KVLayout(1, (), "float32")
    with pytest.raises(ValueError, match="0 tokens"):
        KVLayout(1, (part,), "float32", 0)
    with pytest.raises(ValueError, match="'rope' has 1 heads × 0"):
        KVPart("rope", 1, 0)


def test_an_indexer_is_a_third_part_of_every_layer_or_refused() -> None:
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    latent, rope, index = KVPart("latent", 1, 512), KVPart("rope", 1, 64), KVPart("index", 1, 128)
    assert parts_of(SimpleNamespace(**sizes)) == (latent, rope)
    indexed = sizes | {"index_head_dim": 128}
    assert parts_of(SimpleNamespace(**indexed)) == (latent, rope, index)
    assert parts_of(SimpleNamespace(**indexed, layer_types=["indexed_attention"] * 2)) == (latent, rope, index)
    with pytest.raises(ValueError, match="full_attention, indexed_attention, and only some"):
        parts_of(SimpleNamespace(**indexed, layer_types=["indexed_attention", "full_attention"]))
    with pytest.raises(ValueError, match="layers 1, 2 share the indexer"):
        parts_of(SimpleNamespace(**indexed, indexer_types=["full", "shared", "shared"]))
