"""What can't start is said before engines do, in one line that names the option and says what to do."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dualpath.cluster import preflight
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.preflight import settled
from dualpath.cluster.preflight_files import check_buffers
from dualpath.kv import StoreError

TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "dtype": "bfloat16",
}
BLOCK_BYTES = 2 * 64 * (2 * 2 * 16) * 4


def checkpoint(where: Path, weights: bool = True, **changes: Any) -> Path:
    where.mkdir(parents=True)
    (where / "config.json").write_text(json.dumps(TINY | changes))
    if weights:
        (where / "model.safetensors").touch()
    return where


def config(tmp_path: Path, **settings: Any) -> ClusterConfig:
    given: dict[str, Any] = {"model": str(tmp_path / "tiny"), "store": str(tmp_path / "kv")}
    return ClusterConfig(**(given | settings))


def test_what_is_open_is_chosen_and_settling_again_changes_nothing(tmp_path: Path) -> None:
    checkpoint(tmp_path / "tiny")
    once = settled(config(tmp_path))
    assert (once.dtype, once.served_model_name, once.model) == ("float32", "tiny", str(tmp_path / "tiny"))
    assert (tmp_path / "kv").is_dir() and list((tmp_path / "kv").iterdir()) == []
    assert settled(once) == once
    assert settled(config(tmp_path, served_model_name="mine")).served_model_name == "mine"


def test_a_gpu_gets_the_checkpoints_own_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.metadata, "version", lambda _: "2.13.0")
    monkeypatch.setattr(preflight, "cuda_devices", lambda: 1)
    checkpoint(tmp_path / "tiny")
    assert settled(config(tmp_path, device="cuda")).dtype == "bfloat16"
    assert settled(config(tmp_path, device="cuda:0", dtype="float16")).dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM; give a causal language model"),
        ({"layer_types": ["sliding_attention", "linear_attention"]}, "has layers of type linear_attention"),
        ({"layer_types": ["full_attention"] * 3}, "has a config.json with layer_types for 3 layers, and 2 layers"),
        ({"layer_types": "full_attention"}, "whose layer_types is 'full_attention', which makes no sense"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 0}, "whose sliding_window is 0"),
        ({"indexer_types": ["shared"] * 2}, "whose first layer shares the indexer"),
        ({"index_topk": 0}, "whose index_topk is 0; it must be a whole number above 0"),
        ({"head_dim": 1.5}, "whose head_dim is 1.5; it must be a whole number above 0"),
        ({"model_type": ["x"]}, r"whose model_type is \['x'\], which makes no sense"),
        ({"per_layer_attributes": 5}, "whose per_layer_attributes is 5, which makes no sense"),
        ({"architectures": 5}, "is a 5; give a causal language model"),
        ({"weights": False}, r"has no \*.safetensors"),
    ],
)
def test_a_checkpoint_that_can_not_be_served(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    checkpoint(tmp_path / "tiny", **changes)
    with pytest.raises(ValueError, match=f"^--model: .*{complaint}"):
        settled(config(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("Qwen3NextForCausalLM", {"model_type": "qwen3_next", "full_attention_interval": 4}),
        ("Qwen3_5ForConditionalGeneration", {"model_type": "qwen3_5", "text_config": {}, "vision_config": {}}),
        ("KimiLinearForCausalLM", {"model_type": "kimi_linear", "linear_attn_config": {"full_attn_layers": [4]}}),
        ("NemotronHForCausalLM", {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-"}),
        ("GraniteMoeHybridForCausalLM", {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}),
    ],
)
def test_models_with_a_state_are_refused_by_name(tmp_path: Path, architecture: str, says: dict[str, Any]) -> None:
    """Their published configs tell of it in words of their own, or leave the class to know it."""
    checkpoint(tmp_path / "tiny", weights=False, architectures=[architecture], **says)
    with pytest.raises(ValueError, match=r"^--model: .*/tiny has layers that keep one state for all tokens"):
        settled(config(tmp_path))


def test_a_hybrid_whose_layers_are_all_attention_may_be_served(tmp_path: Path) -> None:
    """Granite 4.0 Micro."""
    checkpoint(tmp_path / "tiny", model_type="granitemoehybrid", layer_types=["attention"] * 2)
    settled(config(tmp_path))


def test_a_model_of_several_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "tiny")
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": TINY, "vision_config": {}}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"^--model: .* is made of several models \(text_config, vision_config\)"):
        settled(config(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (checkpoint(tmp_path / "tiny") / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"^--model: .*tiny/config.json can't be read: "):
        settled(config(tmp_path))


@pytest.mark.parametrize("option", ["buffer_bytes", "hbm_bytes"])
def test_memory_that_holds_no_block(tmp_path: Path, option: str) -> None:
    checkpoint(tmp_path / "tiny")
    with pytest.raises(
        ValueError, match=f"^--{option[:-6]}: {BLOCK_BYTES - 1} bytes does not hold one .* {BLOCK_BYTES} "
    ):
        settled(config(tmp_path, **{option: BLOCK_BYTES - 1}))
    settled(config(tmp_path, **{option: BLOCK_BYTES}))


@pytest.mark.parametrize(
    ("torch", "devices", "complaint"),
    [("2.13.0+cpu", 1, r"torch \(2.13.0\+cpu\) is built without CUDA"), ("2.13.0", 0, "no CUDA device is found here")],
)
def test_cuda_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, devices: int, complaint: str
) -> None:
    checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(preflight.importlib.metadata, "version", lambda _: torch)
    monkeypatch.setattr(preflight, "cuda_devices", lambda: devices)
    with pytest.raises(ValueError, match=f"^--device: .*{complaint}.*--device cpu"):
        settled(config(tmp_path, device="cuda"))


def test_a_device_that_is_none(tmp_path: Path) -> None:
    checkpoint(tmp_path / "tiny")
    with pytest.raises(ValueError, match="'gpu' is not supported; choose cpu or cuda"):
        settled(config(tmp_path, device="gpu"))


def test_copies_through_the_cnic_need_nixl_and_of_a_gpu_rdma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(preflight, "_RDMA_DEVICES", tmp_path / "rdma")
    monkeypatch.setattr(preflight, "_check_device", lambda _: None)
    monkeypatch.setattr("dualpath.transfer.transports.nixl.agent.find_spec", lambda _: object())
    assert settled(config(tmp_path, device_copies="cnic")).device_copies == "cnic"
    with pytest.raises(ValueError, match=r"^--device-copies cnic: a GPU's copies need an RDMA NIC.*; use memcpy"):
        settled(config(tmp_path, device_copies="cnic", device="cuda"))
    (tmp_path / "rdma" / "mlx5_0").mkdir(parents=True)
    assert settled(config(tmp_path, device_copies="cnic", device="cuda")).device == "cuda"
    monkeypatch.setattr("dualpath.transfer.transports.nixl.agent.find_spec", lambda _: None)
    assert settled(config(tmp_path)).device_copies == "memcpy"
    with pytest.raises(ValueError, match=r"^--device-copies cnic: needs NIXL: pip install 'dualpath\[nixl\]'"):
        settled(config(tmp_path, device_copies="cnic"))


def test_files_that_can_not_be_written(tmp_path: Path) -> None:
    checkpoint(tmp_path / "tiny")
    (tmp_path / "file").touch()
    for option in ("journal", "ready_file"):
        for place, why in (
            (tmp_path / "none" / "file", f"there is no folder {tmp_path}/none; make it"),
            (tmp_path / "file" / "file", f"there is no folder {tmp_path}/file"),
            (tmp_path, "it is a folder"),
            (Path("/proc/1/new"), "this user may not write in /proc/1"),
        ):
            with pytest.raises(ValueError, match=f"^--{option.replace('_', '-')}: {place} can't be written: {why}"):
                settled(config(tmp_path, **{option: str(place)}))
        assert settled(config(tmp_path, **{option: str(tmp_path / "file")}))
        assert settled(config(tmp_path, **{option: str(tmp_path / "new")}))
    assert not (tmp_path / "new").exists()
    assert settled(config(tmp_path, journal="/dev/null"))


def test_a_ready_file_replaces_files_alone(tmp_path: Path) -> None:
    """What is there is removed at the start: that must not be a device."""
    checkpoint(tmp_path / "tiny")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dead").symlink_to(tmp_path / "none")
    for place in ("/dev/null", tmp_path / "fifo", tmp_path / "dead"):
        with pytest.raises(ValueError, match=r"^--ready-file: .* is no regular file"):
            settled(config(tmp_path, ready_file=str(place)))


def test_buffers_that_this_host_can_not_have(tmp_path: Path) -> None:
    shared = os.statvfs("/dev/shm")
    whole_bytes = shared.f_blocks * shared.f_frsize
    check_buffers(config(tmp_path, buffer_bytes=whole_bytes // 2), 2)
    for buffer_bytes, engines in ((whole_bytes + 1, 1), (whole_bytes // 2, 3)):
        with pytest.raises(ValueError, match=f"^--buffer: {engines} engines .* make the buffer smaller"):
            check_buffers(config(tmp_path, buffer_bytes=buffer_bytes), engines)


def test_a_store_that_can_not_be_written(tmp_path: Path) -> None:
    checkpoint(tmp_path / "tiny")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"^--store: .*file/kv can't be written to: Not a directory"):
        settled(config(tmp_path, store=str(tmp_path / "file" / "kv")))
    with pytest.raises(StoreError, match="unknown kind of store 'ftp'"):
        settled(config(tmp_path, store="ftp://x"))


def test_a_store_on_a_read_only_disk_is_served_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot of KV, or a disk that its kernel has given up writing to."""
    checkpoint(tmp_path / "tiny")

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    settled(config(tmp_path))
    assert "nothing is stored" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda *_, **__: refuse())
        with pytest.raises(StoreError, match="Read-only"):
            settled(config(tmp_path, store=str(tmp_path / "nowhere")))


def cached(home: Path, name: str, weights: bool) -> Path:
    """A model in the local Hugging Face cache, as its own tools lay it out."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    return checkpoint(repository / "snapshots" / "c0ffee", weights=weights)


SETTLE = """
import sys, msgspec
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.preflight import settled
from dualpath.cluster.preflight_files import check_buffers
try:
    found = settled(ClusterConfig(model=sys.argv[1], store=sys.argv[2]))
    print(found.model, found.served_model_name)
except ValueError as error:
    print(error)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("weights", [True, False])
def test_a_name_of_the_hub_is_found_in_the_local_cache_or_told_how_to_get(tmp_path: Path, weights: bool) -> None:
    snapshot = cached(tmp_path / "home", "org/Model-1.5B", weights)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", SETTLE, "org/Model-1.5B", str(tmp_path / "kv")]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    if weights:
        assert told == f"{snapshot} org/Model-1.5B\n"
    else:
        assert "`hf download org/Model-1.5B --local-dir Model-1.5B`, then serve Model-1.5B" in told


def test_a_place_that_is_no_checkpoint_and_no_name(tmp_path: Path) -> None:
    for model in (str(tmp_path), str(tmp_path / "none"), "none"):
        with pytest.raises(ValueError, match=f"^--model: {model} has no config.json"):
            settled(config(tmp_path, model=model))


def test_a_setting_of_the_log_that_can_not_be(tmp_path: Path) -> None:
    for name, value in (("dtype", "int8"), ("log_format", "xml")):
        with pytest.raises(ValueError, match=f"{name} is '{value}'; it must be one of"):
            msgspec.structs.replace(config(tmp_path), **{name: value})
