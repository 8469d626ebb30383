"""Which PE prefills and which DE decodes: the paper's adaptive request scheduling (§6.1), and round robin.

PE choice, for the head of the one global FIFO. The constants alpha and beta divide the engines into three classes:

    tok_e > beta                     gets no requests
    tok_e <= beta, read_q > alpha    chosen only when the class below is empty
    tok_e <= beta, read_q <= alpha   preferred

The engine with the smallest `tok_e` of its class is chosen. If there is none, the line waits until something finishes.

DE choice, in two phases. (1) Every request goes to the group with the smallest total of tokens. The total includes the
group's private queue; without it, all requests of one fetch would go to one group. (2) In the group, `R` is the longest
prefix of the queue that fits the group's free HBM, fragmentation ignored, and

    Z = 1.05 * (sum of len over R + sum of tok_e) / |E|

An engine is *high* for a request if ``tok_e + len > Z``. Among the engines with enough free HBM, the choice is the
not-high one with the smallest `seq_e`, else the high one with the smallest `tok_e`. If none has, the queue waits.
Placing the head moves its length from the first sum to the second, so Z stays the same for a whole pass.

All functions are pure: they read the columns, which must not be empty, and return an engine or None. Ties go to the
smallest id. The waiting room (`waiting`, read it next) asks a `Placement`: `TwoLevels`, which is the paper's, or
`RoundRobin`. To add one, subclass the first or write a class like the second; name it in `PLACEMENTS` and in a system.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from dualpath.core.engines import Column, DecodeEngines, DecodeGroup, PrefillEngines
from dualpath.core.policy import Constants
from dualpath.core.request import Request
from dualpath.core.vocabulary import EngineFacts, EngineId, GroupId
from dualpath.spec.registry import Registry

_NEVER = np.iinfo(np.int64).max


def _argmin_where(mask: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]", values: Column) -> int | None:
    """Returns the first slot with the smallest value where `mask` is True; None when it is True nowhere."""
    masked = np.where(mask, values, _NEVER)
    slot = int(masked.argmin())
    return slot if mask[slot] else None


def choose_prefill_engine(engines: PrefillEngines, constants: Constants, buffer_blocks: int) -> EngineId | None:
    """The PE choice of §6.1. The buffer's capacity must be at least `buffer_blocks`. Returns None when no PE fits."""
    least = int(engines.tok.argmin())
    if engines.tok_at[least] > constants.beta_tokens:
        return None  # the least loaded is above beta, hence all are
    facts = engines.facts[least]
    if engines.read_queue_at(least) <= constants.alpha_tokens and facts.buffer_blocks >= buffer_blocks:
        return facts.engine  # the least loaded is in the preferred class, hence the least loaded there
    takes = engines.tok <= constants.beta_tokens
    if buffer_blocks > engines.smallest_buffer_blocks:
        takes &= engines.buffer_capacity >= buffer_blocks
    slot = _argmin_where(takes & (engines.read_queue <= constants.alpha_tokens), engines.tok)
    if slot is None:
        slot = _argmin_where(takes, engines.tok)
    return None if slot is None else engines.facts[slot].engine


def next_prefill_engine(engines: PrefillEngines, last: EngineId | None, buffer_blocks: int) -> EngineId | None:
    """Round robin: the first PE after `last`, by id, with a buffer capacity of `buffer_blocks` or more; else None."""
    start = 0 if last is None else bisect_right(engines.facts, last, key=lambda facts: facts.engine)
    for offset in range(len(engines)):
        facts = engines.facts[(start + offset) % len(engines)]
        if facts.buffer_blocks >= buffer_blocks:
            return facts.engine
    return None


def choose_group(engines: DecodeEngines, buffer_blocks: int, hbm_blocks: int) -> GroupId:
    """Phase 1: the group with the smallest load among those with an engine that could ever hold the request.

    The caller has checked with `Fleet.refusal` that there is one.
    """
    load = engines.group_load
    if buffer_blocks > engines.smallest_buffer_blocks or hbm_blocks > engines.smallest_hbm_blocks:
        fits = (engines.buffer_capacity >= buffer_blocks) & (engines.hbm_capacity >= hbm_blocks)
        groups = {facts.group for facts, possible in zip(engines.facts, fits, strict=True) if possible}
        load = np.where([group in groups for group in engines.group_ids], load, _NEVER)
    return engines.group_ids[int(load.argmin())]


def z_tokens(group: DecodeGroup, queue: Iterable[Request], z_factor: float) -> float:
    """Phase 2's Z in tokens; `queue` is the group's private queue, from the head."""
    free_blocks = group.hbm_free_total
    fitting_tokens = 0
    for request in queue:
        free_blocks -= request.hbm_blocks
        if free_blocks < 0:
            break
        fitting_tokens += request.facts.prompt_tokens
    return z_factor * (fitting_tokens + group.tok_total) / len(group.facts)


def choose_decode_engine(
    group: DecodeGroup, prompt_tokens: int, z: float, buffer_blocks: int, hbm_blocks: int
) -> EngineId | None:
    """Phase 2: the engine for a request of `prompt_tokens` at the head of the group's queue; None when none fits."""
    low_tokens = z - prompt_tokens
    least = int(group.seq.argmin())
    if (
        group.hbm_free_at[least] >= hbm_blocks
        and buffer_blocks <= group.facts[least].buffer_blocks
        and group.tok_at[least] <= low_tokens
    ):
        return group.facts[least].engine  # the smallest seq of all is not high, hence the smallest of the not-high
    fits = group.hbm_free >= hbm_blocks
    if buffer_blocks > group.smallest_buffer_blocks:
        fits &= group.buffer_capacity >= buffer_blocks
    if not fits[fits.argmax()]:  # any(), without its wrapper in Python
        return None
    slot = _argmin_where(fits & (group.tok <= low_tokens), group.seq)
    if slot is None:
        slot = _argmin_where(fits, group.tok)
        assert slot is not None  # some fit
    return group.facts[slot].engine


def next_decode_engine(
    engines: DecodeEngines, last: EngineFacts | None, buffer_blocks: int, hbm_blocks: int
) -> EngineFacts | None:
    """Round robin: the first DE after `last`, by group, then id, with enough free HBM and buffer capacity."""
    fits = (engines.hbm_free >= hbm_blocks) & (engines.buffer_capacity >= buffer_blocks)
    start = 0
    if last is not None:
        start = bisect_right(engines.facts, (last.group, last.engine), key=lambda facts: (facts.group, facts.engine))
    for first, part in ((start, fits[start:]), (0, fits[:start])):
        if part.any():
            return engines.facts[first + int(part.argmax())]
    return None


class TwoLevels:
    """§6.1's placement: first a group, then an engine of the group. Override a method to change one choice."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants

    def prefill_engine(self, engines: PrefillEngines, buffer_blocks: int) -> EngineId | None:
        return choose_prefill_engine(engines, self._constants, buffer_blocks)

    def decode_group(self, engines: DecodeEngines, buffer_blocks: int, hbm_blocks: int) -> GroupId:
        """Phase 1: the group whose private queue the request joins."""
        return choose_group(engines, buffer_blocks, hbm_blocks)

    def z_tokens(self, group: DecodeGroup, queue: Iterable[Request]) -> float:
        """Phase 2's Z, computed once per pass over the group's queue."""
        return z_tokens(group, queue, self._constants.z_factor)

    def group_engine(
        self, group: DecodeGroup, prompt_tokens: int, z: float, buffer_blocks: int, hbm_blocks: int
    ) -> EngineId | None:
        """Phase 2: the engine for the head of the group's queue; None makes the queue wait."""
        return choose_decode_engine(group, prompt_tokens, z, buffer_blocks, hbm_blocks)


class OneLine(Protocol):
    """A placement without groups: one line for the DEs of the whole fleet, served from the head."""

    def __init__(self, constants: Constants) -> None: ...

    def prefill_engine(self, engines: PrefillEngines, buffer_blocks: int) -> EngineId | None:
        """The PE for the head of the line, with a buffer capacity of `buffer_blocks` or more; None makes it wait."""
        ...

    def decode_engine(
        self, engines: DecodeEngines, prompt_tokens: int, buffer_blocks: int, hbm_blocks: int
    ) -> EngineId | None:
        """The DE for the head of the line: `hbm_blocks` free, buffer capacity `buffer_blocks` or more. None: wait."""
        ...


class RoundRobin:
    """Each engine in turn. Implements `OneLine`."""

    def __init__(self, _constants: Constants) -> None:
        self._last_prefill: EngineId | None = None
        self._last_decode: EngineFacts | None = None

    def prefill_engine(self, engines: PrefillEngines, buffer_blocks: int) -> EngineId | None:
        engine = next_prefill_engine(engines, self._last_prefill, buffer_blocks)
        if engine is not None:
            self._last_prefill = engine
        return engine

    def decode_engine(
        self, engines: DecodeEngines, _prompt_tokens: int, buffer_blocks: int, hbm_blocks: int
    ) -> EngineId | None:
        facts = next_decode_engine(engines, self._last_decode, buffer_blocks, hbm_blocks)
        if facts is None:
            return None
        self._last_decode = facts
        return facts.engine


Placement = TwoLevels | OneLine

PLACEMENTS: Registry[Callable[[Constants], Placement]] = Registry(
    "placement", None, known={"paper": TwoLevels, "round_robin": RoundRobin}
)
"""Classes by name; each scheduler makes its own instance. They are deterministic; their only state is past choices."""
