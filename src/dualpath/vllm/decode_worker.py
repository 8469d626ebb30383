"""A decode engine's worker: pages into device blocks before a sequence decodes, full blocks into pages as it does.

The agent's calls about a sequence are answered in order. vLLM's thread calls the hooks of a step; the link's thread
calls `handle` and `detached`; one thread of its own copies beside vLLM's steps, into device blocks that wait for a load
and out of those of ended requests. Device blocks of a request that runs are copied only at the start of a step, before
anything of that step can overwrite what a preemption has given away.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor

import msgspec

from dualpath.cluster.attachment import Admit, Begin, CopyOut, Fill, Owner, Release, Reply, Stop
from dualpath.cluster.vllm_attachment import Generated
from dualpath.transfer.pool import MappedPages
from dualpath.vllm.copies import Copies
from dualpath.vllm.device_sequence import DeviceSequence, Stage
from dualpath.vllm.recent import Recent
from dualpath.vllm.sequence_copies import SequenceCall, carry_out
from dualpath.vllm.steps import DecodeStep, End, Load

_log = logging.getLogger("vllm.dualpath")


class DecodeWorker:
    """What a worker of a decode engine does in vLLM's steps and for its agent."""

    def __init__(
        self,
        copies: Copies,
        say: Callable[[msgspec.Struct], None],
        thread: Executor,
        *,
        tells: bool = True,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`say` sends to the agent, from any thread, and raises nothing. `tells`: it says what was generated."""
        self._copies, self._say, self._thread = copies, say, thread
        self._tells, self._now_s = tells, now_s
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._pages: MappedPages | None = None
        self._by_owner: dict[Owner, DeviceSequence] = {}
        self._by_sequence: dict[int, DeviceSequence] = {}
        self._alone: dict[Owner, str] = {}
        """Owners whose requests vLLM computes without us, until it has ended them."""
        self._stopped: Recent[Owner] = Recent(now_s)
        """By their agent, before vLLM had their requests."""
        self._declined: Recent[Owner] = Recent(now_s)
        """By vLLM."""
        self._received: set[str] = set()
        self._sent: set[str] = set()
        self._errors: set[int] = set()

    # ── from the agent ──────────────────────────────────────────────────────────────────────────────────────────────

    def attached(self, pages: MappedPages) -> None:
        with self._lock:
            self._pages = pages

    def detached(self) -> None:
        """The agent is gone, and its pages with it. Returns once nothing touches them."""
        with self._idle:
            for sequence in list(self._by_owner.values()):
                self._fail(sequence, "its agent is gone")
            while any(sequence.busy for sequence in self._by_owner.values()):
                self._idle.wait()  # for a copy of ours, which ends by itself
            self._by_sequence.clear()
            self._pages = None

    def handle(self, message: msgspec.Struct) -> None:
        with self._lock:
            match message:
                case Stop():
                    sequence = self._by_sequence.get(message.sequence)
                    if sequence is not None and sequence.stage in (Stage.ASKED, Stage.LOADING):
                        self._fail(sequence, "its agent has stopped it")
                case Admit():
                    self._admit(message)
                case Fill() | Begin() | CopyOut() | Release():
                    self._call(message)

    def _admit(self, call: Admit) -> None:
        sequence = self._by_owner.get(call.owner)
        refused = call.owner in self._alone or call.owner in self._declined
        self._stopped.discard(call.owner)
        if refused or (sequence is not None and sequence.stage is not Stage.WAITING):
            self._say(Reply(call.call, error=f"vLLM does not wait for attempt {call.owner} any more"))
            return
        if sequence is None:
            sequence = self._by_owner[call.owner] = DeviceSequence(call.owner)
        sequence.number, sequence.heard_s = call.sequence, self._now_s()
        self._by_sequence[call.sequence] = sequence
        sequence.calls.append(call)
        sequence.stage = Stage.LOADING if sequence.request_id else Stage.ASKED
        self._thread.submit(self._work, sequence)

    def _call(self, call: Fill | Begin | CopyOut | Release) -> None:
        sequence = self._by_sequence.get(call.sequence)
        if sequence is None:
            gone = "" if isinstance(call, Release) else f"there is no sequence {call.sequence} here any more"
            self._say(Reply(call.call, error=gone))
            return
        sequence.heard_s = self._now_s()
        if isinstance(call, Release) and sequence.stage in (Stage.ASKED, Stage.LOADING):
            self._fail(sequence, "its agent has released it")
        sequence.calls.append(call)
        self._thread.submit(self._work, sequence)

    # ── the copying thread ──────────────────────────────────────────────────────────────────────────────────────────

    def _work(self, sequence: DeviceSequence) -> None:
        """Carry out what can be, in order."""
        while True:
            with self._idle:
                call = sequence.next_call()
                if call is None:
                    return
                pages, sequence.busy = self._pages, True
            error = carry_out(self._copies, sequence, call, pages)
            with self._idle:
                sequence.busy = False
                self._answer(sequence, call, error)
                self._idle.notify_all()

    def _answer(self, sequence: DeviceSequence, call: SequenceCall, error: str) -> None:
        if sequence.stage is Stage.FAILED and not isinstance(call, Release):
            error = error or sequence.why
        elif isinstance(call, Begin) and not error:
            sequence.stage = Stage.RUNNING
            self._received.add(sequence.request_id)
        self._say(Reply(call.call, error=error))
        if isinstance(call, Release):
            self._release(sequence)
        elif sequence.stage is Stage.FAILED:
            self._settle_failed(sequence)

    def _release(self, sequence: DeviceSequence) -> None:
        """Its device blocks go when vLLM has ended it too."""
        self._by_sequence.pop(sequence.number, None)
        if sequence.stage is Stage.HELD:
            self._sent.add(sequence.request_id)
        self._forget(sequence)

    def _forget(self, sequence: DeviceSequence) -> None:
        self._by_sequence.pop(sequence.number, None)
        if self._by_owner.get(sequence.owner) is sequence:
            del self._by_owner[sequence.owner]
        if sequence.request_id and not sequence.ended:
            self._alone[sequence.owner] = sequence.request_id
        elif not sequence.request_id:
            self._stopped.add(sequence.owner)

    # ── failing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fail(self, sequence: DeviceSequence, why: str, *, cancelled: bool = False) -> None:
        """Answer its calls with an error; give its device blocks back, or have vLLM compute them.

        `cancelled`: vLLM wants nothing of it any more. What is being copied now ends first.
        """
        if sequence.stage is Stage.FAILED:
            return
        sequence.why, sequence.failed_at, sequence.stage = why, sequence.stage, Stage.FAILED
        sequence.cancelled = cancelled
        if sequence.failed_at is not Stage.RUNNING and not cancelled:
            _log.warning("attempt %s fails here: %s", sequence.owner, why)
        if not sequence.busy:
            self._settle_failed(sequence)

    def _settle_failed(self, sequence: DeviceSequence) -> None:
        """A failed sequence is touched no more: tell vLLM and the agent."""
        for call in sequence.calls:
            self._say(Reply(call.call, error="" if isinstance(call, Release) else sequence.why))
        sequence.calls.clear()
        if sequence.failed_at in (Stage.WAITING, Stage.LOADING):
            if not sequence.cancelled:
                self._errors.update(sequence.loaded_blocks(self._copies.part.block_size))
            self._received.add(sequence.request_id)
        elif sequence.failed_at is Stage.HELD:
            self._sent.add(sequence.request_id)
        self._forget(sequence)

    # ── a step of vLLM ──────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, step: DecodeStep) -> None:
        """A step begins; nothing of it has been written."""
        with self._lock:
            for owner in step.preempted:
                sequence = self._by_owner.get(owner)
                if sequence is not None:
                    self._copy_running(sequence)
                    sequence.device_blocks, sequence.computed_tokens = [], 0
            for owner, first, blocks in step.grown:
                sequence = self._by_owner.get(owner)
                if sequence is not None and sequence.stage is Stage.RUNNING:
                    sequence.device_blocks[first:] = blocks
            for progress in step.progress:
                self._progress(progress.owner, progress.computed_tokens, progress.token_ids, None)
            for end in step.ended:
                self._end(end)
            for owner in step.declined:
                self._decline(owner)
            for sequence in list(self._by_owner.values()):
                self._copy_running(sequence)

    def _progress(self, owner: Owner, computed_tokens: int, token_ids: list[int], reason: str | None) -> None:
        sequence = self._by_owner.get(owner)
        if sequence is None or sequence.stage is not Stage.RUNNING:
            return
        sequence.computed_tokens = computed_tokens
        if self._tells and (token_ids or reason is not None):
            self._say(Generated(sequence.number, token_ids, reason))

    def _end(self, end: End) -> None:
        sequence = self._by_owner.get(end.owner)
        if self._alone.get(end.owner) == end.request_id:
            del self._alone[end.owner]
        if sequence is not None and sequence.request_id == end.request_id:
            sequence.ended = True
        if sequence is None or sequence.request_id != end.request_id:
            if end.held:
                self._sent.add(end.request_id)
        elif not end.held:
            self._progress(end.owner, 0, [], end.reason)  # begun here, while vLLM took it to load still
            self._fail(sequence, f"vLLM has ended it: {end.reason}", cancelled=True)
        elif sequence.stage is Stage.RUNNING:
            self._progress(end.owner, end.computed_tokens, end.token_ids, end.reason)
            sequence.device_blocks, sequence.stage = end.device_blocks, Stage.HELD
            sequence.heard_s = self._now_s()
            self._thread.submit(self._work, sequence)
        else:  # it has failed, and what is being copied now ends first
            sequence.failed_at = Stage.HELD

    def _decline(self, owner: Owner) -> None:
        sequence = self._by_owner.get(owner)
        if sequence is None:
            self._declined.add(owner)
        elif sequence.stage is Stage.ASKED:
            self._fail(sequence, "vLLM takes nothing from it")

    def _copy_running(self, sequence: DeviceSequence) -> None:
        """Copy out what was asked for of a sequence that runs, as far as it is complete."""
        while sequence.stage is Stage.RUNNING and not sequence.busy and sequence.can_copy(self._copies.part.ratio):
            call = sequence.calls.popleft()
            self._copies.follow()
            error = carry_out(self._copies, sequence, call, self._pages)
            self._say(Reply(call.call, error=error))

    def load(self, step: DecodeStep) -> None:
        """vLLM has readied the device blocks of these prompts, and leaves them alone until they are received."""
        if not step.loads:
            return
        with self._lock:
            self._copies.follow()
            for load in step.loads:
                self._load(load)

    def _load(self, load: Load) -> None:
        known = self._by_owner.get(load.owner)
        asked = known is not None and known.stage is Stage.ASKED
        sequence = known or DeviceSequence(load.owner)
        sequence.request_id, sequence.heard_s = load.request_id, self._now_s()
        sequence.device_blocks, sequence.local_tokens = list(load.device_blocks), load.local_tokens
        sequence.stage = Stage.LOADING if asked else Stage.WAITING
        self._by_owner[load.owner] = sequence
        if self._pages is None or load.owner in self._stopped:
            self._fail(sequence, "no agent is here" if self._pages is None else "its agent has given it up")
        elif asked:
            self._thread.submit(self._work, sequence)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Returns requests whose device blocks may be freed, and those whose load has ended."""
        with self._lock:
            for sequence in list(self._by_owner.values()):
                if sequence.expired(self._now_s()):
                    self._fail(sequence, "its agent was silent for too long")
            sent, self._sent = self._sent, set()
            received, self._received = self._received, set()
            return sent, received

    def take_errors(self) -> set[int]:
        """Returns the device blocks that could not be loaded; to be called after `take_finished` in the same step."""
        with self._lock:
            errors, self._errors = self._errors, set()
            return errors
