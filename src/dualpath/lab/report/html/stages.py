"""Where a turn's time went, stage by stage.

A server that returns timings tells its stages; what the client saw beyond them (HTTP, earlier tries) is `outside`, put
before the others. Without timings there are two stages: `prefill` until the first token, then `decode`.
"""

from dualpath.results.turns import TurnResult

STAGES = {
    "outside": "the way to the server and back, earlier tries",
    "scheduling": "until a PE and a DE were chosen",
    "allocation": "until both had room",
    "read": "until the hit tokens had come from storage",
    "prefill": "waiting for the batch, computing, moving KV to the DE",
    "decode": "from the first token to the last",
}
TTFT_STAGES = tuple(stage for stage in STAGES if stage != "decode")


def stages_of(turn: TurnResult) -> dict[str, float]:
    """Seconds by stage, in the order of `STAGES`; they add up to the turn's latency, as far as clocks agree."""
    decode_s = max(0.0, turn.latency_s - turn.ttft_s)
    timings = turn.timings
    if timings is None:
        return dict.fromkeys(STAGES, 0.0) | {"prefill": turn.ttft_s, "decode": decode_s}
    told = {
        "scheduling": timings.scheduling_s,
        "allocation": timings.allocation_s,
        "read": timings.read_s,
        "prefill": timings.prefill_s,
    }
    return {"outside": max(0.0, turn.ttft_s - sum(told.values())), **told, "decode": decode_s}
