"""What a model must hold to, for our attention to be its own: checked once, when it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualpath.model.attention import PackedPass, SelectingForm, UnsupportedModelError
from dualpath.model.rules import PLAIN, AttentionRules

_NEAR, _NEAR_IN_HALF = 0.03, 0.3
"""Of the largest value. Another order of heads differs by about the value itself; rounding was at most 2e-6 in float32
and 5e-3 in bfloat16 for the models that are made here, and grows with scores."""

FOREIGN_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model's code may raise where it finds our pass instead of a cache."""


class CheckedPass(PackedPass):
    """One sequence from its first token on; each layer's result is compared with plain attention over what the model
    itself passes on. Models that change keys or values after `update`, or mask by a rule of their own, are refused.
    """

    _passed: tuple[Tensor, Tensor]

    def update(self, first: Tensor, second: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        super().update(first, second, layer_idx)
        return first, second  # whole, so that a model with latents expands all of them

    def passed(self, module: Any, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> None:
        if attention_mask is not None and not isinstance(self._forms[module.layer_idx], SelectingForm):
            raise UnsupportedModelError(
                f"{type(module).__name__} makes a mask of its own, besides the causal one; it would be ignored here"
            )
        self._passed = key, value

    def attend(
        self, module: Any, query: Tensor, scale: float, rules: AttentionRules = PLAIN, selection: Any = None
    ) -> Tensor:
        out = super().attend(module, query, scale, rules, selection)
        if selection is not None and selection.top_k < query.shape[2]:
            return out  # not all tokens are seen, which plain attention can't show
        expected = _plain(query.float(), *self._passed, scale, rules)
        near = _NEAR if query.dtype == torch.float32 else _NEAR_IN_HALF
        if (out - expected).abs().max() > near * expected.abs().max():
            raise UnsupportedModelError(
                f"{type(module).__name__} attends to other keys and values than those it passes to its cache, or in "
                "another order of heads"
            )
        return out


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float, rules: AttentionRules) -> Tensor:
    """Causal attention by its definition: query ``[1, heads, n, dim]`` → ``[1, n, heads, value_dim]``, float32."""
    tokens = query.shape[2]
    key, value = (x.float().repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if rules.window_tokens is not None:
        visible = visible.triu(1 - rules.window_tokens)
    scores = scores.masked_fill(~visible, -torch.inf)
    if rules.sinks is not None:
        scores = torch.cat([scores, rules.sinks.float().view(1, -1, 1, 1).expand(1, -1, tokens, 1)], dim=-1)
    return (scores.softmax(-1)[..., :tokens] @ value).transpose(1, 2)


def not_through_the_seam(name: str, error: Exception) -> UnsupportedModelError:
    """Returns what an error that the code of model `name` raises in a pass says about it."""
    reason = str(error)
    if isinstance(error, AttributeError) and isinstance(error.obj, PackedPass):
        reason = f"it asks its cache for {error.name}, which has no one answer: many sequences share a pass"
    return UnsupportedModelError(f"{name} does not run through the packed-attention seam: {reason}")


def longest_context_tokens(config: Any) -> int:
    """Returns how many tokens a model takes. Raises UnsupportedModelError when its config does not say."""
    tokens = getattr(config, "max_position_embeddings", None)
    if not isinstance(tokens, int):
        raise UnsupportedModelError(f"{config.model_type}: its config.json does not say max_position_embeddings")
    return tokens


def head_alone(model: Any, packed: PackedPass) -> bool:
    """Whether a model's logits follow from its last hidden states, so that a prompt can be scored slice by slice.

    `packed` is a pass of two new tokens of the LoadedModel `model`. A cap hardly changes small logits, so they are made
    large.
    """
    try:
        hook = model.network.get_output_embeddings().register_forward_hook(_enlarged)
    except FOREIGN_ERRORS:
        return False
    try:
        whole = model.forward(packed, [0, 1], [0, 1], [1])
        alone = model.head(model.hidden(packed, [0, 1], [0, 1])[1:])
    except FOREIGN_ERRORS:
        return False
    finally:
        hook.remove()
    return torch.allclose(whole.float(), alone.float(), rtol=1e-3, atol=1e-3 * _LARGE_LOGIT)


_LARGE_LOGIT = 1000.0
"""Beyond any model's cap of its logits (30 in Gemma 2), within float16."""


def _enlarged(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """A hook that scales each row of a head's logits to a largest one of `_LARGE_LOGIT`."""
    del module, inputs
    return output * (_LARGE_LOGIT / output.abs().amax(-1, keepdim=True).clamp(min=1e-3))
