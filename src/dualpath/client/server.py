"""Finds out which kind of server answers, and what it can be asked for.

The engines that agents are replayed against all take ``ignore_eos`` and ``min_tokens``. They differ in their additions:

========  ================  =====================================================================
kind      return_timings    return_token_ids
========  ================  =====================================================================
dualpath  yes               yes
vllm      no                yes
sglang    no                since 0.5: a probe of one token shows it
other     no                a probe of one token shows it
========  ================  =====================================================================

With token ids, a context holds what was really generated (``own``). Without, it holds ids chosen by the replay instead
(``filled``): of the right length and the same in every replay, but no cache of the server holds the KV of *generated*
tokens, and each turn recomputes what the turn before generated.
"""

import asyncio
from typing import Literal

import msgspec

from dualpath.client.http_client import HttpClient, HttpError
from dualpath.spec.cluster_setup import ServedCluster

ServerKind = Literal["dualpath", "vllm", "sglang", "other"]
ContextKind = Literal["own", "filled"]
_KINDS: tuple[ServerKind, ...] = ("dualpath", "vllm", "sglang")
MODELS_DEADLINE_S = 10.0


class ServerError(Exception):
    """No OpenAI server answers."""


class ServedModel(msgspec.Struct, frozen=True):
    """A server and the model it serves."""

    model: str
    kind: ServerKind
    returns_token_ids: bool
    cluster: ServedCluster | None = None
    """The cluster that a DualPath server describes."""

    @property
    def returns_timings(self) -> bool:
        return self.kind == "dualpath"

    @property
    def context(self) -> ContextKind:
        return "own" if self.returns_token_ids else "filled"


class _Model(msgspec.Struct):
    id: str
    owned_by: str = ""
    cluster: object = None


class _Models(msgspec.Struct):
    data: list[_Model]


async def find_server(client: HttpClient, url: str, kind: ServerKind | None = None) -> ServedModel:
    """Returns the first listed model, and the kind of its server: `kind`, or told by `owned_by`. Raises ServerError.

    The kind says whether it returns token ids; `dualpath.client.completion.asked_for_token_ids` finds out more.
    """
    try:
        async with asyncio.timeout(MODELS_DEADLINE_S):
            response = await client.request("GET", "/v1/models")
        if response.status != 200:
            raise HttpError(f"HTTP {response.status}: {response.body[:300].decode(errors='replace')}")
        models = msgspec.json.decode(response.body, type=_Models).data
    except (HttpError, TimeoutError, msgspec.MsgspecError) as error:
        said = str(error) or f"nothing within {MODELS_DEADLINE_S:g} s"
        raise ServerError(f"{url}: /v1/models does not answer as an OpenAI server's: {said}") from error
    if not models:
        raise ServerError(f"{url}: /v1/models lists no model")
    owner = models[0].owned_by.lower()
    found: ServerKind = next((known for known in _KINDS if known == owner), "other")
    found = kind or found
    return ServedModel(
        models[0].id, found, returns_token_ids=found in ("dualpath", "vllm"), cluster=_cluster(models[0])
    )


def _cluster(model: _Model) -> ServedCluster | None:
    """Returns None if another kind of server, or another version of ours, has something else in the field."""
    try:
        return msgspec.convert(model.cluster, ServedCluster | None)
    except msgspec.ValidationError:
        return None
