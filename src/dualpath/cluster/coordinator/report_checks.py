"""Which reports an engine can make: about attempts that are placed on it, and of what the attempt can have.

Core checks the order of reports and drops what comes too late; these checks are of who says it, and what.
"""

from dualpath.cluster import messages as m
from dualpath.cluster.coordinator.attempt import Attempt
from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId, Side


def can_report(
    engine: EngineId, attempt: Attempt, message: m.FromEngine | m.StepTokens, vocab_size: int, routed: bool = False
) -> bool:
    """Returns False for a report that `engine` can't make about `attempt`, whatever has gone wrong there.

    `routed`: the engines are vLLM servers, which tell no tokens.
    """
    prefill, decode = engine == attempt.prefill_engine, engine == attempt.decode_engine
    match message:
        case m.Prepared():
            blocks = -(-len(attempt.prompt_token_ids) // BLOCK_TOKENS)
            return decode and len(set(message.pages)) == len(message.pages) == blocks
        case m.Loaded() | m.LoadFailed():
            if isinstance(message, m.LoadFailed) and not {fault.key for fault in message.faults} <= set(attempt.keys):
                return False
            return prefill if message.side is Side.PE else decode
        case m.PrefillDone():
            ordered = bool(attempt.stages.prefill_engine) and not attempt.prefilled
            drawn = message.draw is None if routed else message.draw is not None and message.draw.token_id < vocab_size
            return prefill and ordered and drawn
        case m.PromptLogprobs():
            rows = len(message.token_ids) == len(message.logprobs) == len(message.ranks)
            return prefill and rows and all(map(_as_long, message.token_ids, message.logprobs))
        case m.StepTokens():
            return decode and attempt.first_draw is not None and message.draw.token_id < vocab_size
        case m.BufferFreed() | m.Finished():
            return decode
        case _:
            return prefill or decode


def _as_long(token_ids: list[int], logprobs: list[float]) -> bool:
    return len(token_ids) == len(logprobs)
