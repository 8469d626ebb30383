"""Linear layers of a network on a CPU, with their weights in the order that oneDNN's matrix products read.

A product of few rows spends most of its time on arranging the weight; here that happens once. It takes as much memory
as the weight, which stays as it is for whoever reads or replaces it.
"""

from typing import Any

import torch
from torch import Tensor

_ROWS = 512
"""Rows of input that the order is chosen for: as good for one row as any, and better than others for many."""


def pack_linears(network: Any) -> Any:
    """Make the plain linear layers of `network` `PackedLinear`. Returns `network`."""
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for module in network.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = PackedLinear
    return network


class PackedLinear(torch.nn.Linear):
    """A linear layer that packs its weight when it is first used, and again when the weight has changed.

    For float32 on a CPU, and weights that PyTorch counts the changes of; others are used as they are.
    """

    _packed: Tensor | None = None
    _packed_of: tuple[int, int] | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name is torch's
        weight = self.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.is_inference():
            return super().forward(input)
        state = (weight.data_ptr(), weight._version)
        if self._packed is None or self._packed_of != state:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
            self._packed_of = state
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")
        return out
