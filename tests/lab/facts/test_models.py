"""Models: published shapes against published totals, attention's closed forms against loops, config.json errors."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.lab.facts import models
from dualpath.lab.facts.attention import AttentionLayers, Indexer, KVFormat
from dualpath.lab.facts.models import MODELS, ModelConfigError, find_model, from_hf_config
from dualpath.spec.kv_bytes import KVBytes, Window

PUBLISHED = {  # active and total parameters, as the model cards and reports give them
    "deepseek-v3.2": (37e9, 671e9),
    "deepseek-v3": (37e9, 671e9),
    "qwen2.5-32b": (32e9, 32.5e9),
    "qwen3-235b-a22b": (22e9, 235e9),
    "gpt-oss-120b": (5.13e9, 116.8e9),
}
CONFIGS = {
    "deepseek-v3.2": models._DEEPSEEK_V32,
    "deepseek-v3": models._DEEPSEEK_V3,
    "qwen2.5-32b": models._QWEN25_32B,
    "qwen3-235b-a22b": models._QWEN3_235B,
    "gpt-oss-120b": models._GPT_OSS_120B,
}
QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_counted_from_shapes_agree_with_the_vendor(name):
    counted = from_hf_config(CONFIGS[name], name)
    active, total = PUBLISHED[name]
    assert counted.active_parameters == pytest.approx(active, rel=0.025)
    assert counted.total_parameters == pytest.approx(total, rel=0.01)
    assert MODELS[name].active_parameters == pytest.approx(counted.active_parameters, rel=0.025)


def test_ds_27b_has_27e9_parameters():
    assert MODELS["ds-27b"].total_parameters == pytest.approx(27e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "dtype", "n_bytes"),
    [
        ("deepseek-v3.2", "fp8", 61 * (656 + 132)),
        ("deepseek-v3", "fp8", 61 * 656),
        ("deepseek-v3", "bf16", 70_272),
        ("qwen2.5-32b", "fp16", 262_144),
        ("qwen3-235b-a22b", "fp8", 96_256),
        ("gpt-oss-120b", "fp8", 36_864),
        ("ds-27b", "fp8", 30 * (656 + 68)),
    ],
)
def test_kv_bytes_per_token(name, dtype, n_bytes):
    assert MODELS[name].kv(dtype).bytes_per_token == n_bytes


def test_index_keys_can_be_left_out():
    assert MODELS["deepseek-v3.2"].kv(index_keys=False).bytes_per_token == 40_016


def test_sliding_windows_are_stored_whole_and_read_in_part():
    kv = MODELS["gpt-oss-120b"].kv()
    assert kv == KVBytes(18_432, (Window(128, 18_432),))
    assert kv.hit_bytes(9_984) == 9_984 * 18_432 + 128 * 18_432
    assert kv.hit_bytes(64) == 64 * 36 * 1024


ATTENTION = [
    AttentionLayers(layers=3, heads=2, score_dim=4, value_dim=4, kv=KVFormat(elements=8)),
    AttentionLayers(layers=2, heads=2, score_dim=4, value_dim=4, kv=KVFormat(elements=8), window_tokens=7),
    AttentionLayers(
        layers=1,
        heads=2,
        score_dim=6,
        value_dim=4,
        kv=KVFormat(elements=4, unquantised_elements=2),
        indexer=Indexer(heads=3, dim=5, top_k_tokens=6),
    ),
]


@pytest.mark.parametrize("run", ATTENTION)
@settings(deadline=None, derandomize=True)
@given(hit=st.integers(0, 30), new=st.integers(0, 30))
def test_attention_flops_equal_a_loop_over_tokens_and_heads(run, hit, new):
    expected = 0
    for token in range(hit, hit + new):
        before = token + 1  # itself too
        seen = min(before, run.limit_tokens or before)
        expected += run.layers * run.heads * seen * (2 * run.score_dim + 2 * run.value_dim)
        if run.indexer:
            expected += run.layers * run.indexer.heads * run.indexer.dim * 2 * before
    assert run.flops(hit, new) == expected


@settings(deadline=None, derandomize=True)
@given(hit=st.integers(2048, 100_000), new=st.integers(1, 5000))
def test_the_attention_line_is_exact_beyond_the_top_k(hit, new):
    spec = MODELS["deepseek-v3.2"]
    per_token, per_pair = spec.attention_line()
    pairs = new * hit + new * (new + 1) / 2
    assert spec.attention_flops(hit, new) == pytest.approx(new * per_token + pairs * per_pair, rel=1e-12)


def test_decode_reads_the_top_k_and_every_index_key():
    assert MODELS["deepseek-v3.2"].decode_read_bytes(32_768) == 61 * (2048 * 656 + 32_768 * 132)


def test_weights_are_spread_by_expert_parallelism():
    spec = MODELS["deepseek-v3"]
    assert spec.weight_bytes() == pytest.approx(671e9, rel=0.01)
    assert spec.weight_bytes(32) == pytest.approx(671e9 - 653.9e9 * 31 / 32, rel=0.01)


def test_a_config_file_is_read_by_path_and_by_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    by_file, by_directory = from_hf_config(tmp_path / "config.json"), from_hf_config(tmp_path)
    assert by_file == by_directory
    assert (by_file.layers, by_file.kv_dtype, by_file.kv().bytes_per_token) == (28, "bf16", 28 * 2 * 8 * 128 * 2)
    assert by_file.total_parameters == pytest.approx(0.596e9, rel=0.01)  # Qwen3-0.6B, tied embeddings
    assert find_model("config.json", tmp_path).layers == 28


def test_transformers_own_configs_are_described_alike(tmp_path):
    transformers = pytest.importorskip("transformers")
    for kind, name in (("DeepseekV32Config", "deepseek-v3.2"), ("GptOssConfig", "gpt-oss-120b")):
        getattr(transformers, kind)().save_pretrained(tmp_path / kind)
        read = from_hf_config(tmp_path / kind)
        assert read.attention == MODELS[name].attention
        assert read.total_parameters == pytest.approx(MODELS[name].total_parameters, rel=1e-3)


def test_a_mixture_of_experts_without_a_width_of_its_own():
    """Mixtral-8x7B: 46.7e9 parameters, 12.9e9 of them active (mistral.ai)."""
    mixtral = {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "vocab_size": 32000,
    }
    spec = from_hf_config(mixtral)
    assert spec.total_parameters == pytest.approx(46.7e9, rel=0.005)
    assert spec.active_parameters == pytest.approx(12.9e9, rel=0.02)


def test_the_text_model_of_a_multimodal_file():
    nested = {"model_type": "x_vl", "text_config": QWEN3, "vision_config": {"num_hidden_layers": 3}}
    assert from_hf_config(nested).layers == 28


@pytest.mark.parametrize(
    ("change", "sliding"),
    [
        ({"sliding_window": 64}, 0),  # it does not say that it uses it
        ({"sliding_window": 64, "model_type": "mistral"}, 28),
        ({"sliding_window": 64, "model_type": "olmo3"}, 21),
        ({"sliding_window": 64, "use_sliding_window": True, "model_type": "qwen3_moe"}, 28),
        ({"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 20}, 0),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 20}, 8),
        ({"sliding_window": 64, "sliding_window_pattern": 6}, 24),
        ({"sliding_window": 64, "model_type": "gemma2"}, 14),
        ({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 14}, 14),
        ({"sliding_window": None}, 0),
    ],
)
def test_sliding_layers_are_counted(change, sliding):
    spec = from_hf_config({**QWEN3, **change})
    assert sum(run.layers for run in spec.attention if run.window_tokens) == sliding
    assert spec.layers == 28


@pytest.mark.parametrize(
    ("change", "moe_layers"),
    [
        ({"decoder_sparse_step": 2}, 14),
        ({"mlp_only_layers": [0, 1, 2]}, 25),
        ({"first_k_dense_replace": 1}, 27),
        ({"mlp_layer_types": ["dense"] * 4 + ["sparse"] * 24}, 24),
    ],
)
def test_layers_of_experts_are_counted(change, moe_layers):
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    spec = from_hf_config({**QWEN3, **moe, **change})
    assert spec.routed_parameters == moe_layers * 8 * 3 * 1024 * 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; it must be a whole number"),
        ({"head_dim": None, "num_attention_heads": 7}, "head_dim is missing and 1024 does not divide by 7"),
        ({"layer_types": ["linear_attention"] * 28}, "layer_types has 'linear_attention'"),
        ({"mamba_d_state": 16}, "mamba_d_state says that not all layers are full, sliding or sparse attention"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers of 28"),
        ({"num_experts_per_tok": 2}, "n_routed_experts is missing"),
        ({"torch_dtype": "int4"}, "dtype is 'int4'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    ],
)
def test_a_config_that_cannot_be_described_is_refused_by_key(change, message):
    with pytest.raises(ModelConfigError, match=message):
        from_hf_config({**QWEN3, **change})


def test_errors_name_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match=r"config\.json: is not JSON"):
        from_hf_config(tmp_path)
    with pytest.raises(ModelConfigError, match="can't be read"):
        from_hf_config(tmp_path / "nothing.json")
    with pytest.raises(ModelConfigError, match=r"no model 'gpt-9': give one of deepseek-v3\.2"):
        find_model("gpt-9")


def test_an_unknown_kv_dtype_is_refused():
    with pytest.raises(ValueError, match="KV dtype 'int3' is unknown"):
        MODELS["ds-27b"].kv("int3")
