"""Core's commands as control messages: who it is for is core's, the payload core knows nothing of is added here."""

from dualpath.cluster import messages as m
from dualpath.cluster.coordinator.live_request import LiveRequest
from dualpath.core.vocabulary import BLOCK_TOKENS, Decode, Load, Prefill, Prepare


def order(live: LiveRequest, command: Prepare | Load | Prefill | Decode, decode_address: str) -> m.ToEngine:
    """The message that tells `command.engine` what to do, and what the attempt is to remember of it.

    `decode_address`: of the decode engine's data server, for `Prefill`.
    """
    attempt = live.current
    assert attempt is not None and attempt.attempt == command.attempt
    ids = (live.request, attempt.attempt)
    match command:
        case Prepare():
            return m.PrepareDecode(
                *ids, len(attempt.prompt_token_ids), attempt.hit_tokens, live.namespace, attempt.keys
            )
        case Load(leg=leg):
            attempt.legs.append(leg)
            keys = attempt.keys[leg.first_block : leg.first_block + leg.blocks]
            return m.LoadLeg(*ids, leg, live.namespace, keys)
        case Prefill():
            assert attempt.decode_pages is not None
            return m.StartPrefill(
                *ids,
                attempt.hit_tokens,
                attempt.prompt_token_ids[attempt.hit_tokens :],
                attempt.legs,
                command.decode_engine,
                decode_address,
                attempt.decode_pages,
                live.asked.sampling,
                live.generated_before,
            )
        case Decode():
            assert attempt.first_draw is not None
            tail = attempt.prompt_token_ids[len(attempt.keys) * BLOCK_TOKENS :]
            return m.StartDecode(*ids, attempt.first_draw, tail, live.asked.sampling, live.generated_before)
