"""What a measured cluster says of control, and of what busy cores take from each other.

What each process used for a lone request, less what is known already (steps, copies), is fitted to requests, prompt
tokens, generated tokens and messages; a choir tells what requests share. Then the lone requests are simulated; what
they really take longer to their first token is hops between processes, of which a first token needs six.

Agents that ask at once take longer than they do in the simulation. The factors that make the two equal are the slowdown
of busy cores, on everything while a DE decodes, and what prefill and decode take beyond it.
"""

import statistics
from collections.abc import Callable, Sequence

import msgspec

from dualpath.calibration.busy import CROWDS, Busy, mean_of
from dualpath.calibration.choir import Together
from dualpath.calibration.cluster_use import Used
from dualpath.calibration.fitting import fit
from dualpath.calibration.kinds import CHOIR, KINDS, SINGERS, Kind
from dualpath.prediction.machine import ControlCost, Fit, MachineRates
from dualpath.prediction.predict import simulate
from dualpath.prediction.setup import RunSetup
from dualpath.workload import Trajectory

MAX_OTHERS_CORES = 0.1
"""Beyond it, times of a busy cluster say more of what else ran than of the cluster."""
SLOWDOWNS = (1.0, 3.0)
FACTORS = (0.5, 2.0)
FIT_ROUNDS = 3
BISECTIONS = 9


def fit_busy(rates: MachineRates, busy: dict[str, Busy]) -> MachineRates:
    """With the factors by which each simulated crowd takes as long as the real one; CPU time counts, too, for one.

    One factor after the other, a few times around, each by the crowd that tells most of it.
    """
    over_all = mean_of(list(busy.values()))
    rates = msgspec.structs.replace(rates, reference_ns=over_all.reference_ns, others_cores=over_all.others_cores)

    def takes(crowd: str, field: str, value: float) -> tuple[float, float]:
        changed = msgspec.structs.replace(rates, **{field: value})
        slowness = busy[crowd].reference_ns / rates.reference_ns
        cluster, _, jct_ns = simulate(_setup(changed, CROWDS[crowd], slowness))
        return jct_ns, cluster.cpu.busy_core_ns

    def fitted(crowd: str, field: str, limits: tuple[float, float]) -> float:
        return _least(lambda value: takes(crowd, field, value)[0] >= busy[crowd].jct_ns, limits)

    by_cpu = _least(lambda value: takes("mixed", "slowdown", value)[1] >= busy["mixed"].cpu_ns, SLOWDOWNS)
    rates = msgspec.structs.replace(rates, cpu_slowdown=by_cpu)
    if rates.others_cores > MAX_OTHERS_CORES:  # time was lost to others
        return msgspec.structs.replace(rates, slowdown=by_cpu)
    for _ in range(FIT_ROUNDS):
        rates = msgspec.structs.replace(rates, slowdown=fitted("mixed", "slowdown", SLOWDOWNS))
        rates = msgspec.structs.replace(rates, prefill_factor=fitted("appends", "prefill_factor", FACTORS))
        rates = msgspec.structs.replace(rates, decode_factor=fitted("answers", "decode_factor", FACTORS))
    return rates


def _least(enough: Callable[[float], bool], limits: tuple[float, float]) -> float:
    """The value from which on it is enough, by bisection."""
    low, high = limits
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return (low + high) / 2


def fit_control(rates: MachineRates, used: dict[str, Used], choir: Together) -> tuple[ControlCost, dict[str, Fit]]:
    """From CPU times to coefficients, see the module."""
    kinds = [kind for kind in KINDS if kind.name in used]
    of = [used[kind.name] for kind in kinds]
    (client, client_prompt, client_token), client_fit = fit(
        [(1, kind.prompt_tokens, kind.generate_tokens + 1) for kind in kinds], [one.client_ns for one in of]
    )
    (request, prompt, message, tokens_message, token), server_fit = _server_control(kinds, of, choir)
    prefill_request, prefill_batch = _prefill_control(rates, kinds, of, choir)
    decode_request, decode_step, decode_token = _decode_control(rates, kinds, of, choir)
    control = ControlCost(
        client_request_ns=client,
        client_prompt_token_ns=client_prompt,
        client_token_ns=client_token,
        request_ns=request,
        prompt_token_ns=prompt,
        message_ns=message,
        tokens_message_ns=tokens_message,
        token_ns=token,
        prefill_request_ns=prefill_request,
        prefill_batch_ns=prefill_batch,
        decode_request_ns=decode_request,
        decode_step_ns=decode_step,
        decode_token_ns=decode_token,
        connect_ns=0.0,
        hop_ns=0.0,
    )
    hop_ns, hop_fit = _hop(rates, control, kinds, of)
    fits = {"client": client_fit, "coordinator": server_fit, "first token of lone requests": hop_fit}
    return msgspec.structs.replace(control, hop_ns=hop_ns), fits


def _server_control(kinds: Sequence[Kind], of: Sequence[Used], choir: Together) -> tuple[list[float], Fit]:
    """A request, a prompt token, a message, one that brings tokens, a token.

    A lone request's tokens come one by one: the first from the PE, then one a step. Those of a choir share messages.
    """
    rows = [(1, kind.prompt_tokens, kind.messages, kind.generate_tokens, kind.generate_tokens) for kind in kinds]
    bringing = choir.batches + choir.steps
    singer = CHOIR.messages - CHOIR.generate_tokens
    shared = (
        SINGERS, SINGERS * CHOIR.prompt_tokens, SINGERS * singer + bringing, bringing, SINGERS * CHOIR.generate_tokens
    )  # fmt: skip
    return fit([*rows, shared], [*(one.server_ns for one in of), choir.server_ns])


def _prefill_control(rates: MachineRates, kinds: Sequence[Kind], of: Sequence[Used], choir: Together) -> list[float]:
    """A PE's time for a request and for a batch, less its layers and its half of what is shipped.

    From short prompts that are computed whole: one, and a choir of them.
    """
    rows, left = [], []
    for kind, one in zip(kinds, of, strict=True):
        if not kind.context_tokens and not kind.stored_blocks:
            rows.append((1.0, 1.0))
            left.append(one.prefill_ns - _prefilled_ns(rates, kind, 1, 1))
    rows.append((SINGERS, choir.batches))
    left.append(choir.prefill_ns - _prefilled_ns(rates, CHOIR, SINGERS, choir.batches))
    return fit(rows, [max(1.0, one) for one in left])[0]


def _prefilled_ns(rates: MachineRates, kind: Kind, requests: int, batches: float) -> float:
    """Layers, and half of what is shipped, of so many prompts of a kind without context in so many batches."""
    layer_ns = batches * rates.prefill.fixed_ns + requests * rates.prefill.chunk_ns(0, kind.append_tokens)
    return rates.layers * (layer_ns * rates.threads + requests * _shipped_ns(rates, kind) / 2)


def _shipped_ns(rates: MachineRates, kind: Kind) -> float:
    """Core time of one layer's put of a prompt that was computed whole, both ends together."""
    put = rates.transports["shm"].put
    return put.copying_ns(kind.prompt_tokens * rates.kv_bytes_per_token // rates.layers, 0) * put.threads


def _decode_control(rates: MachineRates, kinds: Sequence[Kind], of: Sequence[Used], choir: Together) -> list[float]:
    """A DE's time for a request, a step and a token of it, less its steps and copies: from kinds without blocks."""
    by_name = {kind.name: (kind, one.decode_ns) for kind, one in zip(kinds, of, strict=True)}
    rows, left = [], []
    for requests, steps, (kind, decode_ns) in (
        (1, 0.0, by_name["short"]),
        (1, by_name["answer"][0].generate_tokens - 1.0, by_name["answer"]),
        (SINGERS, choir.steps, (CHOIR, choir.decode_ns)),
    ):
        tokens = requests * (kind.generate_tokens - 1)
        copied_ns = kind.prompt_tokens * rates.kv_bytes_per_token * rates.fill.byte_ns
        known_ns = requests * (copied_ns + rates.layers * _shipped_ns(rates, kind) / 2)
        if steps:
            contexts = [kind.prompt_tokens + kind.generate_tokens // 2]
            lone_ns = rates.decode.step_ns(contexts)
            added_ns = rates.decode.step_ns(contexts * 2) - lone_ns
            known_ns += (steps * (lone_ns - added_ns) + tokens * added_ns) * rates.threads
        rows.append((requests, steps, tokens))
        left.append(max(1.0, decode_ns - known_ns))
    return fit(rows, left)[0]


def _hop(rates: MachineRates, control: ControlCost, kinds: Sequence[Kind], of: Sequence[Used]) -> tuple[float, Fit]:
    """The hop that makes simulated first tokens as late as measured ones, by the median over kinds."""
    hops_ns = []
    for kind, one in zip(kinds, of, strict=True):
        plain, hopping = (_lone_ttft_s(rates, control, kind, hop_ns) for hop_ns in (0.0, 1e6))
        hops_ns.append((one.ttft_s - plain) / (hopping - plain) * 1e6)
    hop_ns = max(0.0, statistics.median(hops_ns))
    errors = [
        abs(_lone_ttft_s(rates, control, kind, hop_ns) / one.ttft_s - 1) for kind, one in zip(kinds, of, strict=True)
    ]
    return hop_ns, Fit(samples=len(errors), mean_error=statistics.mean(errors), max_error=max(errors))


def _lone_ttft_s(rates: MachineRates, control: ControlCost, kind: Kind, hop_ns: float) -> float:
    control = msgspec.structs.replace(control, hop_ns=hop_ns)
    trajectory = kind.trajectory()
    lone = msgspec.structs.replace(trajectory, rounds=trajectory.rounds[:3])
    _, turns, _ = simulate(_setup(msgspec.structs.replace(rates, control=control), (lone,)))
    return statistics.mean((turn.first_token_ns - turn.sent_ns) / 1e9 for turn in turns)


def _setup(rates: MachineRates, trajectories: tuple[Trajectory, ...], slowness: float = 1.0) -> RunSetup:
    """The cluster that is measured, and who asks it after the warm-up."""
    return RunSetup(
        rates=rates,
        prefill_engines=1,
        decode_engines=1,
        system="dualpath",
        snic_bytes_per_s=None,
        cnic_bytes_per_s=None,
        compute_quota_s=0.3,
        transport="shm",
        trajectories=trajectories,
        first_round=1,
        paced=True,
        slowness=slowness,
    )
