"""How a request is brought into a phase and held there: by its lengths, by small memories and by slow NICs.

The tiny checkpoint's KV is 1.3 kB a token, its context 4,096 tokens. What can't be seen from outside is bracketed:
shipping is prefilling over a slow CNIC, admitting the first moment of decoding, persisting what follows the last token.
"""

import time

import msgspec

from dualpath.lab.faults.matrix import Path, Phase
from dualpath.lab.faults.real.asking import Asked, Prompt, until
from dualpath.lab.faults.real.served import Served
from dualpath.spec.topology import Topology

REACH_S = 30.0
SYSTEMS = {Path.PE: "basic-layerwise", Path.DE: "de-only", Path.SPLIT: "dualpath-split"}
"""Systems that read on this path alone; the split is made where both queues are empty."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """`look` is the request that is looked at, `before` one that stands in its way at each engine."""

    look: Prompt
    before: Prompt | None = None
    state: str
    """The scheduler's state in which the fault comes."""
    tokens: int = 0
    """Tokens that the client must have by then."""
    options: tuple[str, ...] = ()
    """Of `dualpath serve`."""


_SLOW_SNIC, _SLOW_CNIC = ("--snic-rate", "600kB/s"), ("--cnic-rate", "600kB/s")
STAGES = {
    Phase.QUEUED: Stage(
        look=Prompt(0, 1200, 8, 1), before=Prompt(0, 100, 3900, 2), state="queued", options=("--hbm", "6MiB")
    ),
    Phase.ALLOCATING: Stage(
        look=Prompt(1984, 60, 8, 1),
        before=Prompt(2944, 60, 8, 2),
        state="allocating",
        options=("--buffer", "6MiB", *_SLOW_SNIC),
    ),
    Phase.READING: Stage(look=Prompt(2944, 60, 8, 1), state="loading", options=_SLOW_SNIC),
    Phase.PREFILLING: Stage(look=Prompt(960, 2900, 8, 1), state="prefilling"),
    Phase.SHIPPING: Stage(look=Prompt(1472, 1500, 8, 1), state="prefilling", options=_SLOW_CNIC),
    Phase.ADMITTING: Stage(look=Prompt(960, 60, 300, 1), state="decoding"),
    Phase.DECODING: Stage(look=Prompt(960, 60, 600, 1), state="decoding", tokens=8),
    Phase.PERSISTING: Stage(look=Prompt(0, 2000, 8, 1), state="decoding", tokens=8, options=_SLOW_SNIC),
}


def stage_of(phase: Phase, number: int) -> Stage:
    """Returns the stage with prompts that no other number has."""
    stage = STAGES[phase]
    before = stage.before and msgspec.structs.replace(stage.before, seed=2 * number + 3)
    return msgspec.structs.replace(stage, look=msgspec.structs.replace(stage.look, seed=2 * number + 2), before=before)


def reach(cluster: Served, stage: Stage, size: Topology) -> tuple[Asked, list[Asked], bool]:
    """Ask, and wait for the phase. Returns the request, those before it, and whether the phase was seen."""
    before = []
    if stage.before is not None:
        in_the_way, engines = "decoding", size.decode_engines
        if stage.state == "allocating":
            in_the_way, engines = "loading", min(size.prefill_engines, size.decode_engines)
        for number in range(engines):
            prompt = msgspec.structs.replace(stage.before, seed=stage.before.seed + 10_000 * number)
            before.append(Asked(cluster.address, prompt))
        until(lambda: cluster.in_state(in_the_way) >= len(before), REACH_S, 0.02)
    look = Asked(cluster.address, stage.look)

    def seen() -> bool:
        enough = len(look.answer.tokens) >= stage.tokens
        return not look.is_alive() or (enough and bool(stage.tokens or cluster.in_state(stage.state)))

    until(seen, REACH_S, 0.01)
    if stage.state == "prefilling" and stage.options:
        time.sleep(1.5)  # the compute is over by then, and a slow CNIC still ships
    return look, before, look.is_alive()
