"""What of vLLM the connector reads, and the versions where it is so; `tests/vllm/test_interface.py` holds them to it.

Equal in all of them: the hooks of `KVConnectorBase_V1` and their order in a step (`handle_preemptions` before a block
is overwritten, `start_load_kv` before the forward only when a request loads synchronously), and a layer's KV as a view
``[blocks, heads, tokens, K‖V]``.
"""

from collections.abc import Sequence
from typing import Any, Protocol

SUPPORTED = ("0.30", "0.31", "0.32")
LAYOUT = "LBHNC"
"""vLLM's name for a KV layout in which a layer's block is one run of bytes, head after head."""


def check_version(version: str) -> None:
    """Raises ValueError for a vLLM of which it is not known that the connector works there."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise ValueError(
            f"DualPathConnector: vLLM {version} is not supported; install one of {', '.join(SUPPORTED)} (and .x)"
        )


class Request(Protocol):
    """``vllm.v1.request.Request``, in the scheduler's process."""

    request_id: str
    kv_transfer_params: dict[str, Any] | None
    num_prompt_tokens: int
    num_computed_tokens: int
    num_preemptions: int
    all_token_ids: Sequence[int]
    mm_features: Sequence[Any]
    lora_request: Any
    prompt_embeds: Any

    @property
    def num_tokens(self) -> int: ...

    def get_finished_reason(self) -> Any: ...


class Blocks(Protocol):
    """``vllm.v1.core.kv_cache_manager.KVCacheBlocks``."""

    def get_block_ids(self) -> tuple[list[int], ...]: ...


class NewRequest(Protocol):
    req_id: str
    block_ids: tuple[list[int], ...]


class CachedRequests(Protocol):
    req_ids: list[str]
    resumed_req_ids: set[str]
    new_block_ids: Sequence[tuple[list[int], ...] | None]


class SchedulerOutput(Protocol):
    """``vllm.v1.core.sched.output.SchedulerOutput``."""

    @property
    def scheduled_new_reqs(self) -> Sequence[NewRequest]: ...

    @property
    def scheduled_cached_reqs(self) -> CachedRequests: ...

    num_scheduled_tokens: dict[str, int]


class ConnectorOutput(Protocol):
    """``vllm.v1.outputs.KVConnectorOutput``."""

    finished_recving: set[str] | None


def new_blocks(output: SchedulerOutput) -> list[tuple[str, bool, list[int]]]:
    """Returns request, whether they replace its earlier blocks, and the device blocks that a step gives it."""
    given = [(new.req_id, True, list(new.block_ids[0])) for new in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    for request, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
        if blocks is not None:
            given.append((request, request in cached.resumed_req_ids, list(blocks[0])))
    return given
