"""What a measured cluster says of control, and of what busy cores take from each other.

What each process used for a lone request, less what is known already (steps, copies), is fitted to requests, prompt
tokens, generated tokens and messages. Then the same lone requests are simulated; what they really take longer to their
first token is hops between processes, of which a first token needs six.

Agents that ask at once take longer than they do in the simulation. The factors that make the two equal are the slowdown
of busy cores, on everything, and what prefill and decode take beyond it.
"""

import statistics
from collections.abc import Callable, Sequence

import msgspec

from dualpath.calibration.busy import CROWDS, Busy, mean_of
from dualpath.calibration.cluster_use import KINDS, Kind, Used
from dualpath.calibration.fitting import fit
from dualpath.core.batching import Chunk
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


def fit_control(rates: MachineRates, used: dict[str, Used]) -> tuple[ControlCost, dict[str, Fit]]:
    """From CPU times to coefficients, see the module."""
    kinds = [kind for kind in KINDS if kind.name in used]
    of = [used[kind.name] for kind in kinds]
    (client, client_prompt, client_token), client_fit = fit(
        [(1, kind.prompt_tokens, kind.generate_tokens + 1) for kind in kinds], [one.client_ns for one in of]
    )
    (request, prompt, token, message), server_fit = fit(
        [(1, kind.prompt_tokens, kind.generate_tokens, kind.messages) for kind in kinds],
        [one.server_ns for one in of],
    )
    decode_request, decode_step = _decode_control(rates, kinds, of)
    control = ControlCost(
        client_request_ns=client,
        client_prompt_token_ns=client_prompt,
        client_token_ns=client_token,
        request_ns=request,
        prompt_token_ns=prompt,
        token_ns=token,
        message_ns=message,
        prefill_request_ns=_prefill_control(rates, kinds, of),
        decode_request_ns=decode_request,
        decode_step_ns=decode_step,
        cold_ns=0.0,
        hop_ns=0.0,
    )
    hop_ns, hop_fit = _hop(rates, control, kinds, of)
    fits = {"client": client_fit, "coordinator": server_fit, "first token of lone requests": hop_fit}
    return msgspec.structs.replace(control, hop_ns=hop_ns), fits


def _prefill_control(rates: MachineRates, kinds: Sequence[Kind], of: Sequence[Used]) -> float:
    """What is left of a PE's time for a short prompt, less its steps and its half of what is shipped."""
    left = []
    for kind, one in zip(kinds, of, strict=True):
        if not kind.context_tokens and not kind.stored_blocks:
            step_ns = rates.prefill.layer_ns((Chunk(0, 0, 0, kind.append_tokens, True),))
            known_ns = rates.layers * (step_ns * rates.threads + _shipped_ns(rates, kind) / 2)
            left.append(one.prefill_ns - known_ns)
    return max(0.0, statistics.median(left))


def _shipped_ns(rates: MachineRates, kind: Kind) -> float:
    """Core time of one layer's put of a prompt that was computed whole, both ends together."""
    put = rates.transports["shm"].put
    return put.copying_ns(kind.prompt_tokens * rates.kv_bytes_per_token // rates.layers, 0) * put.threads


def _decode_control(rates: MachineRates, kinds: Sequence[Kind], of: Sequence[Used]) -> tuple[float, float]:
    """A request's and a step's, from the two kinds without blocks."""
    by_name = {kind.name: (kind, one) for kind, one in zip(kinds, of, strict=True)}
    (short, one_token), (answer, many) = by_name["short"], by_name["answer"]
    copy_ns = short.prompt_tokens * rates.kv_bytes_per_token * rates.fill.byte_ns
    request_ns = max(0.0, one_token.decode_ns - copy_ns - rates.layers * _shipped_ns(rates, short) / 2)
    steps = answer.generate_tokens - short.generate_tokens
    computed_ns = sum(rates.decode.step_ns([answer.prompt_tokens + i + 1]) for i in range(steps)) * rates.threads
    return request_ns, max(0.0, (many.decode_ns - one_token.decode_ns - computed_ns) / steps)


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
