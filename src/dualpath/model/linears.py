"""Linear layers of a network on a CPU, with their weights in the order that oneDNN's matrix products read.

A product of few rows spends most of its time on arranging the weight; here that happens once. It takes as much memory
as the weight, which stays as it is for whoever reads or replaces it. So it is not done where weights are a large part
of the available memory: a model that fits must still fit.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROWS = 512
"""Rows of input that the order is chosen for: as good for one row as any, and better than others for many."""
MOST_OF_AVAILABLE = 8
"""Weights are packed up to this part of the available memory: several engines of a host do the same."""


def pack_linears(network: Any, available_bytes: int | None = None) -> Any:
    """Make the plain linear layers of `network` `PackedLinear`, if there is room. Returns `network`."""
    linears = [module for module in network.modules() if type(module) is torch.nn.Linear]
    available = _available_bytes() if available_bytes is None else available_bytes
    packed_bytes = sum(module.weight.nbytes for module in linears if module.weight.dtype == torch.float32)
    if torch.backends.mkldnn.is_available() and packed_bytes * MOST_OF_AVAILABLE <= available:  # type: ignore[no-untyped-call]
        for module in linears:
            module.__class__ = PackedLinear
    return network


def _available_bytes() -> int:
    """Returns the memory that this process may still take: the host's, or its container's if that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or no limit
        return available
    return min(available, left)


class PackedLinear(torch.nn.Linear):
    """A linear layer that packs its weight when it is first used, and again when the weight has changed.

    For float32 on a CPU, and weights that PyTorch counts the changes of; others are used as they are.
    """

    _packed: Tensor | None = None
    _packed_of: tuple[Tensor | None, int] = (None, 0)
    """The weight, and its count of changes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name is torch's
        weight = self._parameters["weight"]
        assert weight is not None
        seen, version = self._packed_of
        if weight is not seen or (self._packed is not None and weight._version != version):
            self._pack(weight)
        if self._packed is None or input.numel() == self.in_features:
            return super().forward(input)  # one row reads the weight once, in whatever order
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            input, self._packed, self._parameters["bias"], "none", [], ""
        )
        return out

    def _pack(self, weight: Tensor) -> None:
        fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.is_inference()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS) if fits else None
        self._packed_of = (weight, weight._version if fits else 0)
