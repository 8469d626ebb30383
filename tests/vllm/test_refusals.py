"""What the connector refuses at the start, by name."""

from types import SimpleNamespace
from typing import Any

import pytest

from dualpath.core.vocabulary import Role
from dualpath.vllm.refusals import refuse
from dualpath.vllm.settings import decode_parameters, prefill_parameters, read_settings
from dualpath.vllm.versions import SUPPORTED, check_version


class FullAttentionSpec(SimpleNamespace):
    pass


class SlidingWindowSpec(SimpleNamespace):
    pass


def config(**changes: Any) -> Any:
    """A configuration that is served; `changes` are ``part__name=value``."""
    made = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_role="kv_both", kv_load_failure_policy="recompute"),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=1,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=64, enable_prefix_caching=False),
        model_config=SimpleNamespace(use_mla=False, get_total_num_kv_heads=lambda: 4),
        lora_config=None,
        speculative_config=None,
    )
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(getattr(made, part), field, value)
        else:
            setattr(made, part, value)
    return made


def groups(*specs: Any) -> Any:
    full = FullAttentionSpec(sliding_window=None, dtype="torch.float32")
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs or (full,)])


def test_what_is_served() -> None:
    refuse(config(), groups(), Role.PREFILL)
    refuse(config(cache_config__enable_prefix_caching=True), groups(), Role.DECODE)
    refuse(config(parallel_config__tensor_parallel_size=2), groups(), Role.DECODE)
    refuse(config(cache_config__block_size=16), groups(), Role.DECODE)
    refuse(config(speculative_config=SimpleNamespace(method="ngram")), groups(), Role.DECODE)
    mla = {"model_config__use_mla": True, "model_config__get_total_num_kv_heads": lambda: 1}
    refuse(config(parallel_config__tensor_parallel_size=2, cache_config__block_size=16, **mla), groups(), Role.PREFILL)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_transfer_config__kv_role": "kv_producer"}, "kv_role"),
        ({"kv_transfer_config__kv_load_failure_policy": "fail"}, "kv_load_failure_policy"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"parallel_config__tensor_parallel_size": 8}, "4 KV heads on 8"),
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"cache_config__block_size": 48}, "--block-size 48"),
        ({"cache_config__block_size": 128}, "--block-size 128"),
        ({"cache_config__block_size": 32, "parallel_config__tensor_parallel_size": 2}, "--block-size 32"),
        ({"cache_config__enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        ({"lora_config": object()}, "LoRA"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "eagle"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        refuse(config(**changes), groups(), Role.PREFILL)


def test_kinds_of_kv_cache_that_are_refused() -> None:
    full = FullAttentionSpec(sliding_window=None, dtype="torch.float32")
    sliding = SlidingWindowSpec(sliding_window=128, dtype="torch.float32")
    for specs, named in (
        ((full, sliding), "2 KV cache groups .FullAttentionSpec, SlidingWindowSpec"),
        ((sliding,), "SlidingWindowSpec"),
        ((FullAttentionSpec(sliding_window=128, dtype="torch.float32"),), "sliding window: 128"),
        ((FullAttentionSpec(sliding_window=None, dtype="torch.uint8"),), "uint8"),
    ):
        with pytest.raises(ValueError, match=named):
            refuse(config(), groups(*specs), Role.DECODE)


def test_settings() -> None:
    whole = {"role": "decode", "agent": "/a", "url": "http://h:1", "name": "decode-0"}
    assert read_settings(whole).role is Role.DECODE
    for wrong, named in (
        ({key: value for key, value in whole.items() if key != "agent"}, "agent"),
        (whole | {"agnet": 1}, "agnet"),
        (whole | {"role": "both"}, "both"),
    ):
        with pytest.raises(ValueError, match=named) as refused:
            read_settings(wrong)
        assert "its keys are role, agent, url, name" in str(refused.value)


def test_parameters_that_clients_make_up_are_no_parameters() -> None:
    for ours in (None, 3, [], {"owner": 1}, {"owner": [1, -1], "hit_tokens": 1, "prompt_tokens": 1}):
        for given in ({"dualpath": ours}, ours):
            assert prefill_parameters(given) is None  # type: ignore[arg-type]
            assert decode_parameters(given) is None  # type: ignore[arg-type]


def test_versions() -> None:
    for version in ("0.30.0", "0.31.2", "0.32.0+cpu"):
        check_version(version)
    for version in ("0.29.1", "0.33.0", "1.0.0", "dev"):
        with pytest.raises(ValueError, match=f"{version} is not supported; install one of {SUPPORTED[0]}"):
            check_version(version)
