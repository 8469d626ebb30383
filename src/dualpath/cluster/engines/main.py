"""An engine process from start to end: load the model, measure, join, work, leave.

The supervisor's fork server starts it, after importing this module (and so torch) once for all engines of a host; or
`dualpath engine` does. Read `host` next, then `prefill` and `decode`.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable

import torch
from transformers.utils import logging as transformers_log

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.engines.decode import DecodeWorker
from dualpath.cluster.engines.host import EngineHost
from dualpath.cluster.engines.orders import EngineOrders
from dualpath.cluster.engines.prefill import PrefillWorker
from dualpath.cluster.messages import EngineConfig, Join, ToEngine
from dualpath.cluster.orders import EngineOrder
from dualpath.core.batching import AttentionCost
from dualpath.core.vocabulary import Role
from dualpath.kv import StoreError
from dualpath.model import LoadedModel, model_fingerprint, profile_attention
from dualpath.spec.log import ROOT, start_log

Tell = Callable[[str], None]
"""Takes a step of an engine's start, in the words that are logged."""


def run_engine(config: EngineConfig, tell: Tell | None = None) -> None:
    """Serve until told to leave. Exits with code 1 when the engine can't start or breaks, and tells why.

    Without `tell`, the steps of the start go to this process's log.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl-C
    cluster = config.cluster
    start_log(cluster.log_format)
    tell = tell or logging.getLogger(f"{ROOT}.engine {config.name}").info
    transformers_log.disable_progress_bar()  # several engines' bars on one terminal are unreadable, and no log's line
    torch.set_num_threads(cluster.threads)
    try:
        model = _load(cluster, tell)
        reason = asyncio.run(_serve(config, model, tell))
    except (OSError, StoreError, ValueError, torch.OutOfMemoryError) as error:
        tell(f"can't run: {' '.join(str(error).split())}")
        raise SystemExit(1) from error
    if reason.startswith("internal error"):
        raise SystemExit(1)


def _load(cluster: ClusterConfig, tell: Tell) -> LoadedModel:
    """Raises ValueError whatever is wrong with the checkpoint: its readers have errors of many kinds."""
    if cluster.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {cluster.device}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    tell(f"loads weights from {cluster.model}")
    try:
        return LoadedModel.load(cluster.model, device=cluster.device, dtype=cluster.dtype, threads=cluster.threads)
    except Exception as error:
        raise ValueError(f"{cluster.model} can't be loaded: {type(error).__name__}: {error}") from error


async def _serve(config: EngineConfig, model: LoadedModel, tell: Tell) -> str:
    cluster = config.cluster
    block_bytes = model.layout.full_block_bytes
    buffer_blocks = cluster.buffer_bytes // block_bytes
    hbm_blocks = cluster.hbm_bytes // block_bytes if config.role is Role.DECODE else 0
    if buffer_blocks < 1 or (config.role is Role.DECODE and hbm_blocks < 1):
        raise ValueError(
            f"a Full Block of this model is {block_bytes} bytes; --buffer {cluster.buffer_bytes} or --hbm "
            f"{cluster.hbm_bytes} does not hold one"
        )
    host = EngineHost(config, model.layout, buffer_blocks)
    loop = asyncio.get_running_loop()
    worker: PrefillWorker | DecodeWorker | None = None
    orders: EngineOrders | None = None
    try:
        prefill_tokens_per_s = None
        # On the compute thread, so that its memory and kernels are warm for the first request.
        if config.role is Role.PREFILL:
            tell("measures how fast it prefills")
            worker = PrefillWorker(host, model, _attention_cost(model))
            prefill_tokens_per_s = await loop.run_in_executor(host.compute, worker.measure_tokens_per_s)
        else:
            tell("warms up")
            worker = DecodeWorker(host, model, hbm_blocks)
            await loop.run_in_executor(host.compute, worker.warm_up)
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # `fork_server` says why it may be
            loop.add_signal_handler(signal.SIGTERM, host.leave, "terminated")
        join = _join_message(config, model, host, hbm_blocks, prefill_tokens_per_s)
        orders = EngineOrders(host, model, worker)
        tell("joins")
        reason = await host.run(join, _handler(worker, orders))
        host.log(f"leaves: {reason}")
        return reason
    finally:
        for part in (orders, worker):
            if part is not None:
                part.close()
        host.close()


def _handler(worker: PrefillWorker | DecodeWorker, orders: EngineOrders) -> Callable[[ToEngine], None]:
    """Returns what handles every message: orders of the operator, and those about requests."""
    return lambda message: orders.handle(message) if isinstance(message, EngineOrder) else worker.handle(message)


def _join_message(
    config: EngineConfig, model: LoadedModel, host: EngineHost, hbm_blocks: int, prefill_tokens_per_s: float | None
) -> Join:
    return Join(
        role=config.role,
        pid=os.getpid(),
        host=socket.gethostname(),
        buffer_blocks=host.pool.pages,
        hbm_blocks=hbm_blocks,
        data_address=host.server.address,
        layout=model.layout,
        model_fingerprint=model_fingerprint(config.cluster.model),
        max_model_len_tokens=model.max_length_tokens,
        vocab_size=model.vocab_size,
        eos_token_ids=tuple(model.eos_token_ids),
        prefill_tokens_per_s=prefill_tokens_per_s,
        name=config.name,
    )


def _attention_cost(model: LoadedModel) -> AttentionCost:
    fixed_ns, ns_per_flop = profile_attention(model)
    return AttentionCost(
        fixed_ns=fixed_ns,
        ns_per_flop=ns_per_flop,
        flops_per_token=model.attention_flops_per_token,
        flops_per_pair=model.attention_flops_per_pair,
    )
