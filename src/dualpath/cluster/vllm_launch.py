"""The command and the environment of one vLLM server."""

import json
import os
import socket
from pathlib import Path

from dualpath.cluster.config import HBM_BYTES, ClusterConfig
from dualpath.core.vocabulary import BLOCK_TOKENS, Role

MODULE = "vllm.entrypoints.openai.api_server"
"""`vllm serve` does not know itself where vLLM is built for a CPU: its distribution has another name there."""
_ON_CPU = Path(__file__).parent / "vllm_on_cpu"
_CONNECTOR = {
    "kv_connector": "DualPathConnector",
    "kv_connector_module_path": "dualpath.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


def free_port(host: str) -> int:
    """Returns a port that nobody listens at now. Raises OSError."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def command(
    config: ClusterConfig, role: Role, *, agent: str, name: str, ticket: str, host: str, port: int
) -> list[str]:
    """Returns the command of an engine's server. Ours come last, because the last one counts."""
    extra = {"role": role.value, "agent": agent, "url": url_of(host, port), "name": name, "ticket": ticket}
    names = (config.served_model_name or config.model, *config.served_model_aliases)
    caching = "--no-enable-prefix-caching" if role is Role.PREFILL else "--enable-prefix-caching"
    return [
        *(config.vllm.python, "-m", MODULE),
        *_defaults(config),
        *config.vllm.arguments,
        *("--model", config.model, "--served-model-name", *names),
        *("--host", host, "--port", str(port)),
        *("--enable-scale-out", "--enable-prompt-tokens-details", caching),
        *("--kv-transfer-config", json.dumps(_CONNECTOR | {"kv_connector_extra_config": extra})),
    ]


def _defaults(config: ClusterConfig) -> list[str]:
    """Returns what our own options say, where vLLM's arguments do not say it."""
    vllm, eager = config.vllm, ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc")
    found = [] if vllm.has("--block-size") else ["--block-size", str(BLOCK_TOKENS)]
    if vllm.device == "cpu" and not vllm.has(*eager):
        found += ["--enforce-eager"]
    for name, value in _mapped(config).items():
        if value is not None and not vllm.has(name):
            found += [name, value]
            found += ["--enable-auto-tool-choice"] if name == "--tool-call-parser" else []
    return found


def _mapped(config: ClusterConfig) -> dict[str, str | None]:
    """Returns the options of ours that are vLLM's too; None: as vLLM would have it."""

    def unless(value: object, default: object) -> str | None:
        return None if value == default else str(value)

    memory = None if config.vllm.device == "cpu" else HBM_BYTES  # a GPU has what the weights leave, a CPU half the host
    return {
        "--kv-cache-memory-bytes": unless(config.hbm_bytes, memory),
        "--dtype": unless(config.dtype, "auto"),
        "--generation-config": unless(config.generation_config, "auto"),
        "--logprobs-mode": unless(config.logprobs_mode, "raw_logprobs"),
        "--tool-call-parser": unless(config.tool_call_parser or "none", "none"),
        "--reasoning-parser": unless(config.reasoning_parser or "none", "none"),
    }


def on_cpu(threads: int, host: str = "127.0.0.1") -> dict[str, str]:
    """Returns what is set for a server on cores that it shares with others; see `vllm_on_cpu/sitecustomize.py`."""
    path = os.pathsep.join(filter(None, [str(_ON_CPU), os.environ.get("PYTHONPATH")]))
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    return cores | _anywhere(host)


def _anywhere(host: str) -> dict[str, str]:
    return {"VLLM_HOST_IP": host, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def environment(config: ClusterConfig, *, host: str, temporary: Path, gpus: tuple[str, ...]) -> dict[str, str]:
    """Returns what is set for one server beside what it inherits. What the user has set of vLLM's own stays.

    `temporary` is for its sockets.
    """
    ours = _anywhere(host) | {"TMPDIR": str(temporary)}
    if config.vllm.device == "cpu":
        ours |= on_cpu(config.threads, host)
    elif gpus:
        ours |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    kept = {name for name in ours if name.startswith(("VLLM_", "HF_")) and name in os.environ}
    return {name: value for name, value in ours.items() if name not in kept}
