"""A profile: what one engine and its links were measured to do. One JSON file, made by `dualpath profile` or by hand.

`version`, `model` and a few samples of either kind must be there (docs/design/profile.md has an example); a rate left
out is the cluster's own. A profile is for one model on one kind of engine: `applied` puts it in the place of the
roofline of a cluster.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from dualpath.lab.facts.cluster import ClusterSpec
from dualpath.lab.facts.step_times import DecodeSample, MeasuredEngine, PrefillSample, StepTimes, fit_step_times

Rate = Annotated[float, msgspec.Meta(gt=0)] | None


class ProfileError(ValueError):
    """A profile that can't be read, or is for something else. The message names the file and the field."""


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes per second; None: not measured."""

    store_read_bytes_per_s: Rate = None
    """Storage to the buffer of one node."""
    store_write_bytes_per_s: Rate = None
    """Back again, until it is durable."""
    transfer_bytes_per_s: Rate = None
    """From one engine to another."""
    copy_bytes_per_s: Rate = None
    """Between an engine's buffer and its device."""


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured, when, and with what. None and empty: not said."""

    host: str = ""
    device: str = ""
    cores: Annotated[int, msgspec.Meta(ge=1)] | None = None
    threads: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Compute threads of an engine on a CPU; None: the engine does not compute on the host's cores."""
    dtype: str = ""
    date: str = ""
    versions: dict[str, str] = {}
    load_average: float | None = None
    """Before anything was measured: what other jobs there were."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the module's docstring. Times in nanoseconds, lengths in tokens."""

    version: Literal[1]
    model: str
    """As `dualpath plan` shows it: a known name, or that of the folder of a checkpoint."""
    prefill: Annotated[tuple[PrefillSample, ...], msgspec.Meta(min_length=1)]
    decode: Annotated[tuple[DecodeSample, ...], msgspec.Meta(min_length=1)]
    rates: Rates = Rates()
    request_ns: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """What a request waits for besides reads, steps and transfers, up to its first token: HTTP, control, processes."""
    token_ns: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """What every further token takes besides its step."""
    kv_bytes_per_token: Annotated[int, msgspec.Meta(gt=0)] | None = None
    """Over all layers; None: whatever the cluster's model has."""
    machine: Machine = Machine()

    def step_times(self) -> StepTimes:
        """The lines through the samples."""
        return fit_step_times(self.prefill, self.decode)

    def engine(self) -> MeasuredEngine:
        """For a cluster: what a token takes besides its step is part of the step."""
        times = self.step_times()
        return MeasuredEngine(
            times=msgspec.structs.replace(times, decode_fixed_ns=times.decode_fixed_ns + self.token_ns),
            request_ns=self.request_ns,
            copy_bytes_per_s=self.rates.copy_bytes_per_s,
        )


def load_profile(path: Path) -> Profile:
    """Read and check a profile. Raises ProfileError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ProfileError(f"{path} can't be read: {error.strerror}; make one with dualpath profile") from error
    except msgspec.ValidationError as error:
        raise ProfileError(f"{path} is not a profile of version 1: {error}") from error
    except msgspec.DecodeError as error:
        raise ProfileError(f"{path} is not JSON: {error}") from error


def applied(cluster: ClusterSpec, profile: Profile, where: str) -> ClusterSpec:
    """The cluster with measured steps and rates. A link is no faster than the cluster says it is.

    Raises ProfileError naming `where` if the profile is another model's.
    """
    if profile.model != cluster.model.name:
        raise ProfileError(
            f"{where} is of the model {profile.model!r}, the cluster runs {cluster.model.name!r}; give a profile of "
            "that model, or the profile's model with --model"
        )
    kv_bytes = cluster.kv_bytes_per_token
    if profile.kv_bytes_per_token not in (None, kv_bytes):
        raise ProfileError(
            f"{where} was measured with {profile.kv_bytes_per_token} bytes of KV a token, the cluster has {kv_bytes}; "
            "their kv_dtype must be the same"
        )
    efficiency, rates = cluster.efficiency, profile.rates
    links = {"snic": rates.store_read_bytes_per_s, "cnic": rates.transfer_bytes_per_s}
    for link, rate in links.items():
        if rate is not None:
            share = min(1.0, rate / getattr(cluster, f"{link}_bytes_per_s"))
            efficiency = msgspec.structs.replace(efficiency, **{link: share})
    return msgspec.structs.replace(
        cluster,
        efficiency=efficiency,
        measured=profile.engine(),
    )
