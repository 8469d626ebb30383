"""A profile: measured step times and rates of one engine, in one JSON file, made by `dualpath profile` or by hand.

A profile must have `version`, `model` and a few samples of either kind (docs/design/profile.md has an example). If a
rate is missing, the cluster's own is used. A profile is for one model on one kind of engine; `applied` replaces a
cluster's roofline with it.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from dualpath.lab.facts.cluster import ClusterSpec
from dualpath.lab.facts.cluster_files import load_cluster
from dualpath.lab.facts.step_times import DecodeSample, MeasuredEngine, PrefillSample, StepTimes, fit_step_times

Rate = Annotated[float, msgspec.Meta(gt=0)] | None


class ProfileError(ValueError):
    """A profile can't be read, or is for something else. The message names the file and the field."""


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes per second; None: not measured."""

    store_read_bytes_per_s: Rate = None
    """Storage to one node's buffer."""
    store_write_bytes_per_s: Rate = None
    """One node's buffer to storage, until durable."""
    transfer_bytes_per_s: Rate = None
    """One engine to another."""
    copy_bytes_per_s: Rate = None
    """Between an engine's buffer and its device."""


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured, when, and with what. None and empty: unknown."""

    host: str = ""
    device: str = ""
    cores: Annotated[int, msgspec.Meta(ge=1)] | None = None
    threads: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Compute threads of an engine on a CPU; None: the engine does not compute on the host's cores."""
    dtype: str = ""
    date: str = ""
    versions: dict[str, str] = {}
    load_average: float | None = None
    """Load average before the measurement: other jobs on the machine."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The profile's content. Times in nanoseconds, lengths in tokens."""

    version: Literal[1]
    model: str
    """The model's name as `dualpath plan` shows it: a known name, or that of a checkpoint's directory."""
    prefill: Annotated[tuple[PrefillSample, ...], msgspec.Meta(min_length=1)]
    decode: Annotated[tuple[DecodeSample, ...], msgspec.Meta(min_length=1)]
    rates: Rates = Rates()
    request_ns: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Time of a request up to its first token, besides reads, steps and transfers: HTTP, control, processes."""
    token_ns: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Time of every further token besides its step."""
    kv_bytes_per_token: Annotated[int, msgspec.Meta(gt=0)] | None = None
    """Bytes over all layers; None: the cluster's model decides."""
    machine: Machine = Machine()

    def step_times(self) -> StepTimes:
        """The lines through the samples."""
        return fit_step_times(self.prefill, self.decode)

    def engine(self) -> MeasuredEngine:
        """The engine for a cluster: a token's time besides its step becomes part of the step."""
        times = self.step_times()
        return MeasuredEngine(
            times=msgspec.structs.replace(times, decode_fixed_ns=times.decode_fixed_ns + self.token_ns),
            request_ns=self.request_ns,
            copy_bytes_per_s=self.rates.copy_bytes_per_s,
        )


def load_profile(path: Path) -> Profile:
    """Reads and checks a profile. Raises ProfileError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ProfileError(f"{path} can't be read: {error.strerror}; make one with dualpath profile") from error
    except msgspec.ValidationError as error:
        raise ProfileError(f"{path} is not a profile of version 1: {error}") from error
    except msgspec.DecodeError as error:
        raise ProfileError(f"{path} is not JSON: {error}") from error


def find_cluster(
    cluster: str | Path | ClusterSpec, model: str | None = None, profile: Path | Profile | None = None
) -> ClusterSpec:
    """Finds a preset, a TOML file or a record, and applies another model and a profile if given.

    Raises ClusterError, ModelConfigError, ProfileError.
    """
    spec = cluster if isinstance(cluster, ClusterSpec) else load_cluster(cluster)
    if model is not None:
        spec = spec.with_model(model)
    if profile is None:
        return spec
    where = f"the profile of {profile.model}" if isinstance(profile, Profile) else str(profile)
    return applied(spec, profile if isinstance(profile, Profile) else load_profile(profile), where)


def applied(cluster: ClusterSpec, profile: Profile, where: str) -> ClusterSpec:
    """Returns the cluster with measured steps and rates. A link stays no faster than the cluster says.

    Raises ProfileError naming `where` if the profile is for another model.
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
    rates, changed, whole = profile.rates, {}, {}
    links = {"snic": rates.store_read_bytes_per_s, "cnic": rates.transfer_bytes_per_s}
    for link, rate in links.items():
        if rate is not None:
            given = getattr(cluster, f"{link}_bytes_per_s")
            slower = tuple(min(one, rate) for one in given) if isinstance(given, tuple) else min(given, rate)
            changed[f"{link}_bytes_per_s"] = slower
            whole[link] = 1.0
    return msgspec.structs.replace(
        cluster,
        efficiency=msgspec.structs.replace(cluster.efficiency, **whole),
        measured=profile.engine(),
        **changed,
    )
