"""What a worker says of its engine when it attaches, read from vLLM's configuration and its KV cache."""

import os
from typing import Any

from dualpath.cluster.attachment import Attach
from dualpath.cluster.vllm_attachment import AttachWorker
from dualpath.core.vocabulary import BLOCK_TOKENS, Role
from dualpath.vllm.copies import WorkerPart
from dualpath.vllm.fingerprint import fingerprint, weights_folder
from dualpath.vllm.settings import Settings


def attach_worker(
    settings: Settings, config: Any, part: WorkerPart, arrangement: dict[str, Any], *, blocks: int, rank: int
) -> AttachWorker:
    """`config` is vLLM's ``VllmConfig``, `blocks` the number of its device blocks.

    Raises ValueError when the weights can't be identified.
    """
    model, parallel = config.model_config, config.parallel_config
    ranks, dp_rank = parallel.tensor_parallel_size, _dp_rank(settings, parallel)
    weights = settings.weights or weights_folder(model.model, model.revision)
    name = model.served_model_name
    return AttachWorker(
        engine=Attach(
            role=settings.role,
            name=settings.name if dp_rank is None else f"{settings.name}-dp{dp_rank}",
            pid=os.getpid() if ranks == 1 else os.getppid(),  # vLLM's engine process, the same at all workers
            layout=part.layout,
            model_fingerprint=fingerprint(model.hf_config.to_dict(), arrangement, weights),
            max_model_len_tokens=model.max_model_len,
            vocab_size=model.get_vocab_size(),
            eos_token_ids=_eos_token_ids(model),
            hbm_blocks=(blocks - 1) * part.block_size // BLOCK_TOKENS if settings.role is Role.DECODE else 0,
            scores_prompts=False,
            ticket=settings.ticket,
        ),
        rank=rank,
        workers=ranks,
        url=settings.url,
        model=name[0] if isinstance(name, list) else name,
        dp_rank=dp_rank,
    )


def _dp_rank(settings: Settings, parallel: Any) -> int | None:
    """vLLM gives data-parallel ranks of a dense model a configuration as if each were alone, but for this index."""
    if parallel.data_parallel_size > 1 or parallel.data_parallel_index > 0 or settings.data_parallel:
        return int(parallel.data_parallel_index)
    return None


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    ids = model.try_get_generation_config().get("eos_token_id", model.hf_config.eos_token_id)
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)
