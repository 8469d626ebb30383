"""Fits give back the coefficients their samples were made of; and say so when they can't."""

import msgspec
import pytest

from dualpath.calibration.busy import CROWDS, Busy
from dualpath.calibration.choir import Together
from dualpath.calibration.cluster_use import Used, typical
from dualpath.calibration.compute import fit_decode, fit_prefill
from dualpath.calibration.control import fit_control
from dualpath.calibration.fitting import fit
from dualpath.calibration.kinds import CHOIR, KINDS, SINGERS, Kind
from dualpath.calibration.simulated import lone, mean_ttft_ns, setup
from dualpath.calibration.slowdown import fit_slowdown
from dualpath.calibration.table import machine_tables
from dualpath.core.batching import Chunk
from dualpath.engine.step_profiling import DECODE_SHAPES, PREFILL_SHAPES, DecodeSample, PrefillSample
from dualpath.prediction.machine import (
    ControlCost,
    DecodeCost,
    EngineLimits,
    MachineRates,
    MoveCost,
    PrefillCost,
    StorageCost,
    TransportCost,
)
from dualpath.prediction.predict import simulate

MS = 1_000_000
PREFILL = PrefillCost(fixed_ns=0.8 * MS, item_ns=0.1 * MS, token_ns=25_000, cached_pair_ns=30, new_pair_ns=45)
DECODE = DecodeCost(fixed_ns=5 * MS, request_ns=0.5 * MS, context_token_ns=1400, longest_token_ns=500)


def rates(**changes: object) -> MachineRates:
    move = MoveCost(byte_ns=0.1, chunk_ns=50_000, operation_ns=20_000)
    plain = MachineRates(
        description="a test's", model="m", layers=8, kv_bytes_per_token=16_384, dtype="float32", threads=1, cores=2,
        side_by_side=1.1, oversubscribed_error=0.02, slowdown=1.0, others_cores=0.0,
        attention=msgspec.convert(
            {"fixed_ns": 0, "ns_per_flop": 0.001, "flops_per_token": 1000, "flops_per_pair": 1000}, type=_ATTENTION
        ),
        prefill_tokens_per_s=40_000.0, prefill=PREFILL, decode=DECODE, local_copy=move, fill=move, copy_out=move,
        transports={"shm": TransportCost(pull=move, put=move)},
        storage=StorageCost(
            read_ns=0.2 * MS, write_ns=2 * MS, write_wait_ns=5 * MS, read_threads=2, write_threads=2
        ),
        control=CONTROL,
        limits=EngineLimits(
            max_batch_tokens=8192, max_batch_kv_tokens=32_768, max_batch_requests=16, device_layers=3,
            buffer_bytes=2**30, hbm_bytes=2**30,
        ),
        reference_ns=0.4 * MS, fits={}, measured_s=1.0,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


_ATTENTION = MachineRates.__annotations__["attention"]
CONTROL = ControlCost(
    client_request_ns=0.6 * MS,
    client_prompt_token_ns=200,
    client_token_ns=0.1 * MS,
    request_ns=1.8 * MS,
    prompt_token_ns=700,
    message_ns=0.12 * MS,
    tokens_message_ns=0.4 * MS,
    token_ns=0.1 * MS,
    prefill_request_ns=1.5 * MS,
    decode_request_ns=1.7 * MS,
    decode_step_ns=0.8 * MS,
    decode_token_ns=0.2 * MS,
    hop_ns=0.3 * MS,
)


BATCH_NS, CACHED_TOKEN_NS, STEP_NS = 2 * MS, 2_000, 0.9 * MS
"""What compute threads take in a cluster beyond `PREFILL` and `DECODE`."""


def in_cluster(machine: MachineRates) -> MachineRates:
    prefill, decode = machine.prefill, machine.decode
    return msgspec.structs.replace(
        machine,
        prefill=msgspec.structs.replace(
            prefill,
            fixed_ns=prefill.fixed_ns + BATCH_NS / machine.layers,
            cached_token_ns=CACHED_TOKEN_NS / machine.layers,
        ),
        decode=msgspec.structs.replace(decode, fixed_ns=decode.fixed_ns + STEP_NS),
    )


def used(machine: MachineRates, kind: Kind) -> Used:
    """What a cluster with `machine.control` would have used for one lone request."""
    control, tokens = machine.control, kind.generate_tokens
    prompt = Chunk(0, 0, kind.hit_tokens, kind.prompt_tokens - kind.hit_tokens, True)
    _, turns, _ = simulate(setup(machine, (lone(kind),)))
    return Used(
        ttft_s=mean_ttft_ns(turns) / 1e9,
        client_ns=control.client_request_ns
        + kind.prompt_tokens * control.client_prompt_token_ns
        + (tokens + 1) * control.client_token_ns,
        server_ns=control.request_ns
        + kind.prompt_tokens * control.prompt_token_ns
        + tokens * (control.token_ns + control.tokens_message_ns)
        + kind.messages * control.message_ns,
        prefill_main_ns=control.prefill_request_ns,
        prefill_compute_ns=machine.layers * machine.prefill.layer_ns((prompt,)),
        decode_main_ns=control.decode_request_ns + (tokens - 1) * (control.decode_step_ns + control.decode_token_ns),
        decode_compute_ns=sum(machine.decode.step_ns([kind.prompt_tokens + i + 1]) for i in range(tokens - 1)),
    )


def sung(machine: MachineRates, batches: int = 2, stagger: int = 3) -> Together:
    """What it would have used for a choir whose prompts come in so many batches, the last so many steps late."""
    control, tokens = machine.control, CHOIR.generate_tokens
    early = SINGERS // 2
    steps = tokens - 1 + stagger
    compute_ns = main_ns = 0.0
    for step in range(steps):
        of = [step + 1] * early * (step < tokens - 1) + [step + 1 - stagger] * (SINGERS - early) * (step >= stagger)
        compute_ns += machine.decode.step_ns([CHOIR.prompt_tokens + made for made in of])
        main_ns += control.decode_step_ns + len(of) * control.decode_token_ns
    return Together(
        server_ns=SINGERS * (control.request_ns + CHOIR.prompt_tokens * control.prompt_token_ns)
        + SINGERS * ((CHOIR.messages - tokens) * control.message_ns + tokens * control.token_ns)
        + (batches + steps) * (control.message_ns + control.tokens_message_ns),
        prefill_main_ns=SINGERS * control.prefill_request_ns,
        prefill_compute_ns=machine.layers
        * (batches * machine.prefill.fixed_ns + SINGERS * machine.prefill.chunk_ns(0, CHOIR.append_tokens)),
        decode_main_ns=SINGERS * control.decode_request_ns + main_ns,
        decode_compute_ns=compute_ns,
        batches=batches,
        steps=steps,
    )


def test_a_line_through_exact_samples_is_found():
    coefficients, quality = fit([(1, x) for x in (1, 2, 10)], [3 + 2 * x for x in (1, 2, 10)])
    assert coefficients == pytest.approx([3, 2])
    assert quality.samples == 3 and quality.max_error < 1e-9


def test_no_coefficient_is_below_zero():
    coefficients, quality = fit([(1, x) for x in (1, 2, 4, 8)], [10, 9, 8, 5])
    assert coefficients[1] == 0 and coefficients[0] > 5
    assert quality.max_error > 0.1


def test_what_is_known_of_a_sample_is_left_out_of_its_coefficients():
    coefficients, _ = fit([(1, x) for x in (1, 2, 10)], [103 + 2 * x for x in (1, 2, 10)], [100, 100, 100])
    assert coefficients == pytest.approx([3, 2])
    assert fit([(1,), (1,)], [9, 9], [10, 10])[0] == [0]


@pytest.mark.parametrize(("rows", "values"), [([(1, 2)], [1]), ([(1,), (1,)], [1, 0])])
def test_too_few_or_impossible_samples_are_refused(rows, values):
    with pytest.raises(ValueError, match="samples"):
        fit(rows, values)


def test_prefill_and_decode_costs_come_back():
    prefill = [
        PrefillSample(c, n, items, round(8 * (PREFILL.fixed_ns + items * PREFILL.chunk_ns(c, n))))
        for c, n, items in PREFILL_SHAPES
    ]
    cost, quality = fit_prefill(prefill, 8)
    assert msgspec.structs.astuple(cost) == pytest.approx(msgspec.structs.astuple(PREFILL), rel=1e-3)
    assert quality.max_error < 1e-6
    decode = [DecodeSample(c, n, round(DECODE.step_ns([c] * n))) for c, n in DECODE_SHAPES]
    cost, quality = fit_decode(decode)
    assert msgspec.structs.astuple(cost) == pytest.approx(msgspec.structs.astuple(DECODE), rel=1e-3)


def test_control_costs_come_back():
    alone = rates()
    truth = in_cluster(alone)
    found = fit_control(alone, {kind.name: used(truth, kind) for kind in KINDS}, sung(truth))
    for one, other in ((found.control, truth.control), (found.prefill, truth.prefill), (found.decode, truth.decode)):
        assert msgspec.structs.asdict(one) == pytest.approx(msgspec.structs.asdict(other), rel=0.02)
    assert all(quality.max_error < 0.02 for quality in found.fits.values())


def test_engines_that_need_less_in_a_cluster_than_by_themselves_have_steps_as_by_themselves():
    machine = rates()
    of = {kind.name: used(machine, kind) for kind in KINDS}
    less = {
        name: msgspec.structs.replace(
            one, prefill_compute_ns=0.9 * one.prefill_compute_ns, decode_compute_ns=0.9 * one.decode_compute_ns
        )
        for name, one in of.items()
    }
    choir = sung(machine)
    choir = msgspec.structs.replace(
        choir, prefill_compute_ns=0.9 * choir.prefill_compute_ns, decode_compute_ns=0.9 * choir.decode_compute_ns
    )
    found = fit_control(machine, less, choir)
    assert (found.prefill, found.decode) == (machine.prefill, machine.decode)


def measured_by(truth: MachineRates, slowness: float = 1.0) -> dict[str, Busy]:
    """What the crowds would have taken on a machine like `truth`, so many times as slow as it."""
    busy = {}
    for name, crowd in CROWDS.items():
        cluster, _, jct_ns = simulate(setup(truth, crowd, slowness))
        busy[name] = Busy(
            jct_ns=jct_ns,
            cpu_ns=cluster.cpu.busy_core_ns,
            others_cores=0.03,
            reference_ns=slowness * truth.reference_ns,
        )
    return busy


def test_the_slowdown_of_busy_cores_comes_back():
    found = fit_slowdown(rates(reference_ns=0.0), measured_by(rates(slowdown=1.4)))
    assert found.reference_ns == rates().reference_ns
    assert found.slowdown == pytest.approx(1.4, abs=0.03) and found.others_cores == pytest.approx(0.03)
    assert found.fits["how long crowds take"].max_error < 0.02


def test_the_slowdown_is_the_crowds_cpu_time_and_their_times_only_check_it():
    busy = measured_by(rates(slowdown=1.4))
    late = {name: msgspec.structs.replace(one, jct_ns=1.25 * one.jct_ns) for name, one in busy.items()}
    found = fit_slowdown(rates(), late)
    assert found.slowdown == fit_slowdown(rates(), busy).slowdown
    assert found.fits["how long crowds take"].mean_error == pytest.approx(0.2, abs=0.02)


def test_what_is_typical_is_no_outlier_and_never_nothing():
    seen = ((1e9, 9), (10, 1), (12, 2), (14, 3))
    spent = [Used(ttft_s, client, 50.0, 100.0, -3.0, 4.0, 5.0) for client, ttft_s in seen]
    assert typical(spent) == Used(1.25, 13, 50, 100, 1, 4, 5)


def test_kinds_of_lone_requests_tell_the_coefficients_apart():
    import numpy as np

    rows = [(1, kind.prompt_tokens, kind.generate_tokens, kind.messages) for kind in KINDS]
    assert np.linalg.matrix_rank(np.array(rows)) == 4  # and the choir tells tokens from the messages that bring them
    for kind in KINDS:
        assert len(kind.trajectory().rounds) == 1 + kind.count


def test_tables_name_every_transport(capsys):
    from rich.console import Console

    Console(width=140).print(machine_tables(rates()))
    printed = capsys.readouterr().out
    assert "shm, DE → PE" in printed and "how far the fits are off" in printed
