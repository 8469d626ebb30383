"""What ``kv_connector_extra_config`` says, and the parameters of a request."""

from typing import Any, TypeVar

import msgspec

from dualpath.core.vocabulary import Role
from dualpath.spec.bounds import Count, Name

PARAMETERS = "dualpath"
"""The key of ours in a request's ``kv_transfer_params``."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The connector's settings."""

    role: Role
    agent: str
    """The Unix socket of the node's agent."""
    url: str
    """Where this server's HTTP API is, as the router and the agent reach it."""
    name: Name
    """The engine's, unique in the cluster. Data-parallel ranks append theirs."""
    ticket: Name = ""
    data_parallel: bool = False
    """Several data-parallel ranks are behind `url`."""
    weights: Name = ""
    """Identity of the weights, where `fingerprint` can't read safetensors files."""


def read_settings(extra: dict[str, Any]) -> Settings:
    """Raises ValueError for a key that is missing, unknown or of another type."""
    try:
        return msgspec.convert(extra, Settings)
    except msgspec.ValidationError as error:
        known = ", ".join(Settings.__struct_fields__)
        raise ValueError(f"kv_connector_extra_config: {error}; its keys are {known}") from None


Parameters = TypeVar("Parameters")


class PrefillParameters(msgspec.Struct, frozen=True):
    """Of a request to a prefill engine."""

    owner: tuple[Count, Count]
    hit_tokens: Count


class DecodeParameters(msgspec.Struct, frozen=True):
    """Of a request to a decode engine."""

    owner: tuple[Count, Count]
    prompt_tokens: Count


def prefill_parameters(parameters: dict[str, Any] | None) -> PrefillParameters | None:
    """Returns None for a request that is not ours, or says it wrongly."""
    return _convert(parameters, PrefillParameters)


def decode_parameters(parameters: dict[str, Any] | None) -> DecodeParameters | None:
    return _convert(parameters, DecodeParameters)


def _convert(parameters: dict[str, Any] | None, kind: type[Parameters]) -> Parameters | None:
    ours = parameters.get(PARAMETERS) if isinstance(parameters, dict) else None
    if ours is None:
        return None
    try:
        return msgspec.convert(ours, kind)
    except msgspec.ValidationError:
        return None
