"""What a measured cluster says of control, and of computing inside a cluster.

What the client and the coordinator used for lone requests is fitted to requests, prompt tokens, generated tokens and
messages; what engines' main threads used to requests, steps and tokens. A choir tells what requests share. Compute
threads need more than the model's steps by themselves: rows that another thread has just copied, caches that others
have used meanwhile. That is added to the steps. Then the lone requests are simulated; what they really take longer to
their first token is hops between processes, of which a first token needs six.
"""

import statistics
from collections.abc import Sequence

import msgspec

from dualpath.calibration.choir import Together
from dualpath.calibration.cluster_use import Used
from dualpath.calibration.fitting import fit
from dualpath.calibration.kinds import CHOIR, KINDS, SINGERS, Kind
from dualpath.calibration.simulated import lone, mean_ttft_ns, setup
from dualpath.prediction.machine import ControlCost, DecodeCost, Fit, MachineRates, PrefillCost
from dualpath.prediction.predict import simulate

Sample = tuple[Kind, Used]


def fit_control(rates: MachineRates, used: dict[str, Used], choir: Together) -> MachineRates:
    """With control's coefficients, steps as they are in a cluster, and how well they say what was measured."""
    samples = [(kind, used[kind.name]) for kind in KINDS if kind.name in used]
    (client, client_prompt, client_token), client_fit = fit(
        [(1, kind.prompt_tokens, kind.generate_tokens + 1) for kind, _ in samples],
        [one.client_ns for _, one in samples],
    )
    (request, prompt, message, tokens_message, token), server_fit = _server_control(samples, choir)
    (decode_request, decode_step, decode_token), decode_main_fit = _decode_main(samples, choir)
    prefill, prefill_fit = _prefill_in_cluster(rates, samples, choir)
    decode, decode_fit = _decode_in_cluster(rates, samples, choir)
    control = ControlCost(
        client_request_ns=client,
        client_prompt_token_ns=client_prompt,
        client_token_ns=client_token,
        request_ns=request,
        prompt_token_ns=prompt,
        message_ns=message,
        tokens_message_ns=tokens_message,
        token_ns=token,
        prefill_request_ns=_prefill_main(samples, choir),
        decode_request_ns=decode_request,
        decode_step_ns=decode_step,
        decode_token_ns=decode_token,
        hop_ns=0.0,
    )
    rates = msgspec.structs.replace(rates, control=control, prefill=prefill, decode=decode)
    hop_ns, hop_fit = _hop(rates, samples)
    fits = {
        "client": client_fit,
        "coordinator": server_fit,
        "DE, main thread": decode_main_fit,
        "prefill in a cluster": prefill_fit,
        "decode in a cluster": decode_fit,
        "first token of lone requests": hop_fit,
    }
    return msgspec.structs.replace(_hopping(rates, hop_ns), fits=rates.fits | fits)


def _server_control(samples: Sequence[Sample], choir: Together) -> tuple[list[float], Fit]:
    """A request, a prompt token, a message, one that brings tokens, a token.

    A lone request's tokens come one by one: the first from the PE, then one a step. Those of a choir share messages.
    """
    rows = [(1, kind.prompt_tokens, kind.messages, kind.generate_tokens, kind.generate_tokens) for kind, _ in samples]
    bringing = choir.batches + choir.steps
    singer = CHOIR.messages - CHOIR.generate_tokens
    shared = (
        SINGERS, SINGERS * CHOIR.prompt_tokens, SINGERS * singer + bringing, bringing, SINGERS * CHOIR.generate_tokens
    )  # fmt: skip
    return fit([*rows, shared], [*(one.server_ns for _, one in samples), choir.server_ns])


def _prefill_main(samples: Sequence[Sample], choir: Together) -> float:
    rows = [(1,) for _ in samples]
    (request_ns,), _ = fit(
        [*rows, (SINGERS,)], [*(one.prefill_main_ns for _, one in samples), max(1.0, choir.prefill_main_ns)]
    )
    return request_ns


def _decode_main(samples: Sequence[Sample], choir: Together) -> tuple[list[float], Fit]:
    """A request, a step, a token of it; from kinds that store no blocks."""
    plain = [(kind, one) for kind, one in samples if not kind.stored_blocks]
    rows = [(1.0, kind.generate_tokens - 1.0, kind.generate_tokens - 1.0) for kind, _ in plain]
    sung = (SINGERS, choir.steps, SINGERS * (CHOIR.generate_tokens - 1))
    return fit([*rows, sung], [*(one.decode_main_ns for _, one in plain), max(1.0, choir.decode_main_ns)])


def _prefill_in_cluster(rates: MachineRates, samples: Sequence[Sample], choir: Together) -> tuple[PrefillCost, Fit]:
    """With what a batch and a cached token take beyond the layers by themselves."""
    cost, layers = rates.prefill, rates.layers * rates.threads
    rows, known, measured = [], [], []
    for requests, batches, kind, compute_ns in (
        *((1, 1.0, kind, one.prefill_compute_ns) for kind, one in samples),
        (SINGERS, choir.batches, CHOIR, choir.prefill_compute_ns),
    ):
        chunk_ns = cost.chunk_ns(kind.hit_tokens, kind.prompt_tokens - kind.hit_tokens)
        rows.append((batches, requests * kind.hit_tokens))
        known.append(layers * (batches * cost.fixed_ns + requests * chunk_ns))
        measured.append(max(1.0, compute_ns))
    (batch_ns, cached_token_ns), quality = fit(rows, measured, known)
    more = msgspec.structs.replace(
        cost, fixed_ns=cost.fixed_ns + batch_ns / layers, cached_token_ns=cached_token_ns / layers
    )
    return more, quality


def _decode_in_cluster(rates: MachineRates, samples: Sequence[Sample], choir: Together) -> tuple[DecodeCost, Fit]:
    """With what a step takes beyond steps by themselves."""
    cost = rates.decode
    rows, known, measured = [], [], []
    for requests, steps, kind, compute_ns in (
        *((1, kind.generate_tokens - 1.0, kind, one.decode_compute_ns) for kind, one in samples),
        (SINGERS, choir.steps, CHOIR, choir.decode_compute_ns),
    ):
        if steps:
            contexts_tokens = [kind.prompt_tokens + kind.generate_tokens // 2]
            lone_ns = cost.step_ns(contexts_tokens)
            added_ns = cost.step_ns(contexts_tokens * 2) - lone_ns
            rows.append((steps,))
            known.append(
                (steps * (lone_ns - added_ns) + requests * (kind.generate_tokens - 1) * added_ns) * rates.threads
            )
            measured.append(max(1.0, compute_ns))
    (step_ns,), quality = fit(rows, measured, known)
    return msgspec.structs.replace(cost, fixed_ns=cost.fixed_ns + step_ns / rates.threads), quality


def _hop(rates: MachineRates, samples: Sequence[Sample]) -> tuple[float, Fit]:
    """The hop that makes simulated first tokens as late as measured ones, by the median over kinds."""
    hops_ns = []
    for kind, one in samples:
        plain_ns, hopping_ns = (_lone_ttft_ns(_hopping(rates, hop_ns), kind) for hop_ns in (0.0, 1e6))
        hops_ns.append((one.ttft_s * 1e9 - plain_ns) / (hopping_ns - plain_ns) * 1e6)
    hop_ns = max(0.0, statistics.median(hops_ns))
    hopping = _hopping(rates, hop_ns)
    errors = [abs(_lone_ttft_ns(hopping, kind) / (one.ttft_s * 1e9) - 1) for kind, one in samples]
    return hop_ns, Fit(samples=len(errors), mean_error=statistics.mean(errors), max_error=max(errors))


def _hopping(rates: MachineRates, hop_ns: float) -> MachineRates:
    return msgspec.structs.replace(rates, control=msgspec.structs.replace(rates.control, hop_ns=hop_ns))


def _lone_ttft_ns(rates: MachineRates, kind: Kind) -> float:
    _, turns, _ = simulate(setup(rates, (lone(kind),)))
    return mean_ttft_ns(turns)
