"""Decode by continuous batching over paged KV: every step gives each joined sequence one token, in one packed forward.

Life of a sequence: `admit` takes device blocks for the prompt and all it may generate; `fill_block` copies the prompt's
KV in, Full Block by Full Block; `join` lets it take part from the next `step` on; `copy_block` copies a finished Full
Block out, for storage; `release` gives the blocks back. KV lies in one buffer per layer ``[blocks × 64, token_elems]``
with a block's rows as in its Layer Block, so both copies are plain.

Threads: one compute thread calls `step`; another may call everything else meanwhile. It touches only blocks that the
step in progress does not write: of a sequence that has not joined, or finished ones. Bookkeeping is under one lock;
`release` waits for the step in progress if the sequence takes part in it, and refuses while one of its blocks is being
copied.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import torch
from torch import Tensor

from dualpath.model.attention import PackedPass
from dualpath.model.model import LoadedModel
from dualpath.model.paged import BlockAllocator, Extent
from dualpath.model.sampling import TokenDraw, draw
from dualpath.model.spans import PackedSequence
from dualpath.spec.sampling import SamplingParams, finish_reason

Page = np.ndarray[tuple[int], np.dtype[np.uint8]]


class StepOutput(msgspec.Struct, frozen=True):
    """One sequence's share of a step: a token, or the error that ended it."""

    sequence: int
    draw: TokenDraw | None
    """None only where there is an `error`."""
    finish_reason: str | None
    """``"stop"``, ``"length"``, or None while more is to come. A finished or failed sequence has left the batch."""
    error: Exception | None = None


class PagedDecode:
    """A model and the device blocks its running sequences share. See the module for who may call what."""

    def __init__(self, model: LoadedModel, blocks: int) -> None:
        """`blocks`: Full Blocks of KV that device memory holds."""
        self.model = model
        layout = model.layout
        self._block_tokens = layout.block_tokens
        self._allocator = BlockAllocator(blocks)
        shape = (blocks * self._block_tokens, model.token_elems)
        # Zeroed, so that the host's pages exist: faults would otherwise slow the first requests down.
        self._pool = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(layout.layers)]
        self._sequences: dict[int, _Sequence] = {}
        self._lock = threading.Lock()
        self._stepped = threading.Condition(self._lock)
        self._stepping: set[int] = set()

    @property
    def free_blocks(self) -> int:
        with self._lock:
            return self._allocator.free_blocks

    def blocks_for(self, prompt_tokens: int, sampling: SamplingParams, generated_so_far: int = 0) -> int:
        """Blocks that `admit` will take."""
        longest = prompt_tokens + sampling.max_tokens - generated_so_far
        return -(-longest // self._block_tokens)

    def admit(
        self,
        sequence: int,
        prompt_tokens: int,
        first_token: int,
        sampling: SamplingParams,
        generated_so_far: int = 0,
    ) -> str | None:
        """Take blocks for a sequence whose prefill drew `first_token`; returns why that token ends it already, if so.

        `prompt_tokens` is the length of what was prefilled. `generated_so_far`: tokens of the request that are part of
        that prompt (a retried attempt). Raises OutOfBlocksError, and ValueError for lengths that make no sense.
        """
        longest = prompt_tokens + sampling.max_tokens - generated_so_far
        if prompt_tokens < 1 or generated_so_far < 0 or longest <= prompt_tokens:
            raise ValueError(f"sequence {sequence}: {prompt_tokens=}, {generated_so_far=}, {sampling.max_tokens=}")
        if longest > self.model.max_length_tokens + 1:
            raise ValueError(
                f"sequence {sequence} may reach {longest} tokens; the model takes {self.model.max_length_tokens}"
            )
        with self._lock:
            if sequence in self._sequences:
                raise ValueError(f"sequence {sequence} is admitted already")
            extents = self._allocator.take(self.blocks_for(prompt_tokens, sampling, generated_so_far))
            admitted = _Sequence(
                prompt_tokens, first_token, sampling, generated_so_far + 1, extents, self._block_tokens
            )
            self._sequences[sequence] = admitted
        return admitted.finished

    def fill_block(self, sequence: int, block_index: int, page: Page, tokens: int) -> None:
        """Copy the first `tokens` tokens of a Full Block `page` (uint8, full_block_bytes) into the sequence's block."""
        with self._copying(sequence) as filled:
            if filled.joined:
                raise ValueError(f"sequence {sequence} is decoding; its prompt can't be filled any more")
            first = block_index * self._block_tokens
            if not 0 <= first < first + tokens <= filled.prompt_tokens or tokens > self._block_tokens:
                raise ValueError(
                    f"sequence {sequence}: {tokens} tokens of block {block_index} are not in a prompt of "
                    f"{filled.prompt_tokens} tokens"
                )
            source = self._as_rows(page)
            row = filled.row(first)
            for layer, pool in enumerate(self._pool):
                pool[row : row + tokens].copy_(source[layer, :tokens])

    def join(self, sequence: int) -> str | None:
        """Decode the sequence from the next step on; its prompt's blocks must be filled.

        Returns why its first token has ended it already, if so: it is not decoded then, only released.
        """
        with self._lock:
            joining = self._find(sequence)
            joining.joined = True
            return joining.finished

    def step(self) -> list[StepOutput]:
        """One token for every joined sequence, in the order they were admitted; an empty list where there is none."""
        with self._lock:
            if self._stepping:
                raise RuntimeError("a step is in progress; only one thread may step")
            batch = {i: s for i, s in self._sequences.items() if s.joined and s.finished is None}
            self._stepping = set(batch)
        try:
            return self._step(batch) if batch else []
        finally:
            with self._lock:
                self._stepping = set()
                self._stepped.notify_all()

    def _step(self, batch: dict[int, "_Sequence"]) -> list[StepOutput]:
        members = list(batch.values())
        rows = [s.row(s.kv_tokens) for s in members]
        packed = _DecodePass(self.model, self._pool, [s.packed(i) for i, s in enumerate(members)], rows)
        ids, positions = [s.last_token for s in members], [s.kv_tokens for s in members]
        logits = self.model.forward(packed, ids, positions, list(range(len(members))))
        tokens = draw(logits, [s.sampling for s in members], [s.generated_tokens for s in members])
        with self._lock:
            return [_advance(i, s, token) for (i, s), token in zip(batch.items(), tokens, strict=True)]

    def full_blocks(self, sequence: int) -> int:
        """Full Blocks of the sequence that will not change any more: prompt + generated − 1 tokens have KV."""
        with self._lock:
            return self._find(sequence).kv_tokens // self._block_tokens

    def copy_block(self, sequence: int, block_index: int, out: Page) -> None:
        """Copy a finished Full Block of the sequence to host memory `out` (uint8, full_block_bytes)."""
        with self._copying(sequence) as copied:
            complete = copied.kv_tokens // self._block_tokens
            if not 0 <= block_index < complete:
                raise ValueError(f"sequence {sequence}: block {block_index} is not one of its {complete} Full Blocks")
            target = self._as_rows(out)
            row = copied.row(block_index * self._block_tokens)
            for layer, pool in enumerate(self._pool):
                target[layer].copy_(pool[row : row + self._block_tokens])

    def release(self, sequence: int) -> None:
        """Give the sequence's blocks back, finished or not. Raises KeyError if unknown, RuntimeError while copying."""
        with self._lock:
            self._find(sequence).joined = False
            self._stepped.wait_for(lambda: sequence not in self._stepping)
            leaving = self._find(sequence)
            if leaving.copies:
                raise RuntimeError(f"sequence {sequence}: {leaving.copies} copies of its blocks are under way")
            self._allocator.give_back(leaving.extents)
            del self._sequences[sequence]

    def _find(self, sequence: int) -> "_Sequence":
        if sequence not in self._sequences:
            raise KeyError(f"sequence {sequence} is not admitted here")
        return self._sequences[sequence]

    @contextmanager
    def _copying(self, sequence: int) -> Iterator["_Sequence"]:
        with self._lock:
            held = self._find(sequence)
            held.copies += 1
        try:
            yield held
        finally:
            with self._lock:
                held.copies -= 1

    def _as_rows(self, page: Page) -> Tensor:
        """A Full Block's bytes as ``[layers, 64, token_elems]``."""
        expected = self.model.layout.full_block_bytes
        if page.dtype != np.uint8 or page.nbytes != expected or not page.flags.c_contiguous:
            raise ValueError(f"a page is {expected} contiguous uint8 bytes, not {page.nbytes} bytes of {page.dtype}")
        rows = torch.from_numpy(page.reshape(-1)).view(self.model.dtype)
        return rows.view(self.model.layout.layers, self._block_tokens, self.model.token_elems)


class _Sequence:
    """What the engine knows of one sequence. Token t's KV is row ``row(t)`` of every layer's buffer."""

    def __init__(
        self,
        prompt_tokens: int,
        first_token: int,
        sampling: SamplingParams,
        generated_tokens: int,
        extents: tuple[Extent, ...],
        block_tokens: int,
    ) -> None:
        self.prompt_tokens, self.last_token, self.sampling = prompt_tokens, first_token, sampling
        self.generated_tokens = generated_tokens
        self.extents = extents
        self.kv_tokens = prompt_tokens
        self.joined = False
        self.copies = 0
        self.finished = finish_reason(sampling, first_token, generated_tokens)
        self._runs = [(e.first_block * block_tokens, e.blocks * block_tokens) for e in extents]

    def row(self, token: int) -> int:
        for first_row, rows in self._runs:
            if token < rows:
                return first_row + token
            token -= rows
        raise IndexError(f"token {token} past the end of the sequence's blocks")

    def packed(self, query: int) -> PackedSequence:
        """This step: one new token at index `query` of the pack, seeing all KV and its own."""
        left = self.kv_tokens + 1
        extents: list[tuple[int, int]] = []
        for first_row, rows in self._runs:
            if left > 0:
                extents.append((first_row, min(rows, left)))
            left -= rows
        return PackedSequence(first_query=query, new_tokens=1, past_tokens=self.kv_tokens, extents=tuple(extents))


def _advance(index: int, sequence: _Sequence, token: TokenDraw | Exception) -> StepOutput:
    if isinstance(token, Exception):
        sequence.finished = "error"
        return StepOutput(index, None, None, token)
    sequence.kv_tokens += 1
    sequence.generated_tokens += 1
    sequence.last_token = token.token_id
    sequence.finished = finish_reason(sequence.sampling, token.token_id, sequence.generated_tokens)
    return StepOutput(index, token, sequence.finished)


class _DecodePass(PackedPass):
    """Every layer's rows are there already."""

    def __init__(
        self, model: LoadedModel, pool: list[Tensor], sequences: list[PackedSequence], rows: list[int]
    ) -> None:
        super().__init__(model.form, tuple(sequences), torch.tensor(rows, device=model.device))
        self._pool = pool

    def layer_rows(self, layer: int) -> Tensor:
        return self._pool[layer]
