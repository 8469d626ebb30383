"""The identity of what a vLLM engine computes: engines share KV only when it is equal.

It covers the model's configuration as vLLM has it (overrides included), the arrangement of its KV (attention backend,
block shape, dtype), and of its weights every safetensors header (names, types, shapes) and a sample of every tensor:
its first `SAMPLE_BYTES`. A checkpoint that differs only behind these is not told apart; name it with the `weights` key.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAMPLE_BYTES = 4096
_SAME_MODEL = ("transformers_version", "_name_or_path", "architectures")
"""Configuration keys that do not bear on what is computed."""


def fingerprint(config: dict[str, Any], arrangement: dict[str, Any], weights: str | Path) -> str:
    """Returns 32 hex digits. `weights` is a folder of safetensors files, or a name that the operator answers for.

    Raises ValueError when the folder has none.
    """
    digest = hashlib.blake2b(digest_size=16)
    known = {key: value for key, value in config.items() if key not in _SAME_MODEL}
    digest.update(json.dumps([known, arrangement], sort_keys=True, default=str).encode())
    if isinstance(weights, str):
        digest.update(weights.encode())
        return digest.hexdigest()
    files = sorted(weights.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{weights} has no safetensors files; name these weights with the key `weights` of "
            "kv_connector_extra_config"
        )
    for file in files:
        for part in _sample(file):
            digest.update(part)
    return digest.hexdigest()


def _sample(file: Path) -> Iterator[bytes]:
    """Raises ValueError for what is no safetensors file."""
    with file.open("rb") as stream:
        (n_bytes,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(n_bytes)
        try:
            tensors = json.loads(header)
            ranges = sorted(tuple(each["data_offsets"]) for name, each in tensors.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no safetensors file: {error!r}") from None
        yield header
        for start, stop in ranges:
            stream.seek(8 + n_bytes + start)
            yield stream.read(min(SAMPLE_BYTES, stop - start))


def weights_folder(model: str, revision: str | None) -> Path:
    """Returns the folder of a model that is loaded already. Raises ValueError when it is not on this host."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception as error:  # of many kinds
        raise ValueError(f"can't find the files of {model}: {error}; name its weights with the key `weights`") from None
