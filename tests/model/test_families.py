"""docs/models.md: which families are served, and why others are not."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import families
import pytest
import transformers
from families import ATOL, tried
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_families import FIELDS
from transformers import CONFIG_MAPPING

from dualpath.kv.refusals import STATE_FAMILIES
from dualpath.model import LoadedModel, UnsupportedModelError
from dualpath.model.attention import PackedPass
from dualpath.model.seam_checks import CheckedPass

STATE_LAYER_TYPES = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding", "recurrent"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.slow
def test_the_document_is_what_the_families_do() -> None:
    """Half a minute of processor time: every family is loaded and compared."""
    found = families.all_tried()
    assert {row.model_type: row.error for row in found if row.error > ATOL} == {}
    written = DOCUMENT.read_text()
    if f"Transformers {transformers.__version__}," not in written:
        pytest.skip(f"{DOCUMENT.name} is of another version of Transformers")
    assert written == families.document(found), "run: python tests/model/families.py > docs/models.md"


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("doge", "DogeAttention makes a mask of its own"),
        ("jetmoe", "JetMoeAttention attends to other keys and values than those it passes to its cache"),
        ("diffllama", "DiffLlamaAttention attends to other keys and values"),
        ("bloom", "it asks its cache for get_seq_length, which has no one answer"),
        ("gemma4_text", "has layers that differ in head_dim"),
        ("gemma3", "is made of several models (text_config, vision_config)"),
        ("gemma3n_text", "layer 2 attends without passing KV to its cache"),
        ("phimoe", "has a sliding window, but does not pass it"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(model_type: str, reason: str) -> None:
    row = tried(model_type)
    assert row.outcome == "refused"
    assert reason in row.reason


@pytest.mark.parametrize("model_type", ["mistral", "gpt_oss", "deepseek_v2", "axk2", "laguna"])
def test_a_served_family_computes_what_its_eager_attention_does(model_type: str) -> None:
    row = tried(model_type)
    assert row.outcome == "served" and row.error < ATOL


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_family_that_is_computed_wrongly_would_show(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights are such that attention matters."""
    right = PackedPass.attend

    def attend(self: PackedPass, module: Any, query: Any, scale: float, *more: Any) -> Any:
        blurred = 1.0 if isinstance(self, CheckedPass) else 0.9
        return right(self, module, query, blurred * scale, *more)

    monkeypatch.setattr(PackedPass, "attend", attend)
    assert tried(model_type).error > 10 * ATOL


@pytest.mark.parametrize("model_type", sorted(STATE_FAMILIES))
def test_a_model_with_a_state_is_refused_before_its_weights_are_read(model_type: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[model_type](**FIELDS.get(model_type, {})).save_pretrained(tmp_path)  # and no weights
    with pytest.raises(UnsupportedModelError, match=f"^{model_type} has layers that keep one state for all tokens"):
        LoadedModel.load(tmp_path)


def test_a_hybrid_whose_layers_are_all_attention_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite 4.0 Micro has the `model_type` of the hybrids."""
    attention = {"num_hidden_layers": 4, "layer_types": ["attention"] * 4, "shared_intermediate_size": 32}
    monkeypatch.setitem(FIELDS, "granitemoehybrid", attention | {"num_key_value_heads": 2, "num_local_experts": 0})
    assert tried("granitemoehybrid").outcome == "served"


def test_every_family_whose_config_tells_of_a_state_is_known_by_name() -> None:
    for model_type in families.FAMILIES:
        with suppress(StrictDataclassClassValidationError):  # of a family that has no default config
            config = CONFIG_MAPPING[model_type]()
            inner = getattr(config, "text_config", None) or config
            kinds = set(getattr(inner, "layer_types", None) or ())
            assert not kinds & STATE_LAYER_TYPES or model_type in STATE_FAMILIES, model_type
