"""The scheduler's state as numbers, for metrics and for people."""

import msgspec

from dualpath.core.counts import GAUGES
from dualpath.core.lifecycle import Lifecycle
from dualpath.core.vocabulary import EngineId, Role


class EngineLoad(msgspec.Struct, frozen=True, gc=False):
    """One engine as the scheduler sees it. `seq` and `tok_tokens` are the paper's seq_e and tok_e (§6.1)."""

    seq: int
    tok_tokens: int
    read_queue_tokens: int
    """Read queue of the engine's node."""
    buffer_held_blocks: int
    """Held blocks, draining ones included."""
    buffer_free_blocks: int
    hbm_promised_blocks: int
    hbm_free_blocks: int
    buffer_line_requests: int
    """Attempts waiting for this engine's buffer."""


def load_of(life: Lifecycle, engine: EngineId) -> EngineLoad:
    """See `Scheduler.load_of`."""
    facts = life.fleet.facts[engine]
    columns = life.fleet.prefill if facts.role is Role.PREFILL else life.fleet.decode
    slot = columns.slots[engine]
    account = life.ledger.accounts[engine]
    return EngineLoad(
        seq=int(columns.seq[slot]),
        tok_tokens=int(columns.tok[slot]),
        read_queue_tokens=life.fleet.read_queue_tokens(engine),
        buffer_held_blocks=facts.buffer_blocks - account.buffer_free_blocks,
        buffer_free_blocks=account.buffer_free_blocks,
        hbm_promised_blocks=facts.hbm_blocks - account.hbm_free_blocks,
        hbm_free_blocks=account.hbm_free_blocks,
        buffer_line_requests=len(account.line),
    )


def statistics(life: Lifecycle) -> dict[str, int]:
    """See `Scheduler.statistics`."""
    gauges = dict.fromkeys(GAUGES, 0)
    for request in life.requests.values():
        gauges[f"requests_{request.state.value}"] += 1
    draining = [holding for holding in life.ledger.holdings() if holding.draining]
    gauges["draining_buffer_blocks"] = sum(holding.buffer_blocks for holding in draining)
    gauges["draining_hbm_blocks"] = sum(holding.hbm_blocks for holding in draining)
    gauges["overdue_releases"] = len(life.aborts.overdue)
    return life.counts | gauges
