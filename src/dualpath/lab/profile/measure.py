"""`measure_profile`: measures a whole profile of this machine in about a minute."""

import datetime
import os
import platform
import socket
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from dualpath.lab.facts.profile import Machine, Profile
from dualpath.lab.profile.lone import measure_lone
from dualpath.lab.profile.moves import measure_rates
from dualpath.lab.profile.steps import RUNS, measure_decode, measure_prefill
from dualpath.model import LoadedModel

Progress = Callable[[str, float], None]
"""Called with what is being measured and the share that is done, 0 to 1."""
PARTS = 2 * (RUNS + 1) + 4


class ProfileOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure: a checkpoint's directory, and the engines as `dualpath serve` starts them."""

    model: Path
    store: Path
    """Directory under which test blocks are written and removed."""
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"


def measure_profile(options: ProfileOptions, on_progress: Progress) -> Profile:
    """Raises LaunchError and ReplayError; for an unusable model ValueError, OSError and UnsupportedModelError."""
    load_average = os.getloadavg()[0]
    done = 0

    def advance(what: str, parts: int = 1) -> None:
        nonlocal done
        done += parts
        on_progress(what, done / PARTS)

    on_progress("loading the model", 0)
    model = LoadedModel.load(options.model, options.device, options.dtype, options.threads)
    prefill = measure_prefill(model, lambda: advance("prefill steps"))
    decode = measure_decode(model, lambda: advance("decode steps"))
    rates = measure_rates(model, options.store)
    advance("store and links")
    layout = model.layout
    profile = Profile(
        version=1,
        model=options.model.resolve().name,
        prefill=tuple(prefill),
        decode=tuple(decode),
        rates=rates,
        kv_bytes_per_token=layout.kv_bytes.bytes_per_token,
        machine=_machine(options, load_average),
    )
    del model
    advance("lone requests to a small cluster")
    serve = ("--dtype", options.dtype, "--threads", str(options.threads), "--device", options.device)
    request_ns, token_ns = measure_lone(options.model, options.store, serve, profile.step_times())
    advance("", 2)
    return msgspec.structs.replace(profile, request_ns=request_ns, token_ns=token_ns)


def _machine(options: ProfileOptions, load_average: float) -> Machine:
    on_cpu = torch.device(options.device).type == "cpu"
    return Machine(
        host=socket.gethostname(),
        device=f"{platform.machine()} CPU" if on_cpu else torch.cuda.get_device_name(options.device),
        cores=len(os.sched_getaffinity(0)),
        threads=options.threads if on_cpu else None,
        dtype=options.dtype,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: version(name) for name in ("dualpath", "torch", "transformers")},
        load_average=load_average,
    )
