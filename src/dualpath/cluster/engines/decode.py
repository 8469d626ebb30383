"""A decode engine's computing: device blocks filled from its agent's pages, steps for all joined sequences, copies out.

Calls about sequences are served in order on one copying thread, beside the compute thread's steps.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor

import torch

from dualpath.cluster import attachment as a
from dualpath.cluster.engines.constraining import REFUSALS, Constrainer
from dualpath.cluster.engines.drawing import as_draw
from dualpath.model import DeviceCopies, LoadedModel, PagedDecode, StepOutput
from dualpath.model.device_copies import nothing_held
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures
from dualpath.spec.sampling import SamplingParams
from dualpath.transfer.pool import BufferPool, Bytes, MappedPages

_WARMING = -1
"""The sequence of the first step; agents number theirs from 0."""


class DecodeCompute:
    """Continuous batching. `serve` is for the copying thread; steps run on `compute` while a sequence generates."""

    def __init__(
        self,
        model: LoadedModel,
        hbm_blocks: int,
        constrainer: Constrainer,
        compute: Executor,
        on_steps: Callable[[a.Steps], None],
        copies: DeviceCopies,
    ) -> None:
        self.hbm_blocks = hbm_blocks
        self._copies = copies
        self._engine = PagedDecode(model, hbm_blocks, copies)
        self._constrainer = constrainer
        self._compute = compute
        self._on_steps = on_steps
        self._sequences: set[int] = set()
        self._lock = threading.Lock()
        self._stepping = False
        self._more = False
        self._pages: MappedPages | None = None
        self._let_go_pages = nothing_held

    def attach(self, pool_path: str) -> None:
        """Copy from the pages of an agent's pool from now on, and to them."""
        self._pages = BufferPool.attach(pool_path)
        self._let_go_pages = self._copies.hold(torch.from_numpy(self._pages.memory))

    def warm_up(self) -> None:
        """Run a step on the calling thread before the first request."""
        self._engine.admit(_WARMING, 1, 0, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        self._engine.join(_WARMING)
        self._engine.step()
        self._engine.release(_WARMING)

    # ── calls ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def serve(self, call: a.Admit | a.Fill | a.Begin | a.CopyOut | a.Release) -> a.Reply:
        """Raises whatever the model raises for a call that can't be served."""
        match call:
            case a.Admit():
                assert call.first_token is not None
                self._engine.admit(
                    call.sequence,
                    call.prompt_tokens,
                    call.first_token,
                    call.sampling,
                    call.generated_tokens,
                    self._constrainer.take(call.owner),
                )
                self._sequences.add(call.sequence)
            case a.Fill():
                for block, page, tokens in call.blocks:
                    self._engine.fill_block(call.sequence, block, self._page(page), tokens)
            case a.Begin():
                reason = self._engine.join(call.sequence)
                self._step_on()
                return a.Reply(call.call, finish_reason=reason)
            case a.CopyOut():
                self._engine.copy_block(call.sequence, call.block, self._page(call.page))
            case a.Release():
                self._release(call.sequence)
        return a.Reply(call.call)

    def stop(self, sequence: int) -> None:
        """Generate nothing more for it; its blocks stay."""
        if sequence in self._sequences:
            self._engine.leave(sequence)

    def _page(self, page: int) -> Bytes:
        assert self._pages is not None
        return self._pages.view(page)

    def _release(self, sequence: int) -> None:
        if sequence in self._sequences:
            self._sequences.discard(sequence)
            self._engine.release(sequence)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _step_on(self) -> None:
        """Step, unless the compute thread does already: then it goes on."""
        with self._lock:
            self._more = True
            if self._stepping:
                return
            self._stepping = True
        self._compute.submit(self._step)

    def _step(self) -> None:
        """One step. The next one is queued behind what else waits for the compute thread."""
        with self._lock:
            self._more = False
        try:
            outputs = self._engine.step()
        except Exception as error:  # the batch failed: fail each of its sequences
            outputs = self._failed(error)
        if outputs:
            self._on_steps(a.Steps([_sequence_step(output) for output in outputs]))
        with self._lock:
            self._stepping = bool(outputs) or self._more
            if not self._stepping:
                return
        self._compute.submit(self._step)

    def _failed(self, error: Exception) -> list[StepOutput]:
        """Take all sequences out of the batch. Returns an error for each."""
        return [StepOutput(sequence, None, None, error) for sequence in self._engine.leave_all()]

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def release_memory(self) -> None:
        """On the compute thread, with nothing in hand."""
        self._engine.release_memory()

    def restore_memory(self) -> None:
        self._engine.restore_memory()

    def gauges(self) -> Figures:
        return {metrics.HBM_FREE_BLOCKS(): float(self._engine.free_blocks)}

    def detach(self) -> None:
        """The agent is gone, and with it every sequence. On the copying thread."""
        for sequence in list(self._sequences):
            self._release(sequence)
        self._let_go_pages()
        self._let_go_pages = nothing_held
        if self._pages is not None:
            self._pages.close()
            self._pages = None


def _sequence_step(output: StepOutput) -> a.SequenceStep:
    error = output.error
    return a.SequenceStep(
        sequence=output.sequence,
        draw=as_draw(output.draw),
        finish_reason=output.finish_reason,
        error="" if error is None else str(error) or repr(error),
        refused=isinstance(error, REFUSALS),
    )
