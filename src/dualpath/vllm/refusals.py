"""What can't be served, said by name when vLLM starts. `config` is vLLM's ``VllmConfig``."""

from typing import Any

from dualpath.core.vocabulary import BLOCK_TOKENS, Role

DTYPES = ("float32", "bfloat16", "float16")


def refuse(config: Any, kv_cache_config: Any, role: Role) -> None:
    """Raises ValueError that says what of vLLM's configuration can't be and what to do."""
    for refusal in (
        _transfer(config),
        _parallel(config),
        _cache(config, role),
        _model(config),
        _groups(kv_cache_config),
    ):
        if refusal:
            raise ValueError(f"DualPathConnector: {refusal}")


def takes_hits(config: Any) -> bool:
    """False where attention can't run behind KV that was loaded: vLLM's MLA for a CPU without AMX. Such a prefill
    engine computes whole prompts.
    """
    chunked = config.scheduler_config.enable_chunked_prefill
    return not (config.model_config.use_mla and config.device_config.device_type == "cpu" and not chunked)


def _transfer(config: Any) -> str:
    transfer = config.kv_transfer_config
    if transfer.kv_role != "kv_both":
        return f"kv_role is {transfer.kv_role!r}; set it to 'kv_both', and the role in kv_connector_extra_config"
    if transfer.kv_load_failure_policy != "recompute":
        return f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}; set it to 'recompute'"
    return ""


def _parallel(config: Any) -> str:
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}; only tensor and data parallelism are supported, set it to 1"
    ranks = parallel.tensor_parallel_size
    heads = config.model_config.get_total_num_kv_heads()
    if not config.model_config.use_mla and (ranks > heads or heads % ranks):
        return (
            f"{heads} KV heads on {ranks} tensor-parallel ranks would be replicated; "
            f"set --tensor-parallel-size to a divisor of {heads}"
        )
    return ""


def _cache(config: Any, role: Role) -> str:
    cache = config.cache_config
    if cache.cache_dtype not in ("auto", *DTYPES):
        return f"--kv-cache-dtype {cache.cache_dtype} has scales of its own; use auto or one of {', '.join(DTYPES)}"
    size, ranks = cache.block_size, config.parallel_config.tensor_parallel_size
    if size is None or size < 1 or BLOCK_TOKENS % size:
        return f"--block-size {size} does not divide {BLOCK_TOKENS}; set it to {BLOCK_TOKENS}"
    if size != BLOCK_TOKENS and ranks > 1 and not config.model_config.use_mla:
        return f"--block-size {size} with {ranks} tensor-parallel ranks; set it to {BLOCK_TOKENS}"
    if role is Role.PREFILL and cache.enable_prefix_caching:
        return "a prefill engine's whole prompt is sent on; start it with --no-enable-prefix-caching"
    return ""


def _model(config: Any) -> str:
    if config.lora_config is not None:
        return "KV of LoRA adapters is not told apart; start without --enable-lora"
    speculative = config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        return (
            f"speculative decoding by {speculative.method!r} has KV of a draft model; use 'ngram', or start without "
            "--speculative-config"
        )
    return ""


def _groups(kv_cache_config: Any) -> str:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
        return (
            f"this model has {len(groups)} KV cache groups ({kinds}); only models whose layers all have full attention "
            "are supported, no sliding windows, Mamba or hybrids"
        )
    spec = groups[0].kv_cache_spec
    kind = type(spec).__name__
    window = getattr(spec, "sliding_window", None)
    if kind not in ("FullAttentionSpec", "MLAAttentionSpec") or window:
        return f"this model's KV cache is a {kind} (sliding window: {window}); only full attention is supported"
    if str(spec.dtype).removeprefix("torch.") not in DTYPES:
        return f"KV of {spec.dtype}; use one of {', '.join(DTYPES)}"
    return ""
