"""What tells two vLLM engines' KV apart, and where a rank's bytes are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dualpath.vllm.copies import Copies, copies_for
from dualpath.vllm.device_layout import arrangement, layer_names, rows, worker_part
from dualpath.vllm.fingerprint import SAMPLE_BYTES, fingerprint, weights_folder
from tests.vllm.fakes import LAYOUT

CONFIG = {"hidden_size": 8, "transformers_version": "5"}
ARRANGED = {"backend": "CPU", "order": [0, 1, 2, 64]}


def checkpoint(folder: Path, change: int | None = None) -> Path:
    weights = np.arange(4096, dtype=np.float32)
    if change is not None:
        weights[change] += 1
    folder.mkdir()
    save_file({"a": np.ones(3, np.float32), "b": weights}, folder / "model.safetensors")
    return folder


def test_equal_only_for_the_same_model_arranged_the_same(tmp_path: Path) -> None:
    same = fingerprint(CONFIG, ARRANGED, checkpoint(tmp_path / "a"))
    assert len(same) == 32
    assert fingerprint(CONFIG | {"transformers_version": "6"}, ARRANGED, checkpoint(tmp_path / "b")) == same
    others = [
        fingerprint(CONFIG | {"hidden_size": 9}, ARRANGED, tmp_path / "a"),
        fingerprint(CONFIG, ARRANGED | {"backend": "FLASH"}, tmp_path / "a"),
        fingerprint(CONFIG, ARRANGED, checkpoint(tmp_path / "c", change=5)),
        fingerprint(CONFIG, ARRANGED, "named"),
    ]
    assert len({same, *others}) == 5


def test_a_sample_of_each_tensor_is_read_and_no_more(tmp_path: Path) -> None:
    first, behind = 0, SAMPLE_BYTES // 4
    same = fingerprint(CONFIG, ARRANGED, checkpoint(tmp_path / "a"))
    assert fingerprint(CONFIG, ARRANGED, checkpoint(tmp_path / "b", change=first)) != same
    assert fingerprint(CONFIG, ARRANGED, checkpoint(tmp_path / "c", change=behind)) == same


def test_weights_that_can_not_be_identified(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no safetensors files; name these weights with the key `weights`"):
        fingerprint(CONFIG, ARRANGED, tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    with pytest.raises(ValueError, match="no safetensors file"):
        fingerprint(CONFIG, ARRANGED, tmp_path)
    assert weights_folder(str(tmp_path), None) == tmp_path
    with pytest.raises(ValueError, match="can't find the files"):
        weights_folder("nobody/nothing-at-all", None)


class FullAttentionSpec(SimpleNamespace):
    pass


class MLAAttentionSpec(SimpleNamespace):
    pass


def grouped(heads: int, block_size: int = 64) -> Any:
    return FullAttentionSpec(
        num_kv_heads=heads, head_size=4, head_size_v=4, dtype="torch.float32", block_size=block_size
    )


def test_ranks_share_a_layer_block_head_after_head() -> None:
    whole = LAYOUT.layer_block_bytes[0]
    assert worker_part(grouped(2), None, 3, whole, 0, 1).layout == LAYOUT
    parts = [worker_part(grouped(1), None, 3, whole // 2, rank, 2) for rank in range(2)]
    assert [part.layout for part in parts] == [LAYOUT, LAYOUT]
    assert [part.offset_bytes for part in parts] == [0, whole // 2]
    assert all(part.writes for part in parts)
    small = worker_part(grouped(2, 16), None, 3, whole // 4, 0, 1)
    assert (small.ratio, small.layout) == (4, LAYOUT)
    with pytest.raises(ValueError, match="padded"):
        worker_part(grouped(2), None, 3, whole + 64, 0, 1)


def test_ranks_have_the_same_latent_and_the_first_writes_it() -> None:
    spec = MLAAttentionSpec(head_size=40, dtype="torch.bfloat16", block_size=16)
    parts = [worker_part(spec, SimpleNamespace(qk_rope_head_dim=8), 2, 16 * 40 * 2, rank, 2) for rank in range(2)]
    assert [part.layout.row_bytes[0] for part in parts] == [80, 80]
    assert [(part.offset_bytes, part.writes, part.ratio) for part in parts] == [(0, True, 4), (0, False, 4)]


def test_rows_are_vllms_own_memory() -> None:
    raw = torch.arange(5 * 2 * 64 * 8, dtype=torch.float32)
    cache = raw.view(5, 2, 64, 8)
    bytes_ = rows(cache, 5)
    assert bytes_.shape == (5, 2 * 64 * 8 * 4)
    assert bytes_.data_ptr() == raw.data_ptr()
    bytes_[3] = 0
    assert float(cache[3].abs().sum()) == 0
    assert float(cache[4].abs().sum()) > 0
    assert arrangement(cache) == [0, 1, 2, 64]


def test_rows_of_other_arrangements() -> None:
    raw = torch.zeros(4 * 3 * 2 * 64 * 8)
    tokens_first = raw.view(12, 64, 2, 8).permute(0, 2, 1, 3)
    assert rows(tokens_first, 12).shape == (12, 2 * 64 * 8 * 4)
    assert arrangement(tokens_first) == [1, 0, 2, 64]
    kernel_blocks = raw.view(48, 2, 16, 8)
    assert rows(kernel_blocks, 12).shape == (12, 2 * 64 * 8 * 4)
    layers_inside = raw.view(4, 3, 2, 64, 8)[:, 1]
    assert rows(layers_inside, 4).shape == (4, 2 * 64 * 8 * 4)
    heads_outside = raw.view(2, 12, 64, 8).permute(1, 0, 2, 3)
    with pytest.raises(ValueError, match="not one run of bytes"):
        rows(heads_outside, 12)


def test_devices_that_are_not_known() -> None:
    part = worker_part(grouped(2), None, 3, LAYOUT.layer_block_bytes[0], 0, 1)
    assert type(copies_for(part, [torch.zeros(1)])) is Copies
    with pytest.raises(ValueError, match="meta device"):
        copies_for(part, [torch.zeros(1, device="meta")])


def test_layers_are_in_the_order_in_which_they_run() -> None:
    names = [f"model.layers.{layer}.self_attn.attn" for layer in (10, 2, 1)]
    assert layer_names(dict.fromkeys(names)) == names[::-1]
