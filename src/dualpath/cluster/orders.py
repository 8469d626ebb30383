"""Orders of the operator to engines, beside requests: other weights, device memory given back and taken again."""

import msgspec


class OrderDone(msgspec.Struct, frozen=True, tag=True):
    """An engine's answer to an order. `error` says why it was not carried out."""

    order: int
    error: str = ""
    fingerprint: str = ""
    """Of the weights read."""


class ReadWeights(msgspec.Struct, frozen=True, tag=True):
    """Read the checkpoint `path` into host memory and check that it fits; what is served does not change."""

    order: int
    path: str


class UseWeights(msgspec.Struct, frozen=True, tag=True):
    """Copy the weights that were read over the served ones. Nothing is in flight."""

    order: int


class DropWeights(msgspec.Struct, frozen=True, tag=True):
    """Forget the weights that were read: another engine could not read them."""

    order: int


class ReleaseMemory(msgspec.Struct, frozen=True, tag=True):
    """Give device memory back: KV, weights, or both. Nothing is in flight. `keep`: weights stay in host memory."""

    order: int
    weights: bool
    kv: bool
    keep: bool


class RestoreMemory(msgspec.Struct, frozen=True, tag=True):
    """Take device memory again; weights that were not kept are read from `path`."""

    order: int
    weights: bool
    kv: bool
    path: str


EngineOrder = ReadWeights | UseWeights | DropWeights | ReleaseMemory | RestoreMemory
