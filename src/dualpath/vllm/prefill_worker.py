"""A prefill engine's worker: hit layers from pages just before they are needed, computed layers into pages.

vLLM's thread calls the hooks of a step; the link's thread calls `handle` and `detached`. One condition guards all, and
copies are made while it is held: once an owner has been dropped, none of its pages is touched.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from dualpath.cluster.attachment import Owner
from dualpath.cluster.vllm_attachment import Drop, Expect, LayerSaved, LayersReady, Quiet, Saved, StepSaved
from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.transfer.pool import MappedPages
from dualpath.vllm.copies import Copies
from dualpath.vllm.recent import Recent
from dualpath.vllm.steps import Chunk, PrefillStep

EXPECT_S = 2.0
"""How long a step waits for word of its prompts: their agent has sent it before the requests, but may be attaching."""
LAYER_S = 60.0
"""How long a step waits for a hit layer; its agent gives a transfer up before."""

_log = logging.getLogger("vllm.dualpath")


@dataclass(slots=True, eq=False)
class _Prompt:
    expected: Expect
    complete_tokens: int
    """So many are in its pages, in all layers."""
    ready_layers: int = 0


class PrefillWorker:
    """What a worker of a prefill engine does in vLLM's steps and for its agent."""

    def __init__(self, copies: Copies, say: Callable[[msgspec.Struct], None]) -> None:
        """`say` sends to the agent, from any thread, and raises nothing."""
        self._copies, self._say = copies, say
        self._changed = threading.Condition()
        self._pages: MappedPages | None = None
        self._prompts: dict[Owner, _Prompt] = {}
        self._over: Recent[Owner] = Recent()
        self._chunks: list[tuple[Chunk, _Prompt]] = []
        """Of the step that runs."""
        self._saved_layers = 0
        self._unsaid: deque[tuple[Callable[[], bool], LayerSaved]] = deque()
        """Layers whose copies may not be done yet."""
        self._errors: set[int] = set()

    # ── from the agent ──────────────────────────────────────────────────────────────────────────────────────────────

    def attached(self, pages: MappedPages) -> None:
        with self._changed:
            self._pages = pages

    def detached(self) -> None:
        """The agent is gone, and its pages with it. Returns once nothing touches them."""
        with self._changed:
            self._settle()
            for owner in self._prompts:
                self._over.add(owner)
            self._prompts.clear()
            self._pages = None
            self._changed.notify_all()

    def handle(self, message: msgspec.Struct) -> None:
        with self._changed:
            match message:
                case Expect():
                    self._expect(message)
                case LayersReady():
                    prompt = self._prompts.get(message.owner)
                    if prompt is not None:
                        prompt.ready_layers = max(prompt.ready_layers, message.layers)
                case Drop():
                    self._settle()
                    self._prompts.pop(message.owner, None)
                    self._over.add(message.owner)
                    self._say(Quiet(message.owner))
            self._changed.notify_all()

    def _expect(self, message: Expect) -> None:
        pages = self._pages.pages if self._pages is not None else 0
        if len(message.pages) * BLOCK_TOKENS < message.prompt_tokens or any(page >= pages for page in message.pages):
            _log.error("attempt %s: its pages are too few for its prompt, or not of this buffer", message.owner)
        else:
            self._prompts[message.owner] = _Prompt(message, message.hit_tokens)

    def _settle(self) -> None:
        """Nothing touches a page when this returns."""
        self._copies.settle()
        self._say_saved()

    def _say_saved(self) -> None:
        while self._unsaid and self._unsaid[0][0]():
            self._say(self._unsaid.popleft()[1])

    # ── a step of vLLM ──────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, step: PrefillStep) -> None:
        """A step begins; no layer has run."""
        self._saved_layers = 0
        with self._changed:
            self._chunks, deadline_s = [], time.monotonic() + EXPECT_S
            for chunk in step.chunks:
                prompt = self._expected(chunk, deadline_s)
                if prompt is None:
                    self._prompts.pop(chunk.owner, None)
                    self._over.add(chunk.owner)
                    self._errors.update(chunk.hit_device_blocks)
                else:
                    self._chunks.append((chunk, prompt))

    def _expected(self, chunk: Chunk, deadline_s: float) -> _Prompt | None:
        owner = chunk.owner
        timeout_s = max(0.0, deadline_s - time.monotonic())
        self._changed.wait_for(lambda: owner in self._prompts or owner in self._over, timeout=timeout_s)
        prompt = self._prompts.get(owner)
        if prompt is None or chunk.computed_tokens > prompt.expected.prompt_tokens:
            return None
        if chunk.first_block * BLOCK_TOKENS > prompt.complete_tokens:
            _log.error("attempt %s: a step before this one was not saved; its prompt is not sent", owner)
            return None
        return prompt

    def start(self) -> None:
        """vLLM has readied the step's device blocks."""
        self._copies.follow()

    def load(self, layer: int) -> None:
        """Return once a layer's hit KV is in the device blocks, or is known not to come."""
        if not self._chunks:
            return
        with self._changed:
            for chunk, prompt in list(self._chunks):
                if not chunk.hit_device_blocks:
                    continue
                self._changed.wait_for(
                    lambda prompt=prompt: prompt.ready_layers > layer or not self._lives(prompt),  # type: ignore[misc]
                    timeout=LAYER_S,
                )
                if self._lives(prompt) and prompt.ready_layers > layer:
                    self._load(chunk, prompt, layer)
                else:
                    self._fail(chunk, prompt)
            self._copies.lead()

    def _load(self, chunk: Chunk, prompt: _Prompt, layer: int) -> None:
        assert self._pages is not None
        ratio = self._copies.part.ratio
        for block in range(len(chunk.hit_device_blocks) // ratio):
            device_blocks = chunk.hit_device_blocks[block * ratio : (block + 1) * ratio]
            self._copies.to_device(self._pages, prompt.expected.pages[block], layer, device_blocks)

    def _fail(self, chunk: Chunk, prompt: _Prompt) -> None:
        """vLLM computes the prompt itself, for nobody: its owner is dropped or gets no word of it."""
        owner = chunk.owner
        if self._lives(prompt):
            _log.error("attempt %s: no hit layer came for %.0f s; its prompt is computed and not sent", owner, LAYER_S)
            del self._prompts[owner]
        self._errors.update(chunk.hit_device_blocks)
        self._chunks.remove((chunk, prompt))

    def _lives(self, prompt: _Prompt) -> bool:
        return self._prompts.get(prompt.expected.owner) is prompt

    def save(self, layer: int) -> None:
        """A layer has run: copy every block that its chunks touch into pages."""
        if not self._chunks:
            return
        self._saved_layers += 1
        with self._changed:
            self._chunks = [(chunk, prompt) for chunk, prompt in self._chunks if self._lives(prompt)]
            self._copies.follow()
            saved = [self._save(chunk, prompt, layer) for chunk, prompt in self._chunks]
            if saved:
                self._unsaid.append((self._copies.done(), LayerSaved(layer, saved)))
            self._say_saved()

    def _save(self, chunk: Chunk, prompt: _Prompt, layer: int) -> Saved:
        assert self._pages is not None
        ratio = self._copies.part.ratio
        blocks = -(-len(chunk.device_blocks) // ratio)
        for index in range(blocks):
            device_blocks = chunk.device_blocks[index * ratio : (index + 1) * ratio]
            self._copies.to_page(self._pages, prompt.expected.pages[chunk.first_block + index], layer, device_blocks)
        return Saved(chunk.owner, chunk.first_block, blocks)

    def end(self) -> None:
        """The step is over. A prompt that is complete is forgotten: its pages are the agent's alone from then on."""
        if not self._chunks:
            return
        with self._changed:
            chunks = [(chunk, prompt) for chunk, prompt in self._chunks if self._lives(prompt)]
            self._chunks = []
            self._settle()
            if self._saved_layers != len(self._copies.layers):
                _log.error("%d of %d layers were saved; is a full CUDA graph on?", self._saved_layers, self._n_layers)
                return
            for chunk, prompt in chunks:
                prompt.complete_tokens = chunk.computed_tokens
                if chunk.computed_tokens >= prompt.expected.prompt_tokens:
                    del self._prompts[chunk.owner]
            if chunks:
                self._say(StepSaved([(chunk.owner, chunk.computed_tokens) for chunk, _ in chunks]))

    @property
    def _n_layers(self) -> int:
        return len(self._copies.layers)

    def take_errors(self) -> set[int]:
        """Returns the device blocks that could not be loaded."""
        errors, self._errors = self._errors, set()
        return errors
