"""A checkpoint's generation_config.json gives the defaults that vLLM takes from it, and nothing wrong passes."""

import json
from pathlib import Path

import pytest

from dualpath.cluster.config import ClusterConfig
from dualpath.spec.generation_defaults import GenerationDefaults


def config(model: Path, **settings: object) -> ClusterConfig:
    return ClusterConfig(model=str(model), store=str(model), **settings)  # type: ignore[arg-type]


def test_the_files_fields_are_the_defaults(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "max_new_tokens": 2048}
    (tmp_path / "generation_config.json").write_text(json.dumps(given | {"do_sample": False, "eos_token_id": [1, 2]}))
    assert config(tmp_path).generation_defaults() == GenerationDefaults(
        temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, max_tokens=2048
    )
    assert config(tmp_path, generation_config="vllm").generation_defaults() == GenerationDefaults()


def test_no_file_and_no_fields_change_nothing(tmp_path: Path) -> None:
    assert config(tmp_path).generation_defaults() == GenerationDefaults()
    (tmp_path / "generation_config.json").write_text('{"top_k": -1, "temperature": null}')
    assert config(tmp_path).generation_defaults() == GenerationDefaults()
    processed = config(tmp_path, logprobs_mode="processed_logprobs").generation_defaults()
    assert processed.logprobs_mode == "processed_logprobs"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "generation_config.json"),
        ('{"temperature": "hot"}', "temperature"),
        ('{"temperature": 9}', "temperature is 9, not from 0 to 2"),
        ('{"max_new_tokens": 0}', "max_new_tokens is 0"),
    ],
)
def test_a_file_that_makes_no_sense_is_named_with_its_field(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        config(tmp_path).generation_defaults()


@pytest.mark.parametrize("setting", ["generation_config", "logprobs_mode"])
def test_an_unknown_choice_is_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        config(tmp_path, **{setting: "other"})
