import struct
from hashlib import blake2b

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.kv.keys import KEY_BYTES, block_keys, namespace
from dualpath.kv.layout import KVLayout, KVPart, LayerKV

LAYOUT = KVLayout.alike(2, (KVPart("k", 1, 4),), "float16")
ROOT = namespace("model", "1", LAYOUT).root
TOKENS = st.lists(st.integers(0, 3), max_size=40)  # few values: equal prefixes happen


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_keys_are_equal_exactly_where_prefixes_are(one: list[int], other: list[int], block_tokens: int) -> None:
    for block, (a, b) in enumerate(
        zip(block_keys(ROOT, one, block_tokens), block_keys(ROOT, other, block_tokens), strict=False)
    ):
        tokens = (block + 1) * block_tokens
        assert (a == b) == (one[:tokens] == other[:tokens])


@given(TOKENS, st.integers(1, 5), st.integers(0, 10))
def test_incremental_equals_whole(tokens: list[int], block_tokens: int, head_blocks: int) -> None:
    whole = block_keys(ROOT, tokens, block_tokens)
    head = block_keys(ROOT, tokens[: head_blocks * block_tokens], block_tokens)
    tail = block_keys(head[-1] if head else ROOT, tokens[len(head) * block_tokens :], block_tokens)
    assert head + tail == whole
    assert len(whole) == len(tokens) // block_tokens
    assert all(len(key) == KEY_BYTES for key in whole)


def test_the_derivation_is_the_documented_one() -> None:
    first, second = block_keys(ROOT, [1, 2, 3, 2**32 - 1, 5], 2)
    assert first == blake2b(ROOT + struct.pack("<2I", 1, 2), digest_size=16, person=b"dualpath block").digest()
    assert (
        second == blake2b(first + struct.pack("<2I", 3, 2**32 - 1), digest_size=16, person=b"dualpath block").digest()
    )


def test_any_sequence_of_integers_gives_the_same_keys() -> None:
    tokens = list(range(128))
    expected = block_keys(ROOT, tokens)
    assert block_keys(ROOT, tuple(tokens)) == expected
    assert block_keys(ROOT, range(128)) == expected
    assert block_keys(ROOT, np.arange(128)) == expected  # type: ignore[arg-type]


def test_every_fact_of_a_namespace_changes_its_root() -> None:
    roots = {
        namespace(*facts).root
        for facts in [
            ("model", "1", LAYOUT),
            ("model", "2", LAYOUT),
            ("model2", "1", LAYOUT),
            ("model", "1", msgspec.structs.replace(LAYOUT, block_tokens=32)),
            ("model", "1", msgspec.structs.replace(LAYOUT, dtype="bfloat16")),
            ("model", "1", KVLayout.alike(2, (KVPart("v", 1, 4),), "float16")),
            ("model", "1", KVLayout.of([LayerKV((KVPart("k", 1, 4),), window) for window in (None, 128)], "float16")),
            ("model", "1", LAYOUT, "alice"),
            ("model", "1", LAYOUT, "bob"),
            ("model1", "", LAYOUT),
            ("", "model1", LAYOUT),
        ]
    }
    assert len(roots) == 11
    assert namespace("model", "1", LAYOUT).root == ROOT


def test_a_namespace_does_not_keep_the_salt() -> None:
    salted = namespace("model", "1", LAYOUT, "a secret")
    assert salted.salted and not namespace("model", "1", LAYOUT).salted
    assert "a secret" not in repr(salted)
    assert salted.hex == salted.root.hex()


@pytest.mark.parametrize("tokens", [[-1], [2**32], ["a"], [1.0], [None]])
def test_what_is_no_token_id_is_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids must be integers from 0"):
        block_keys(ROOT, tokens, 1)


def test_a_bad_parent_or_block_length_is_refused() -> None:
    with pytest.raises(ValueError, match="parent key has 16 bytes, got 3"):
        block_keys(b"abc", [1])
    with pytest.raises(ValueError, match="block_tokens=0"):
        block_keys(ROOT, [1], 0)
