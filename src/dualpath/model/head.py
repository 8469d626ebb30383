"""A model's own output head, alone: with whatever the model does to its logits, a cap or a scale."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast


@torch.inference_mode()
def logits_of(network: Any, hidden: Tensor) -> Tensor:
    """Returns the logits ``[n, vocab]`` of a causal language model's last hidden states ``[n, width]``.

    It is the model's own `forward`, of a copy as far as the names of its parts go, whose decoder returns `hidden`.
    Nothing is kept: weights, and the network itself, may be others the next time.
    """
    decoder = network.get_decoder()
    alone = copy.copy(network)
    given = _Given(MoeModelOutputWithPast(last_hidden_state=hidden[None]))
    alone._modules = {name: given if part is decoder else part for name, part in network._modules.items()}
    logits: Tensor = alone(input_ids=None).logits[0]
    return logits


class _Given(torch.nn.Module):
    """Stands in for a decoder."""

    def __init__(self, output: MoeModelOutputWithPast) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast:
        return self._output
