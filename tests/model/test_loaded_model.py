"""Loading: what a checkpoint says, what is refused, and what attention costs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_world import Engines
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualpath.kv.layout import KVPart
from dualpath.lab.facts.models import from_hf_config
from dualpath.model import LoadedModel, UnsupportedModelError, make_checkpoint, model_fingerprint, profile_attention
from dualpath.model.checkpoint import DEMO_MODEL
from dualpath.model.profiling import _fit

GROUPED = (KVPart("k", 2, 16), KVPart("v", 2, 16))
LATENT = (KVPart("latent", 1, 32), KVPart("rope", 1, 8))
SPARSE = (*LATENT, KVPart("index", 1, 16))
INDEXED = ("deepseek_v32", "glm_moe_dsa")


def test_a_model_knows_its_layout_and_limits(engines: Engines) -> None:
    model = engines.model
    parts = {
        "deepseek_v3": {LATENT},
        "deepseek_v32": {SPARSE},
        "glm_moe_dsa": {SPARSE, LATENT},
        "mimo_v2_flash": {(KVPart("k", heads, 16), KVPart("v", heads, 12)) for heads in (2, 4)},
    }.get(engines.architecture, {GROUPED})
    assert {kind.parts for kind in model.layout.kinds} == parts
    config = model.network.config
    types = getattr(config, "layer_types", None) or ["full_attention"] * 5
    if engines.architecture == "mistral":
        types = ["sliding_attention"] * 5
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in types]
    assert [model.layout.kind(layer).window_tokens for layer in range(5)] == windows
    assert (model.layout.layers, model.layout.dtype, model.max_length_tokens) == (5, "float32", 4096)
    assert model.vocab_size == 259
    assert model.eos_token_ids == (258, 256)


def test_simulator_and_planner_count_the_same_bytes(engines: Engines) -> None:
    config = engines.model.network.config.to_dict()
    assert from_hf_config(config).kv("fp32") == engines.model.layout.kv_bytes


def test_half_precision_halves_the_rows(checkpoint: Callable[[str], Path]) -> None:
    full = LoadedModel.load(checkpoint("qwen3"))
    half = LoadedModel.load(checkpoint("qwen3"), dtype="bfloat16")
    assert half.layout.dtype == "bfloat16"
    assert 2 * half.layout.row_bytes[0] == full.layout.row_bytes[0]


def test_attention_flops_are_counted_from_the_config(engines: Engines) -> None:
    """By hand for the tiny models: hidden 64, 4 heads × 16, 2 KV heads; MLA ranks 32, rope 8, nope 16, value 12.

    Indexers have 16 heads × 16.
    """
    if engines.architecture in ("deepseek_v3", *INDEXED):
        weights = 64 * 32 + 32 * 4 * 24 + 64 * 40 + 32 * 4 * 28 + 4 * 12 * 64
        pair = 2 * 4 * (24 + 12)
        if engines.architecture in INDEXED:
            weights += 32 * 16 * 16 + 64 * 16 + 64 * 16
            pair += 2 * 16 * 16
    elif engines.architecture == "mimo_v2_flash":  # values of 12
        weights = 64 * 64 + 64 * 2 * (16 + 12) + 4 * 12 * 64
        pair = 2 * 4 * (16 + 12)
    else:
        weights = 64 * 64 + 2 * 64 * 32 + 64 * 64
        pair = 4 * 4 * 16
    assert engines.model.attention_flops_per_token == 2 * weights
    assert engines.model.attention_flops_per_pair == pair


def test_profile_of_attention(engines: Engines) -> None:
    fixed_ns, ns_per_flop = profile_attention(engines.model)
    assert fixed_ns >= 0 and ns_per_flop > 0


def test_fit_recovers_a_line_and_never_goes_negative() -> None:
    flops = np.array([1e5, 1e6, 1e7, 1e8])
    assert _fit(flops, 2000 + 0.03 * flops) == pytest.approx((2000, 0.03))
    fixed_ns, ns_per_flop = _fit(flops, flops**1.2)
    assert fixed_ns == 0 and ns_per_flop > 0
    fixed_ns, ns_per_flop = _fit(flops, np.array([9e5, 8e5, 7e5, 6e5]))
    assert fixed_ns >= 0 and ns_per_flop > 0


def rewritten(source: Path, target: Path, **changes: object) -> Path:
    """The checkpoint `source` again, with other fields in its config."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_other_attention_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    chunked = ["full_attention", "chunked_attention"] + ["full_attention"] * 3
    path = rewritten(checkpoint("qwen3"), tmp_path / "a", layer_types=chunked)
    with pytest.raises(UnsupportedModelError, match="qwen3 has layers of type chunked_attention"):
        LoadedModel.load(path)


def test_windows_that_contradict_the_config_are_refused(
    engines_of: Callable[[str], Engines], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = engines_of("mistral").model.network
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    monkeypatch.setattr(network.config, "layer_types", kinds[:2] * 2, raising=False)
    with pytest.raises(UnsupportedModelError, match="layer_types for 4 layers, and 5 layers"):
        LoadedModel(network, ())
    monkeypatch.setattr(network.config, "layer_types", kinds[:2] + kinds, raising=False)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 is of type full_attention and passes .* window of 50"):
        LoadedModel(network, ())


@pytest.mark.parametrize(
    ("model_type", "sizes", "message"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 8}, "bidirectional attention"),
        ("llama4_text", {"intermediate_size_mlp": 32, "num_local_experts": 2}, "layers of type chunked_attention"),
        ("phimoe", {"sliding_window": 16, "num_local_experts": 2}, "does not pass it to its attention function"),
        ("mamba", {}, "mamba has layers that keep one state"),
        ("gpt_neox", {"num_key_value_heads": 2}, "its config says"),
    ],
)
def test_the_probe_refuses_what_the_seam_can_not_compute(
    model_type: str, sizes: dict[str, object], message: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        model_type,
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        **{"num_attention_heads": 4, "num_key_value_heads": 4} | sizes if model_type != "mamba" else {},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        LoadedModel.load(tmp_path)


def test_bad_arguments_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'int8' is not supported; choose one of float32"):
        LoadedModel.load(checkpoint("qwen3"), dtype="int8")
    with pytest.raises(ValueError, match="threads is 0"):
        LoadedModel.load(checkpoint("qwen3"), threads=0)
    with pytest.raises(ValueError, match="device 'meta' is not supported"):
        LoadedModel.load(checkpoint("qwen3"), device="meta")
    with pytest.raises(OSError):
        LoadedModel.load(tmp_path / "nothing")


def test_fingerprint_tells_weights_and_configs_apart(tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 32}
    same = [model_fingerprint(make_checkpoint(tmp_path / name, "qwen3", seed=1, **small)) for name in ("a", "b")]
    other_seed = model_fingerprint(make_checkpoint(tmp_path / "c", "qwen3", seed=2, **small))
    other_config = model_fingerprint(rewritten(tmp_path / "a", tmp_path / "d", rms_norm_eps=0.5))
    other_writer = model_fingerprint(rewritten(tmp_path / "a", tmp_path / "e", transformers_version="0.0"))
    assert same[0] == same[1] == other_writer
    assert len({same[0], other_seed, other_config}) == 3
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        model_fingerprint(tmp_path / "nothing")


def test_checkpoints_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'gpt2' is not one that can be made"):
        make_checkpoint(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="qwen3 has no config field named hiden_size"):
        make_checkpoint(tmp_path, "qwen3", hiden_size=3)


def test_the_tokenizer_round_trips_and_chats(engines: Engines, checkpoint: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(engines.architecture))
    text = "Ünïcode 🙂\n\ttabs  and <|im_end|> spaces"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.replace("<|im_end|>", "").encode()) + 1
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer) == engines.model.vocab_size


def test_greedy_output_is_lively(engines: Engines) -> None:
    prompt = list(range(32, 100))
    output = engines.reference.generate(prompt, 100)
    assert len(set(output)) >= 20


def test_the_demo_model_has_16_kib_of_kv_a_token(tmp_path: Path) -> None:
    model = LoadedModel.load(make_checkpoint(tmp_path, **DEMO_MODEL))
    assert model.layout.kv_bytes.bytes_per_token == 16384
    assert model.max_length_tokens >= 131072
