"""Measures an attention layer on this machine: time against FLOPs, for the compute quota (paper §6.2)."""

import inspect
import time
from typing import Any

import numpy as np
import torch

from dualpath.model.attention import PackedPass
from dualpath.model.model import LoadedModel
from dualpath.model.spans import PackedSequence

_SHAPES = ((0, 16), (0, 128), (256, 64), (512, 128), (1024, 16), (1024, 64), (2048, 64), (2048, 128))
"""Measured batch items: (cached tokens, new tokens)."""
_BUDGET_S = 1.0


def profile_attention(model: LoadedModel) -> tuple[float, float]:
    """``(fixed_ns, ns_per_flop)`` of one attention layer, fitted to a few measured shapes (≲ 1 s).

    Time predicted for an item = fixed_ns + ns_per_flop × (new tokens × `attention_flops_per_token` + visible pairs ×
    `attention_flops_per_pair`). Least squares of the relative error, neither figure negative.
    """
    flops: list[float] = []
    times_ns: list[float] = []
    deadline_ns = time.perf_counter_ns() + int(_BUDGET_S * 1e9)
    for cached, new in _SHAPES:
        if cached + new > model.max_length_tokens or (len(flops) >= 2 and time.perf_counter_ns() > deadline_ns):
            continue
        pairs = new * cached + new * (new + 1) // 2
        flops.append(float(new * model.attention_flops_per_token + pairs * model.attention_flops_per_pair))
        times_ns.append(_measure_ns(model, cached, new, deadline_ns))
    if len(flops) < 2:
        raise ValueError(f"a model with a context of {model.max_length_tokens} tokens is too short to profile")
    return _fit(np.array(flops), np.array(times_ns))


def _fit(flops: np.ndarray[Any, Any], times_ns: np.ndarray[Any, Any]) -> tuple[float, float]:
    design = np.stack([np.ones_like(flops), flops], axis=1) / times_ns[:, None]
    (fixed_ns, ns_per_flop), *_ = np.linalg.lstsq(design, np.ones_like(flops), rcond=None)
    if fixed_ns < 0:
        fixed_ns, ns_per_flop = 0.0, float((flops / times_ns).sum() / ((flops / times_ns) ** 2).sum())
    if ns_per_flop <= 0:
        fixed_ns, ns_per_flop = 0.0, float(np.median(times_ns / flops))
    return float(fixed_ns), float(ns_per_flop)


class _OneLayer(PackedPass):
    """A chunk of one sequence, alone with the buffer of `layer`."""

    def __init__(self, model: LoadedModel, layer: int, cached: int, new: int) -> None:
        sequence = PackedSequence(first_query=0, new_tokens=new, past_tokens=cached, extents=((0, cached + new),))
        super().__init__(model.forms, (sequence,), torch.arange(cached, cached + new, device=model.device))
        self._buffer = torch.randn(cached + new, model.row_elements[layer], device=model.device).to(model.dtype)

    def layer_rows(self, layer: int) -> torch.Tensor:  # noqa: ARG002  the only one that runs
        return self._buffer


@torch.inference_mode()
def _measure_ns(model: LoadedModel, cached: int, new: int, deadline_ns: int) -> float:
    """Returns the shortest of up to five runs of one attention layer, after one warm-up run.

    The layer has full attention if any has: a window's layers would promise too short a time for the others.
    """
    decoder = model.network.get_decoder()
    hidden = torch.randn(1, new, model.network.config.hidden_size, device=model.device).to(model.dtype)
    positions = torch.arange(cached, cached + new, device=model.device)[None]
    types = getattr(model.network.config, "layer_types", None) or ("full_attention",)
    kind = "full_attention" if "full_attention" in types else types[0]
    layer = types.index(kind)
    attention = decoder.layers[layer].self_attn
    by_kind = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    embeddings = decoder.rotary_emb(hidden, positions, *([kind] if by_kind else []))
    packed = _OneLayer(model, layer, cached, new)
    shortest_ns = float("inf")
    for attempt in range(6):
        _synchronize(model)
        started_ns = time.perf_counter_ns()
        attention(
            hidden_states=hidden,
            position_embeddings=embeddings,
            attention_mask=model.layer_mask,
            past_key_values=packed,
            packed=packed,
        )
        _synchronize(model)
        ended_ns = time.perf_counter_ns()
        if attempt:
            shortest_ns = min(shortest_ns, ended_ns - started_ns)
            if ended_ns > deadline_ns:
                break
    return shortest_ns


def _synchronize(model: LoadedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
