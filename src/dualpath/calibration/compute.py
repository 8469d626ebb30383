"""What an engine computes: prefill and decode costs fitted to measured steps, alone and beside others.

*Beside others*: one process more for every core, and one beyond, each running the same steps at the same time. CPU time
of a step then says what busy cores take from each other (caches, memory, clock); wall time with one process too many
says whether the kernel shares the cores as a processor-sharing model has it.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection

from dualpath.calibration.fitting import fit
from dualpath.engine import DecodeEngine, LayerwisePrefill, LoadedModel, PrefillItem
from dualpath.engine.step_profiling import (
    DecodeSample,
    NoTransfers,
    PrefillSample,
    measure_decode,
    measure_prefill,
)
from dualpath.prediction.machine import DecodeCost, Fit, PrefillCost, new_pairs
from dualpath.spec.sampling import SamplingParams

TOGETHER_S = 2.0
"""How long processes compute side by side."""
START_TIMEOUT_S = 120.0
LEAVE_S = 3.0
CONTEXT_TOKENS, NEW_TOKENS = 2048, 64
SEQUENCES = 4
ROOM_TOKENS = 5
"""Tokens a sequence generates, the first one (the prefill's) included."""


def fit_prefill(samples: list[PrefillSample], layers: int) -> tuple[PrefillCost, Fit]:
    """Per layer."""
    rows = []
    for sample in samples:
        item = (1, sample.new_tokens, sample.new_tokens * sample.cached_tokens, new_pairs(sample.new_tokens))
        rows.append((1, *(sample.items * feature for feature in item)))
    (fixed, one, token, cached, new), quality = fit(rows, [sample.total_ns / layers for sample in samples])
    cost = PrefillCost(fixed_ns=fixed, item_ns=one, token_ns=token, cached_pair_ns=cached, new_pair_ns=new)
    return cost, quality


def fit_decode(samples: list[DecodeSample]) -> tuple[DecodeCost, Fit]:
    """Of a whole step."""
    rows = [(1, s.sequences, s.sequences * s.context_tokens, s.context_tokens) for s in samples]
    (fixed, request, token, longest), quality = fit(rows, [sample.step_ns for sample in samples])
    cost = DecodeCost(fixed_ns=fixed, request_ns=request, context_token_ns=token, longest_token_ns=longest)
    return cost, quality


def measure_compute(model: LoadedModel) -> tuple[PrefillCost, DecodeCost, dict[str, Fit]]:
    """Alone."""
    prefill, prefill_fit = fit_prefill(measure_prefill(model), model.layout.layers)
    decode, decode_fit = fit_decode(measure_decode(model))
    return prefill, decode, {"prefill": prefill_fit, "decode": decode_fit}


def measure_sharing(path: str, dtype: str, threads: int, cores: int) -> tuple[float, float]:
    """Slowdown with as many engines as the cores can take, and the error of processor sharing with one too many."""
    most = max(1, cores // threads)
    (alone_ns, _), (busy_ns, _), (_, wall_ns) = (
        _together(path, dtype, threads, engines) for engines in (1, most, most + 1)
    )
    expected_ns = busy_ns * max(1.0, (most + 1) * threads / cores)
    return busy_ns / alone_ns, wall_ns / expected_ns - 1


def _together(path: str, dtype: str, threads: int, engines: int) -> tuple[float, float]:
    """`engines` processes at once: CPU (per thread) and wall nanoseconds of a round of steps, in the mean."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once for all of them
    ends: list[Connection] = []
    processes = []
    try:
        for _ in range(engines):
            ours, theirs = context.Pipe()
            process = context.Process(target=_compute, args=(path, dtype, threads, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            ends.append(ours)
        for end in ends:
            _receive(end)
        for end in ends:
            end.send_bytes(b"go")
        figures = [_receive(end).split() for end in ends]
    finally:
        for end in ends:
            end.close()
        for process in processes:
            process.join(LEAVE_S)
            process.kill()
            process.join()
    cpu_ns, wall_ns = (sum(float(one[i]) for one in figures) / engines for i in (0, 1))
    return cpu_ns, wall_ns


def _receive(end: Connection) -> bytes:
    try:
        if not end.poll(START_TIMEOUT_S):
            raise RuntimeError(f"a computing process said nothing for {START_TIMEOUT_S:g} s")
        return end.recv_bytes()
    except EOFError:
        raise RuntimeError("a computing process died; its message is above") from None


def _compute(path: str, dtype: str, threads: int, end: Connection) -> None:
    """In a process of its own: ready, go, figures."""
    work = _Round(LoadedModel.load(path, dtype=dtype, threads=threads))
    work.run()
    end.send_bytes(b"ready")
    end.recv_bytes()
    started, used, rounds = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < started + TOGETHER_S:
        work.run()
        rounds += 1
    wall, cpu = time.perf_counter() - started, (time.process_time() - used) / threads
    end.send_bytes(f"{cpu * 1e9 / rounds} {wall * 1e9 / rounds}".encode())
    work.close()


class _Round:
    """A prefill batch and a few decode steps: an engine's day in small."""

    def __init__(self, model: LoadedModel) -> None:
        new = min(NEW_TOKENS, model.max_length_tokens // 2)
        context = min(CONTEXT_TOKENS, model.max_length_tokens - max(new, ROOM_TOKENS))
        self._items = [PrefillItem([0] * new, context)]
        self._prefill = LayerwisePrefill(model)
        self._decode = DecodeEngine(model, SEQUENCES * -(-(context + ROOM_TOKENS) // model.layout.block_tokens))
        self._room = SamplingParams(max_tokens=ROOM_TOKENS, temperature=0, ignore_eos=True)
        self._context = context
        self._next_sequence = 0

    def run(self) -> None:
        self._prefill.run(self._items, NoTransfers())
        first, self._next_sequence = self._next_sequence, self._next_sequence + SEQUENCES
        for sequence in range(first, first + SEQUENCES):
            self._decode.admit(sequence, self._context, 0, self._room)
            self._decode.join(sequence)
        for _ in range(ROOM_TOKENS - 1):
            self._decode.step()
        for sequence in range(first, first + SEQUENCES):
            self._decode.release(sequence)

    def close(self) -> None:
        self._prefill.close()
