"""How a worker's KV lies on its device: rows of bytes over vLLM's memory, and its part of a Layer Block."""

from collections.abc import Mapping
from typing import Any

import torch

from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.kv.layout import KVLayout, KVPart
from dualpath.vllm.copies import WorkerPart


def layer_names(kv_caches: Mapping[str, Any]) -> list[str]:
    """Returns the names of a model's layers in the order in which they run."""
    return sorted(kv_caches, key=lambda name: [int(word) for word in name.split(".") if word.isdigit()])


def rows(cache: torch.Tensor, blocks: int) -> torch.Tensor:
    """Returns a layer's KV as one row of bytes for each device block, over the same memory.

    Raises ValueError when a device block is not one run of bytes.
    """
    pieces = cache.shape[0] // blocks
    inner = sorted(zip(cache.stride()[1:], cache.shape[1:], strict=True))
    expected = 1
    for stride, size in inner:
        if size > 1 and stride != expected:
            raise ValueError(_not_one_run(cache))
        expected *= size
    if pieces > 1 and cache.stride(0) != expected:
        raise ValueError(_not_one_run(cache))
    n_elements = expected * pieces
    flat = cache.as_strided((blocks, n_elements), (cache.stride(0) * pieces, 1), cache.storage_offset())
    return flat.view(torch.uint8)


def _not_one_run(cache: torch.Tensor) -> str:
    return (
        f"a device block of shape {tuple(cache.shape[1:])} and strides {cache.stride()} is not one run of bytes; "
        "unset VLLM_KV_CACHE_LAYOUT"
    )


def arrangement(cache: torch.Tensor) -> list[int]:
    """Returns the order of a device block's dimensions in memory, and the tokens of its innermost blocks."""
    strides = cache.stride()[1:]
    return [*sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim)), cache.shape[2]]


def worker_part(spec: Any, config: Any, layers: int, device_block_bytes: int, rank: int, ranks: int) -> WorkerPart:
    """Returns where a rank's bytes are in a Layer Block. Raises ValueError when the sizes do not add up.

    `spec` is vLLM's ``AttentionSpec`` of a rank, `config` the model's Hugging Face configuration.
    """
    replicated = type(spec).__name__ == "MLAAttentionSpec"
    if replicated:
        rope = config.qk_rope_head_dim
        parts = (KVPart("latent", 1, spec.head_size - rope), KVPart("rope", 1, rope))
    else:
        heads = spec.num_kv_heads * ranks
        parts = (KVPart("k", heads, spec.head_size), KVPart("v", heads, spec.head_size_v))
    layout = KVLayout.alike(layers, parts, str(spec.dtype).removeprefix("torch."), BLOCK_TOKENS)
    share = layout.layer_block_bytes[0] // (1 if replicated else ranks)
    if share != device_block_bytes * (BLOCK_TOKENS // spec.block_size):
        raise ValueError(
            f"a device block of {spec.block_size} tokens has {device_block_bytes} bytes in a layer at this rank, but "
            f"{[part.name for part in parts]} of {BLOCK_TOKENS} tokens have {share}: padded KV is not supported"
        )
    return WorkerPart(
        layout, spec.block_size, device_block_bytes, 0 if replicated else rank * share, not replicated or rank == 0
    )
