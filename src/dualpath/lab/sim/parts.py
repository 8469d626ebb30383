"""Makes the parts of a simulated cluster, fast or exact, and connects them to their driver."""

from collections.abc import Callable
from dataclasses import dataclass

from dualpath.core.batching import PrefillQueue
from dualpath.core.policy import Policy
from dualpath.core.vocabulary import BLOCK_TOKENS, RequestId, Role
from dualpath.lab.sim.decode import DecodePart
from dualpath.lab.sim.events import Action, Events
from dualpath.lab.sim.exact import ExactDecode, ExactFabric, ExactPrefill, ExactStorage
from dualpath.lab.sim.fabric import Fabric
from dualpath.lab.sim.machine import Machine
from dualpath.lab.sim.prefill import PrefillPart
from dualpath.lab.sim.storage import Storage
from dualpath.lab.sim.turns import LiveTurn


@dataclass(frozen=True)
class Hooks:
    """What the parts report to, and the turns they report about."""

    lives: dict[RequestId, LiveTurn]
    on_loaded: Action
    on_first_token: Callable[[LiveTurn], None]
    on_prefilled: Callable[[list[tuple[LiveTurn, int]]], None]
    on_decoded: Callable[[LiveTurn], None]


@dataclass(frozen=True)
class Parts:
    """One part of each kind."""

    storage: Storage
    fabric: Fabric
    prefill: PrefillPart
    decode: DecodePart | ExactDecode


def make_parts(
    machine: Machine,
    policy: Policy,
    events: Events,
    hooks: Hooks,
    *,
    exact: bool,
    window_ns: int,
) -> Parts:
    """Makes the parts with their groups of engines."""
    snics = (machine.snic_bytes_per_s, machine.read_latency_ns, hooks.on_loaded, window_ns)
    ends = (hooks.lives, hooks.on_first_token, hooks.on_prefilled, policy)
    parts: Parts
    if exact:
        fabric = ExactFabric(events, machine.cnic_bytes_per_s)
        parts = Parts(
            ExactStorage(events, *snics, block_bytes=machine.costs.kv_bytes_per_token * BLOCK_TOKENS),
            fabric,
            ExactPrefill(events, machine.costs, fabric, *ends),
            ExactDecode(events, machine.costs, hooks.on_decoded),
        )
    else:
        closed_form = Fabric(events, machine.cnic_bytes_per_s)
        prefill = PrefillPart(events, machine.costs, closed_form, *ends)
        decode = DecodePart(events, machine.costs, hooks.on_decoded)
        parts = Parts(Storage(events, *snics), closed_form, prefill, decode)
        if machine.full_speed_engines is not None:
            _share_cores(prefill, decode, machine.full_speed_engines)
    _add_groups(machine, policy, parts)
    return parts


def _share_cores(prefill: PrefillPart, decode: DecodePart, engines: float) -> None:
    """Stretches each step by computing engines over `engines` at its start, if there are more; it is not updated."""

    def stretch() -> float:
        return max(1.0, (prefill.busy_groups + decode.busy_groups) / engines)

    prefill.stretch = decode.stretch = stretch


def _add_groups(machine: Machine, policy: Policy, parts: Parts) -> None:
    """Adds engines that step together: a group with expert parallelism, otherwise each by itself."""
    limits = machine.batches
    kv_limit = limits.kv_tokens
    if kv_limit is None and not (policy.layerwise or policy.free_io):
        kv_limit = machine.prefill_kv_tokens
    for role in Role:
        groups: dict[int, list[int]] = {}
        for facts in machine.of_role(role):
            groups.setdefault(facts.group if machine.synchronised else facts.engine, []).append(facts.engine)
        for members in groups.values():
            if role is Role.DECODE:
                parts.decode.add_group(members)
            else:
                cost = machine.costs.attention
                parts.prefill.add_group(
                    {
                        engine: PrefillQueue(
                            cost, limits.quota_ns, max_batch_requests=limits.requests, max_batch_kv_tokens=kv_limit
                        )
                        for engine in members
                    }
                )
