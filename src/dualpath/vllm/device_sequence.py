"""`DeviceSequence`: what a decode engine's worker keeps of a sequence. Its stages::

ASKED (Admit came) ──vLLM has blocks──┐
WAITING (vLLM has blocks) ──Admit─────┴─> LOADING ──Begin──> RUNNING ──vLLM ends it──> HELD ──Release──> gone
any ──> FAILED ──what is being copied has ended──> gone
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from dualpath.cluster.attachment import Admit, Begin, CopyOut, Fill, Owner, Release
from dualpath.core.vocabulary import BLOCK_TOKENS

ADMIT_S = 10.0
"""How long vLLM's device blocks wait for an agent."""
LOAD_S = 60.0
"""How long they wait for the next call of a load."""
HOLD_S = 120.0
"""How long an ended request's device blocks wait for the next call."""


class Stage(Enum):
    """See the module."""

    ASKED = auto()
    WAITING = auto()
    LOADING = auto()
    RUNNING = auto()
    HELD = auto()
    FAILED = auto()


_PATIENCE_S = {Stage.WAITING: ADMIT_S, Stage.LOADING: LOAD_S, Stage.HELD: HOLD_S}


@dataclass(slots=True, eq=False)
class DeviceSequence:
    """Not for several threads at once."""

    owner: Owner
    number: int = -1
    """The agent's."""
    request_id: str = ""
    """vLLM's, once it has device blocks."""
    stage: Stage = Stage.ASKED
    device_blocks: list[int] = field(default_factory=list)
    local_tokens: int = 0
    computed_tokens: int = 0
    """Tokens whose KV is complete on the device."""
    heard_s: float = 0.0
    """When its agent last spoke of it."""
    calls: "deque[Admit | Fill | Begin | CopyOut | Release]" = field(default_factory=deque)
    """Not begun yet, in order."""
    busy: bool = False
    """A call is being carried out."""
    why: str = ""
    failed_at: Stage = Stage.ASKED
    cancelled: bool = False
    """vLLM wants nothing of a load any more."""
    ended: bool = False
    """vLLM has ended the request."""

    def next_call(self) -> "Admit | Fill | Begin | CopyOut | Release | None":
        """Takes the next call that may be carried out beside vLLM's steps."""
        if not self.calls or self.busy:
            return None
        call = self.calls[0]
        now = self.stage in (Stage.LOADING, Stage.HELD) or (self.stage is Stage.RUNNING and isinstance(call, Release))
        return self.calls.popleft() if now else None

    def can_copy(self, ratio: int) -> bool:
        """Whether its next call is for a block that is complete on the device."""
        if not self.calls or not isinstance(self.calls[0], CopyOut):
            return False
        blocks = self.calls[0].block + 1
        return self.computed_tokens >= blocks * BLOCK_TOKENS and len(self.device_blocks) >= blocks * ratio

    def loaded_blocks(self, block_size: int) -> list[int]:
        """Device blocks that a load was to fill."""
        return self.device_blocks[self.local_tokens // block_size :]

    def expired(self, now_s: float) -> bool:
        return now_s - self.heard_s > _PATIENCE_S.get(self.stage, float("inf"))
