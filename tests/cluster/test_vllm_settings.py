"""What of vLLM is ours, what its users may give, and what is told before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from dualpath.cluster import preflight_vllm
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.engine_parts import node_parts
from dualpath.cluster.preflight import settled
from dualpath.cluster.preflight_files import NotReadyError
from dualpath.cluster.preflight_vllm import find_python, settled_vllm
from dualpath.cluster.vllm_launch import command, environment, on_cpu
from dualpath.cluster.vllm_settings import KEY_VARIABLE, VllmSettings
from dualpath.core.vocabulary import Role
from dualpath.spec.topology import Topology
from tests.cluster.fake_api_server import make_python
from tests.cluster.test_preflight import BLOCK_BYTES, checkpoint


def cluster(*arguments: str, **settings: object) -> ClusterConfig:
    vllm = VllmSettings(arguments=arguments, python="python", version="0.32.0", logs="logs")
    return ClusterConfig(engine="vllm", **{"vllm": vllm, "model": "m", "store": "s"} | settings)  # type: ignore[arg-type]


def given(config: ClusterConfig, role: Role = Role.DECODE) -> list[str]:
    return command(config, role, agent="a", name="n", ticket="t", host="127.0.0.1", port=1)


@pytest.mark.parametrize(
    "argument",
    [
        *("--port", "--host=0.0.0.0", "--model", "--api-key", "--served-model-name", "--served_model_name=x"),
        *("--kv-transfer-config", "--kv-transfer-config.kv_connector=X", "--enable-scale-out", "--uds"),
        *("--enable-prefix-caching", "--no-enable-prefix-caching", "--enable-prompt-tokens-details"),
        *("--config", "-dp", "--data-parallel-size=2", "--headless", "--ssl-keyfile", "--root-path"),
    ],
)
def test_what_the_cluster_depends_on_is_refused_by_name(argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument.replace('.', '[.]')}: .*after --"):
        VllmSettings(arguments=("--max-num-seqs", "8", argument))


@pytest.mark.parametrize("tokens", ["48", "128", "0", "-1", "many", ""])
def test_a_block_of_vllm_must_divide_ours(tokens: str) -> None:
    with pytest.raises(ValueError, match="--block-size is"):
        VllmSettings(arguments=("--block-size", tokens))


def test_what_users_give_wins_over_our_own_options() -> None:
    config = cluster("--dtype=bfloat16", "--block_size", "16", dtype="float32")
    words = given(config)
    assert "--dtype" not in words and "--dtype=bfloat16" in words and "--block-size" not in words
    assert "--dtype" in given(cluster(dtype="float32"))


def test_the_options_that_are_vllms_too_are_passed_on() -> None:
    words = given(cluster(tool_call_parser="hermes", reasoning_parser="none", generation_config="vllm"))
    assert words[words.index("--tool-call-parser") + 1] == "hermes" and "--enable-auto-tool-choice" in words
    assert words[words.index("--generation-config") + 1] == "vllm"
    assert not {"--reasoning-parser", "--logprobs-mode"} & set(words)


@pytest.mark.parametrize(("device", "sizes"), [("cpu", ["1073741824"]), ("cuda", [])])
def test_a_gpu_has_the_memory_that_the_weights_leave(device: str, sizes: list[str]) -> None:
    vllm = VllmSettings(python="python", device=device)
    words = given(cluster(vllm=vllm))
    assert [words[words.index(word) + 1] for word in words if word == "--kv-cache-memory-bytes"] == sizes
    assert ("--enforce-eager" in words) is (device == "cpu")
    assert "7" in given(cluster(vllm=vllm, hbm_bytes=7))


def test_what_the_user_has_set_of_vllms_own_environment_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-7")
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    made = environment(cluster(threads=2), host="127.0.0.1", temporary=tmp_path, gpus=())
    assert "VLLM_CPU_OMP_THREADS_BIND" not in made and made["OMP_NUM_THREADS"] == "2"
    assert made["VLLM_HOST_IP"] == "127.0.0.1" and "CUDA_VISIBLE_DEVICES" not in made


def test_a_server_on_a_cpu_that_waits_gives_its_core_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's processes wait in loops of `sched_yield`."""
    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    ask = "import os, sys; os.sched_yield(); print(os.sched_yield.__module__, '/of/the/user' in sys.path)"
    said = subprocess.run([sys.executable, "-c", ask], env=os.environ | on_cpu(1), capture_output=True, check=True)
    assert said.stdout.split() == [b"sitecustomize", b"True"]


def test_each_server_gets_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch, short_tmp_path: Path) -> None:
    seen = {}

    def note(_config: object, _agent: object, _role: object, name: str, gpus: tuple[str, ...]) -> object:
        seen[name] = gpus
        return name

    monkeypatch.setenv("TMPDIR", str(short_tmp_path))
    monkeypatch.setattr("dualpath.cluster.engine_parts.vllm_part", note)
    vllm = VllmSettings(arguments=("-tp", "2"), device="cuda", gpus=tuple("abcdefgh"), version="0.32.0")
    node_parts(cluster(vllm=vllm, topology=Topology.parse("1Px2+1P+1D"), buffer_bytes=1), "tcp://127.0.0.1:1")
    assert seen == {
        "prefill-0": ("a", "b"),
        "prefill-1": ("c", "d"),
        "prefill-2": ("e", "f"),
        "decode-0": ("g", "h"),
    }


# ── before anything starts ───────────────────────────────────────────────────────────────────────────────────────────


def unsettled(python: str, **settings: object) -> ClusterConfig:
    return cluster(vllm=VllmSettings(python=python), **settings)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "")


def test_what_was_left_open_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = settled_vllm(unsettled(make_python(tmp_path)))
    assert (found.vllm.version, found.vllm.device) == ("0.32.0", "cpu")
    assert Path(found.vllm.logs).is_dir()
    key = preflight_vllm.os.environ[KEY_VARIABLE]
    assert len(key) > 30
    (tmp_path / "python").unlink()
    assert settled_vllm(found) is found and preflight_vllm.os.environ[KEY_VARIABLE] == key


@pytest.mark.parametrize(
    ("version", "lacks", "complaint"),
    [
        ("", (), "has no vLLM"),
        ("0.29.1", (), "has vLLM 0.29.1; this dualpath works with 0.30, 0.31, 0.32"),
        ("0.3", (), "has vLLM 0.3;"),
        ("0.32.0", ("dualpath", "xxhash"), "lacks dualpath, xxhash; install them there"),
    ],
)
def test_an_environment_that_will_not_do(tmp_path: Path, version: str, lacks: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(NotReadyError, match=f"^--vllm-python: .*{complaint}"):
        settled_vllm(unsettled(make_python(tmp_path, version, lacks)))


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/true"])
def test_what_is_no_interpreter(python: str) -> None:
    with pytest.raises(NotReadyError, match=f"--vllm-python: {python} can't be used"):
        settled_vllm(unsettled(python))


def test_no_vllm_anywhere_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_vllm, "_DISTRIBUTIONS", ())
    monkeypatch.setattr(preflight_vllm, "ENVIRONMENT", ".venv-that-is-not-there")
    with pytest.raises(NotReadyError, match="make setup-vllm"):
        find_python()


@pytest.mark.parametrize(("setting", "option"), [({"quota_ns": 7}, "--quota-ms"), ({"device": "cuda"}, "--device")])
def test_settings_of_the_embedded_engine_are_refused_by_name(setting: dict[str, object], option: str) -> None:
    with pytest.raises(NotReadyError, match=f"{option}: not with --engine vllm"):
        settled_vllm(unsettled("python", **setting))


def test_a_buffer_that_holds_no_block(tmp_path: Path) -> None:
    """Unless vLLM's own arguments say how large one is."""
    model = checkpoint(tmp_path / "tiny")
    asked = cluster(model=str(model), store=str(tmp_path / "kv"), buffer_bytes=BLOCK_BYTES - 1)
    vllm = VllmSettings(python=make_python(tmp_path), logs=str(tmp_path))
    with pytest.raises(NotReadyError, match=f"--buffer: {BLOCK_BYTES - 1} bytes does not hold one block"):
        settled(msgspec.structs.replace(asked, vllm=vllm))
    settled(msgspec.structs.replace(asked, vllm=msgspec.structs.replace(vllm, arguments=("--dtype", "bfloat16"))))


def test_too_few_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    python = make_python(tmp_path, cpu=False)
    wants_four = VllmSettings(python=python, arguments=("--tensor-parallel-size=2",))
    with pytest.raises(NotReadyError, match=r"1P1D takes 4 GPUs .* shows 3"):
        settled_vllm(cluster(vllm=wants_four))
    enough = settled_vllm(cluster(vllm=msgspec.structs.replace(wants_four, arguments=(), logs=str(tmp_path))))
    assert (enough.vllm.device, enough.vllm.gpus) == ("cuda", ("0", "1", "2"))


def test_servers_that_others_launch_need_a_key_that_is_known() -> None:
    with pytest.raises(NotReadyError, match=KEY_VARIABLE):
        settled_vllm(unsettled("/nowhere"), starts_servers=False)
