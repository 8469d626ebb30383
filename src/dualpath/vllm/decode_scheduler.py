"""A decode engine's scheduler: prompts whose KV comes from pages, device blocks as they change, tokens as they fill."""

import logging
from dataclasses import dataclass, field

from dualpath.cluster.attachment import Owner
from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.vllm.settings import PARAMETERS, DecodeParameters, decode_parameters
from dualpath.vllm.steps import DecodeStep, End, Load, Progress
from dualpath.vllm.versions import Blocks, ConnectorOutput, Request, SchedulerOutput, new_blocks

_log = logging.getLogger("vllm.dualpath")


@dataclass(slots=True)
class _Sequence:
    request: Request
    owner: Owner
    told_tokens: int
    """So many of its tokens are known to its owner."""
    told_computed: int = 0
    preemptions: int = 0
    received: bool = False
    """Its load has ended."""
    device_blocks: list[int] = field(default_factory=list)


class DecodeScheduler:
    """Pure: answers at once, touches nothing. All its times are vLLM's steps."""

    def __init__(self) -> None:
        self._sequences: dict[str, _Sequence] = {}
        self._owners: set[Owner] = set()
        self._next = DecodeStep()
        """What is already known of the next step."""

    def matched(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """Returns how many tokens after the computed ones come from pages, and whether between steps.

        A sequence loads once: its pages are gone when it is preempted.
        """
        ours = self._parameters(request)
        if ours is None:
            return 0, False
        tokens = request.num_prompt_tokens - computed_tokens
        return (tokens, True) if tokens > 0 else (0, False)

    def _parameters(self, request: Request) -> DecodeParameters | None:
        ours = decode_parameters(request.kv_transfer_params)
        if ours is None or ours.owner in self._owners or request.num_preemptions or _refusal(request, ours):
            return None
        return ours

    def allocated(self, request: Request, blocks: Blocks, external_tokens: int) -> None:
        """vLLM has given a request device blocks; so many of its tokens are to be loaded."""
        ours = decode_parameters(request.kv_transfer_params)
        if ours is None or request.request_id in self._sequences:
            return
        if external_tokens == 0:
            why = _refusal(request, ours) or "its owner has another request, or vLLM takes no cached tokens for it"
            _log.warning("request %s: nothing is loaded for %s: %s", request.request_id, ours.owner, why)
            if ours.owner not in self._owners:
                self._next.declined.append(ours.owner)
            return
        device_blocks = list(blocks.get_block_ids()[0])
        local_tokens = request.num_prompt_tokens - external_tokens
        self._sequences[request.request_id] = _Sequence(
            request, ours.owner, request.num_prompt_tokens, device_blocks=device_blocks
        )
        self._owners.add(ours.owner)
        self._next.loads.append(Load(request.request_id, ours.owner, local_tokens, device_blocks))

    def step(self, output: SchedulerOutput) -> DecodeStep:
        step, self._next = self._next, DecodeStep()
        self._preempted(step)
        for request_id, replace, blocks in new_blocks(output):
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                first = 0 if replace else len(sequence.device_blocks)
                sequence.device_blocks[first:] = blocks
                step.grown.append((sequence.owner, first, blocks))
        for request_id in output.num_scheduled_tokens:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                self._progress(sequence, step)
        return step

    def _preempted(self, step: DecodeStep) -> None:
        for sequence in self._sequences.values():
            if sequence.preemptions != sequence.request.num_preemptions:
                sequence.preemptions = sequence.request.num_preemptions
                sequence.device_blocks, sequence.told_computed = [], 0
                step.preempted.append(sequence.owner)

    def _progress(self, sequence: _Sequence, step: DecodeStep) -> None:
        """Tell at a block's edge: a block is full once a token after it is known, since the newest has no KV yet."""
        request = sequence.request
        computed_tokens = _computed(request)
        filled = computed_tokens // BLOCK_TOKENS > sequence.told_computed // BLOCK_TOKENS
        if filled or (request.num_tokens - 1) // BLOCK_TOKENS > (sequence.told_tokens - 1) // BLOCK_TOKENS:
            step.progress.append(Progress(sequence.owner, computed_tokens, _untold(sequence)))
            sequence.told_computed = computed_tokens

    def received(self, output: ConnectorOutput) -> None:
        """All workers have said that these requests' loads have ended, well or badly."""
        for request_id in output.finished_recving or ():
            if request_id in self._sequences:
                self._sequences[request_id].received = True

    def finished(self, request: Request, device_blocks: list[int]) -> bool:
        """vLLM is done with a request. Returns whether its device blocks stay until its owner releases them."""
        sequence = self._sequences.pop(request.request_id, None)
        if sequence is None:
            return False
        self._owners.discard(sequence.owner)
        end = End(request.request_id, sequence.owner, sequence.received, str(request.get_finished_reason()))
        if sequence.received:
            end.token_ids = _untold(sequence)
            end.computed_tokens = _computed(request)
            end.device_blocks = list(device_blocks)
        self._next.ended.append(end)
        return sequence.received


def _untold(sequence: _Sequence) -> list[int]:
    token_ids = list(sequence.request.all_token_ids[sequence.told_tokens :])
    sequence.told_tokens += len(token_ids)
    return token_ids


def _computed(request: Request) -> int:
    """Tokens whose KV is complete. vLLM counts steps that run, and drafts that may be rejected, as computed."""
    return min(request.num_computed_tokens, request.num_tokens - 1)


def _refusal(request: Request, ours: DecodeParameters) -> str:
    if ours.prompt_tokens != request.num_prompt_tokens:
        return (
            f"kv_transfer_params.{PARAMETERS}.prompt_tokens is {ours.prompt_tokens}, "
            f"but the prompt has {request.num_prompt_tokens} tokens"
        )
    if request.mm_features or request.lora_request is not None or request.prompt_embeds is not None:
        return "its KV depends on more than its tokens (media, embeddings or a LoRA adapter)"
    return ""
