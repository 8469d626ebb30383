"""A model's own output head, alone: with whatever the model does to its logits, a cap or a scale."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast


class OutputHead:
    """The model's own `forward`, whose decoder returns the hidden states that it is given.

    Weights are the network's: it is copied as far as the names of its parts go.
    """

    def __init__(self, network: Any) -> None:
        self._decoder = _Given()
        self._network = copy.copy(network)
        self._network._modules = {
            name: self._decoder if module is network.get_decoder() else module
            for name, module in network._modules.items()
        }

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Returns the logits ``[n, vocab]`` of hidden states ``[n, width]``."""
        self._decoder.output = MoeModelOutputWithPast(last_hidden_state=hidden[None])
        try:
            logits: Tensor = self._network(input_ids=None).logits[0]
        finally:
            self._decoder.output = None
        return logits


class _Given(torch.nn.Module):
    output: MoeModelOutputWithPast | None = None

    def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast | None:
        return self.output
