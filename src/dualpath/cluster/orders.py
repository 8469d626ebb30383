"""Orders of the operator to engines, beside requests: other weights, device memory given back and taken again."""

import msgspec

from dualpath.spec.bounds import Count, Name, Text


class OrderDone(msgspec.Struct, frozen=True, tag=True):
    """An engine's answer to an order. `error` says why it was not carried out."""

    order: Count
    error: Text = ""
    fingerprint: Name = ""
    """Of the weights read."""


class ReadWeights(msgspec.Struct, frozen=True, tag=True):
    """Read the checkpoint `path` into host memory and check that it fits; what is served does not change."""

    order: Count
    path: Text


class UseWeights(msgspec.Struct, frozen=True, tag=True):
    """Copy the weights that were read over the served ones. Nothing is in flight."""

    order: Count


class DropWeights(msgspec.Struct, frozen=True, tag=True):
    """Forget the weights that were read: another engine could not read them."""

    order: Count


class ReleaseMemory(msgspec.Struct, frozen=True, tag=True):
    """Give device memory back: KV, weights, or both. Nothing is in flight. `keep`: weights stay in host memory."""

    order: Count
    weights: bool
    kv: bool
    keep: bool


class RestoreMemory(msgspec.Struct, frozen=True, tag=True):
    """Take device memory again; weights that were not kept are read from `path`."""

    order: Count
    weights: bool
    kv: bool
    path: Text


EngineOrder = ReadWeights | UseWeights | DropWeights | ReleaseMemory | RestoreMemory
