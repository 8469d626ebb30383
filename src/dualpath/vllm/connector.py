"""`DualPathConnector`: vLLM's hooks, each passed to the half that it is for. Nothing else here imports vLLM."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from dualpath.core.vocabulary import Role
from dualpath.thread_names import named_threads
from dualpath.vllm.agent_link import AgentLink
from dualpath.vllm.copies import Copies, CudaCopies
from dualpath.vllm.decode_scheduler import DecodeScheduler
from dualpath.vllm.decode_worker import DecodeWorker
from dualpath.vllm.device_layout import arrangement, layer_names, rows, worker_part
from dualpath.vllm.engine_facts import attach_worker
from dualpath.vllm.prefill_scheduler import PrefillScheduler
from dualpath.vllm.prefill_worker import PrefillWorker
from dualpath.vllm.refusals import refuse, takes_hits
from dualpath.vllm.settings import Settings, read_settings
from dualpath.vllm.steps import DecodeStep, PrefillStep
from dualpath.vllm.versions import LAYOUT, check_version

_log = logging.getLogger("vllm.dualpath")


@dataclass(slots=True)
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What vLLM carries from its scheduler to its workers with a step."""

    step: PrefillStep | DecodeStep


class DualPathConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """vLLM makes one in its scheduler and one in each worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Raises ValueError for settings that are wrong and for what can't be served."""
        check_version(vllm.__version__)
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings: Settings = read_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        refuse(vllm_config, kv_cache_config, self._settings.role)
        self._prefill: PrefillWorker | None = None
        self._decode: DecodeWorker | None = None
        self._link: AgentLink | None = None
        self._scheduler: PrefillScheduler | DecodeScheduler = DecodeScheduler()
        if self._settings.role is Role.PREFILL:
            hits = takes_hits(vllm_config)
            self._scheduler = PrefillScheduler(vllm_config.cache_config.block_size, takes_hits=hits)
            if not hits:
                _log.warning("MLA on this CPU can't compute behind loaded KV: hits are computed again")

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A prefill engine's layers wait and are saved one by one."""
        return extra_config.get("role") == Role.PREFILL.value

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        return None if vllm_config.model_config.use_mla else LAYOUT

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a prefill engine has saved a step's KV when the step ends, so a preemption loses none."""
        return False

    # ── in the scheduler ────────────────────────────────────────────────────────────────────────────────────────────

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if isinstance(self._scheduler, DecodeScheduler):
            self._scheduler.allocated(request, blocks, num_external_tokens)
        else:
            self._scheduler.allocated(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return StepMetadata(self._scheduler.step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        if isinstance(self._scheduler, DecodeScheduler):
            self._scheduler.received(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: Sequence[list[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        if isinstance(self._scheduler, DecodeScheduler):
            return self._scheduler.finished(request, block_ids[0]), None
        self._scheduler.finished(request)
        return False, None

    # ── in a worker ─────────────────────────────────────────────────────────────────────────────────────────────────

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM has made its KV cache: attach to the agent. Raises ValueError for KV that can't be copied as it lies."""
        config, settings = self._vllm_config, self._settings
        rank, ranks = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
        names, blocks = layer_names(kv_caches), self._kv_cache_config.num_blocks
        self._layer = {name: index for index, name in enumerate(names)}
        layers = [rows(kv_caches[name], blocks) for name in names]
        if len({layer.data_ptr() for layer in layers}) < len(layers):
            raise ValueError("DualPathConnector: layers that share their KV are not supported")
        spec = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        part = worker_part(spec, config.model_config.hf_text_config, len(names), layers[0].shape[1], rank, ranks)
        arranged = {
            "backend": self._backend(names[0]),
            "order": arrangement(kv_caches[names[0]]),
            "block_size": spec.block_size,
            "dtype": part.layout.dtype,
            "model_dtype": str(config.model_config.dtype),
        }
        hello = attach_worker(settings, config, part, arranged, blocks=blocks, rank=rank)
        self._link = AgentLink(settings.agent, hello)
        copies = (CudaCopies if layers[0].is_cuda else Copies)(part, layers)
        if settings.role is Role.PREFILL:
            self._prefill = PrefillWorker(copies, self._link.say)
            self._link.start(self._prefill)
        else:
            copying = named_threads(1, "dp-copies")
            self._decode = DecodeWorker(copies, self._link.say, copying, tells=rank == 0)
            self._link.start(self._decode)

    def _backend(self, layer: str) -> str:
        return str(self._vllm_config.compilation_config.static_forward_context[layer].attn_backend.get_name())

    def handle_preemptions(self, kv_connector_metadata: StepMetadata) -> None:
        """The first hook of a step: nothing of it has been written."""
        step = kv_connector_metadata.step
        if self._prefill is not None and isinstance(step, PrefillStep):
            self._prefill.begin(step)
        elif self._decode is not None and isinstance(step, DecodeStep):
            self._decode.begin(step)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self._prefill is not None:
            self._prefill.start()
        elif self._decode is not None:
            self._decode.load(self._get_connector_metadata().step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._prefill is not None:
            self._prefill.load(self._layer[layer_name])

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self._prefill is not None:
            self._prefill.save(self._layer[layer_name])

    def wait_for_save(self) -> None:
        if self._prefill is not None:
            self._prefill.end()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002
        if self._decode is None:
            return None, None
        sent, received = self._decode.take_finished()
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        worker = self._prefill or self._decode
        return set() if worker is None else worker.take_errors()

    def shutdown(self) -> None:
        if self._link is not None:
            self._link.close()
