"""What must hold before engines are worth starting, told in a moment and without torch.

`settled` finds the checkpoint and chooses what was left open. Every error is one line: what is wrong, where, what to
do. What only the engines can know (whether the weights load, whether the model runs through our attention) they say.
"""

import contextlib
import errno
import importlib.metadata
import logging
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from dualpath.cluster.cluster_secret import HOW_TO_GIVE, secret_of_environment
from dualpath.cluster.config import DTYPES, ClusterConfig
from dualpath.cluster.control_address import control_place
from dualpath.cluster.preflight_files import NotReadyError, check_buffers, check_outputs, check_tls, cuda_devices
from dualpath.cluster.preflight_vllm import settled_vllm
from dualpath.kv import KVLayout, StoreError, open_store
from dualpath.kv.layout import LayerKV, layer_parts
from dualpath.kv.refusals import refusal
from dualpath.spec.loopback import is_loopback

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_DEVICES = re.compile(r"cpu|cuda(:\d+)?")
_RDMA_DEVICES = Path("/sys/class/infiniband")


def settled(config: ClusterConfig, starts_engines: bool = True) -> ClusterConfig:
    """Returns `config` with the checkpoint's directory as `model`, a name to serve it by, and a concrete `dtype`.

    With vLLM, it is known which one is started. Settling twice changes nothing. Raises NotReadyError, StoreError.
    """
    directory = _checkpoint(config.model)
    facts = _read_config(directory)
    if config.engine == "vllm":  # it says itself what it can't run
        config = settled_vllm(config, starts_engines)
        dtype = "float32" if config.dtype == "auto" and config.vllm.runs_on("cpu") else config.dtype
        if not config.vllm.has("--dtype", "--kv-cache-dtype"):
            _check_sizes(config, facts, dtype)
    else:
        dtype = _own_dtype(facts, config.device) if config.dtype == "auto" else config.dtype
        _check_device(config.device)
        _check_device_copies(config)
        _check_architecture(directory, facts)
        _check_sizes(config, facts, dtype)
    _check_store(config.store)
    _check_tracing(config)
    check_tls(config)
    check_outputs(config)
    secret = config.cluster_secret or secret_of_environment()
    if secret is None:
        _check_loopback(config)
    return msgspec.structs.replace(
        config,
        model=str(directory),
        dtype=dtype,
        cluster_secret=secret,
        served_model_name=config.served_model_name or _name(config.model),
    )


def settled_agent(config: ClusterConfig) -> ClusterConfig:
    """Returns the settings of a node agent alone, with the cluster's secret. Raises NotReadyError, StoreError."""
    _check_store(config.store)
    check_buffers(config, 1)
    secret = config.cluster_secret or secret_of_environment()
    if secret is None:
        raise NotReadyError(f"an agent needs the secret of the cluster that it joins; {HOW_TO_GIVE}")
    return msgspec.structs.replace(config, cluster_secret=secret)


def _checkpoint(model: str) -> Path:
    """Returns the directory of a checkpoint: the one named, or that of a hub's name in the local cache."""
    directory = Path(model).expanduser()
    if (directory / "config.json").is_file():
        return directory
    if directory.exists() or not _HUB_NAME.fullmatch(model):
        raise NotReadyError(f"--model: {model} has no config.json; give a Hugging Face checkpoint's directory")
    from huggingface_hub import snapshot_download

    with contextlib.suppress(OSError, ValueError):
        cached = Path(snapshot_download(model, local_files_only=True))
        if (cached / "config.json").is_file() and any(cached.glob("*.safetensors")):
            return cached
    local = model.rpartition("/")[2]
    raise NotReadyError(
        f"--model: {model} is neither a directory here nor whole in the local Hugging Face cache, and nothing is "
        f"downloaded while serving; get it with `hf download {model} --local-dir {local}`, then serve {local}"
    )


def _name(model: str) -> str:
    """Returns the name that clients use: a hub's name as it was given, else the directory's own."""
    directory = Path(model).expanduser()
    return directory.resolve().name if directory.exists() else model


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode((directory / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError) as error:
        raise NotReadyError(
            f"--model: {directory / 'config.json'} can't be read: {error}; get the file again"
        ) from error


def _own_dtype(facts: dict[str, Any], device: str) -> str:
    """Returns the checkpoint's own type on a GPU. CPUs compute in float32: half types are slow on most of them."""
    own = facts.get("dtype") or facts.get("torch_dtype")
    return own if device.startswith("cuda") and own in DTYPES else "float32"


def _check_device(device: str) -> None:
    if not _DEVICES.fullmatch(device):
        raise NotReadyError(f"--device: {device!r} is not supported; choose cpu or cuda")
    if device == "cpu":
        return
    torch = importlib.metadata.version("torch")
    if torch.endswith("+cpu"):
        raise NotReadyError(
            f"--device: this torch ({torch}) is built without CUDA; install one with it, or use --device cpu"
        )
    if cuda_devices() == 0:
        raise NotReadyError(
            "--device: no CUDA device is found here; see whether nvidia-smi shows one, or use --device cpu"
        )


def _check_device_copies(config: ClusterConfig) -> None:
    if config.device_copies != "cnic":
        return
    from dualpath.transfer.transports.nixl.agent import installed_library

    if installed_library() is None:
        raise NotReadyError(
            "--device-copies cnic: needs NIXL: pip install 'dualpath[nixl]', or leave it out: memcpy copies without it"
        )
    if config.device != "cpu" and not any(_RDMA_DEVICES.glob("*")):
        raise NotReadyError(
            f"--device-copies cnic: a GPU's copies need an RDMA NIC, and {_RDMA_DEVICES} shows none; use memcpy"
        )


def _check_architecture(directory: Path, facts: dict[str, Any]) -> None:
    reason = refusal(SimpleNamespace(**facts))
    if reason is not None:
        raise NotReadyError(f"--model: {directory} {reason}")
    named = facts.get("architectures") or ()
    names = [str(name) for name in named] if isinstance(named, list | tuple) else [str(named)]
    if names and not any("CausalLM" in name or "LMHead" in name for name in names):
        raise NotReadyError(
            f"--model: {directory} is a {', '.join(names)}; give a causal language model (…ForCausalLM)"
        )
    if "num_hidden_layers" in facts and not any(directory.glob("*.safetensors")):
        raise NotReadyError(f"--model: {directory} has no *.safetensors; get or convert the weights to safetensors")


def _check_sizes(config: ClusterConfig, facts: dict[str, Any], dtype: str) -> None:
    """Check that a buffer holds a block. A config.json that does not say its sizes is left to the engines."""
    try:
        layout = KVLayout.of([LayerKV(parts) for parts in layer_parts(SimpleNamespace(**facts))], dtype)
    except (IndexError, TypeError, ValueError, AttributeError):
        return
    for option, size in (("--buffer", config.buffer_bytes), ("--hbm", config.hbm_bytes)):
        if size < layout.full_block_bytes:
            raise NotReadyError(
                f"{option}: {size} bytes does not hold one block of this model's KV, {layout.full_block_bytes} bytes "
                f"for {layout.block_tokens} tokens; give room for whole prompts"
            )


def _check_store(location: str) -> None:
    """Check the place, and that a directory can be written to, or was mounted so that it can't.

    A server of objects is asked by the coordinator.
    """
    open_store(location)
    if "://" in location:
        return
    try:
        Path(location).mkdir(0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=location):
            pass
    except OSError as error:
        if error.errno == errno.EROFS and Path(location).is_dir():
            logger.warning("--store: %s is on a read-only disk: what it has is served, and nothing is stored", location)
            return
        raise StoreError(
            f"--store: {location} can't be written to: {error.strerror}; give a directory of yours"
        ) from error


def _check_loopback(config: ClusterConfig) -> None:
    """Without a secret that other hosts have too, nothing may be listened at that they can reach."""
    hosts = {"--data-host": config.data_host}
    control = control_place(config.control_address)
    if isinstance(control, tuple):
        hosts["--join-address"] = control[0]
    for option, host in hosts.items():
        if not is_loopback(host):
            raise NotReadyError(
                f"{option}: {host} is not this host alone, so the cluster needs a secret; {HOW_TO_GIVE}"
            )


def _check_tracing(config: ClusterConfig) -> None:
    if config.otlp_traces_endpoint is None:
        return
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
        raise NotReadyError("--otlp-traces-endpoint: needs OpenTelemetry: pip install 'dualpath[otel]'")
    if "://" not in config.otlp_traces_endpoint:
        raise NotReadyError(
            f"--otlp-traces-endpoint: {config.otlp_traces_endpoint} is no URL; "
            "give one such as http://localhost:4318/v1/traces"
        )
