"""What an agent does for every prefill engine, whoever computes: it reads legs, keeps channels, aborts, gives back.

An attempt's pages can't be freed while it is `busy`: while blocks are read into them, or the engine or a transfer may
touch them. `AbortAttempt` may come at any point: what goes on ends soon, then the agent answers `Released`.
"""

import asyncio
from typing import Generic, TypeVar

from dualpath.cluster import messages as m
from dualpath.cluster.agent.data_channels import DataChannels
from dualpath.cluster.agent.host import ABANDON_POLL_S, EngineHost
from dualpath.cluster.agent.prefill_attempt import PrefillAttempt
from dualpath.cluster.attachment import Owner
from dualpath.core.vocabulary import Cause, Leg, Side
from dualpath.kv import StoreError
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures
from dualpath.transfer.transport import ChannelBusy, TransferError

TRANSFER_ERRORS = (TransferError, ChannelBusy, ConnectionError)
Attempt = TypeVar("Attempt", bound=PrefillAttempt)


class PrefillAttempts(Generic[Attempt]):
    """Handles the coordinator's messages to one prefill engine, on the agent's main thread. Subclasses compute."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self._attempts: dict[Owner, Attempt] = {}
        self._channels = DataChannels(host)
        host.gauge_sources.append(self._gauges)

    def _new(self, owner: Owner) -> Attempt:
        """Returns the record of an attempt."""
        raise NotImplementedError

    async def _prefill(self, attempt: Attempt, message: m.StartPrefill) -> None:
        """Compute the prompt. The attempt is busy until this says otherwise."""
        raise NotImplementedError

    def _interrupt(self, attempt: Attempt) -> None:
        """A busy attempt is aborted: it should be busy no longer than it must."""

    def handle(self, message: m.ToEngine) -> None:
        match message:
            case m.LoadLeg():
                attempt = self._hold((message.request, message.attempt), message.leg)
                self._host.spawn(self._load(attempt, message))
            case m.StartPrefill():
                self._start(message)
            case m.AbortAttempt():
                self._abort((message.request, message.attempt))
            case m.PeerJoined():
                self._host.spawn(self._meet(message))
            case m.PeerLost():
                self._host.spawn(self._channels.drop(message.data_address))
            case _:
                raise TypeError(f"a prefill engine was sent {type(message).__name__}")

    async def _meet(self, message: m.PeerJoined) -> None:
        """Connect to a new decode engine now: mapping its buffer is slow and would delay a first token."""
        error = await self._channels.open(message.data_address)
        if error is not None:
            self._host.log(f"can't connect to engine {message.engine}: {error}; its first prompt will try again")

    # ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hold(self, owner: Owner, leg: Leg) -> Attempt:
        """Record the attempt at once, not in the loading task, so that an abort right after finds it."""
        attempt = self._attempts[owner] = self._new(owner)
        attempt.leg = leg
        attempt.pages = self._host.pool.allocate(owner, leg.blocks)
        attempt.busy = True
        return attempt

    async def _load(self, attempt: Attempt, message: m.LoadLeg) -> None:
        faults: list[m.BlockFaultReport] | None = None
        try:
            faults = await self._host.blocks.read_leg(message, attempt.pages, lambda: attempt.aborted)
        except StoreError as error:
            self._host.log(f"request {message.request} can't be loaded: {error}")
        attempt.busy = False
        if attempt.aborted:
            self._release(attempt)
        elif faults is None or faults:
            self._host.send(m.LoadFailed(*attempt.owner, Side.PE, faults or []))
        else:
            self._host.send(m.Loaded(*attempt.owner, Side.PE))

    def _start(self, message: m.StartPrefill) -> None:
        owner = (message.request, message.attempt)
        attempt = self._attempts.get(owner)
        loads_here = any(leg.side is Side.PE for leg in message.legs)
        if loads_here != (attempt is not None) or (attempt is not None and (attempt.aborted or attempt.start)):
            self._host.counters[metrics.ENGINE_STALE_MESSAGES()] += 1
            return
        if attempt is None:
            attempt = self._attempts[owner] = self._new(owner)
        attempt.start = message
        attempt.busy = True
        self._host.spawn(self._prefill(attempt, message))

    def _fail(self, attempt: Attempt, error: Exception) -> None:
        """Stop the attempt; it keeps its pages until it is aborted."""
        cause = Cause.TRANSFER_FAILED if isinstance(error, TRANSFER_ERRORS) else Cause.COMPUTE_FAILED
        self._host.log(f"request {attempt.owner[0]} attempt {attempt.owner[1]} failed: {error!r}")
        self._host.send(m.AttemptFailed(*attempt.owner, cause, repr(error)))

    # ── giving back ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _abort(self, owner: Owner) -> None:
        attempt = self._attempts.get(owner)
        if attempt is None:
            self._host.send(m.Released(*owner))
            return
        attempt.aborted = True
        if attempt.busy:
            self._interrupt(attempt)
        else:
            self._release(attempt)

    async def abandon(self) -> None:
        """The coordinator is lost: abort every attempt, and disconnect from decode engines. Ends when all is free."""
        for owner in list(self._attempts):
            self._abort(owner)
        while self._attempts or self._owed:
            await asyncio.sleep(ABANDON_POLL_S)
        await self._channels.drop_all()

    @property
    def _owed(self) -> bool:
        """Whether the engine may still say something about attempts that are over."""
        return False

    def _release(self, attempt: Attempt) -> None:
        self._give_back(attempt)
        self._host.send(m.Released(*attempt.owner, attempt.quiet))

    def _give_back(self, attempt: Attempt) -> None:
        if attempt.pages:
            self._host.pool.free(attempt.owner, attempt.pages)
        del self._attempts[attempt.owner]

    def _gauges(self) -> Figures:
        return {metrics.ENGINE_ATTEMPTS(): float(len(self._attempts))}

    def close(self) -> None:
        """Blocks until transfers in progress have ended."""
        self._channels.close()
