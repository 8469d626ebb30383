"""A prefill engine's scheduler: how much of a prompt is hit, and which device blocks each step loads and fills."""

from dataclasses import dataclass, field

from dualpath.cluster.attachment import Owner
from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.vllm.settings import prefill_parameters
from dualpath.vllm.steps import Chunk, PrefillStep
from dualpath.vllm.versions import Request, SchedulerOutput, new_blocks


@dataclass(slots=True)
class _Prompt:
    request: Request
    owner: Owner
    device_blocks: list[int] = field(default_factory=list)
    load_blocks: int = 0
    """Hit blocks that the next step has to load."""


class PrefillScheduler:
    """Pure: answers at once, touches nothing. All its times are vLLM's steps."""

    def __init__(self, block_size: int, *, takes_hits: bool = True) -> None:
        self._takes_hits = takes_hits
        self._ratio = BLOCK_TOKENS // block_size
        self._prompts: dict[str, _Prompt] = {}

    def matched(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """Returns how many tokens after the computed ones are hit, and that they load in the step itself."""
        ours = prefill_parameters(request.kv_transfer_params)
        if ours is None or not self._takes_hits:
            return 0, False
        hit_tokens = min(ours.hit_tokens, request.num_prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        return max(0, hit_tokens - computed_tokens), False

    def allocated(self, request: Request, external_tokens: int) -> None:
        """vLLM has given a request device blocks; so many of its tokens are to be loaded."""
        ours = prefill_parameters(request.kv_transfer_params)
        if ours is None:
            return
        prompt = self._prompts.setdefault(request.request_id, _Prompt(request, ours.owner))
        prompt.load_blocks = external_tokens // BLOCK_TOKENS

    def step(self, output: SchedulerOutput) -> PrefillStep:
        for request_id, replace, blocks in new_blocks(output):
            prompt = self._prompts.get(request_id)
            if prompt is not None:
                prompt.device_blocks = blocks if replace else prompt.device_blocks + blocks
        step = PrefillStep()
        for request_id, tokens in output.num_scheduled_tokens.items():
            prompt = self._prompts.get(request_id)
            if prompt is not None and prompt.request.num_computed_tokens < prompt.request.num_prompt_tokens:
                step.chunks.append(self._chunk(prompt, tokens))
        return step

    def _chunk(self, prompt: _Prompt, tokens: int) -> Chunk:
        start = prompt.request.num_computed_tokens
        stop = min(start + tokens, prompt.request.num_prompt_tokens)
        first_block, last_block = start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)
        written = prompt.device_blocks[first_block * self._ratio : last_block * self._ratio]
        hit = prompt.device_blocks[: prompt.load_blocks * self._ratio]
        prompt.load_blocks = 0
        return Chunk(prompt.owner, first_block, written, stop, hit)

    def finished(self, request: Request) -> None:
        self._prompts.pop(request.request_id, None)
