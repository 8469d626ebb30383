"""What requests get that don't say otherwise: the model's generation_config.json, as vLLM applies it.

vLLM takes six of its fields and ignores the rest, `do_sample` too.
"""

import math
from pathlib import Path

import msgspec

from dualpath.spec.sampling import LogprobsMode

GENERATION_CONFIGS = ("auto", "vllm")
"""Where defaults come from, in vLLM's words: the model's file, or nowhere."""


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Values for fields that a request leaves out; `max_tokens` None: the rest of the context."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    logprobs_mode: LogprobsMode = "raw_logprobs"


class _File(msgspec.Struct):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (1e-6, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "max_new_tokens": (1, math.inf),
}


def read_generation_defaults(model: str | Path) -> dict[str, float]:
    """Returns the fields that a checkpoint's generation_config.json sets; none where it has no such file.

    Raises ValueError that names the file and the field.
    """
    path = Path(model) / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        given = msgspec.json.decode(path.read_bytes(), type=_File)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: {error}; mend it, or start with --generation-config vllm") from error
    fields = {name: value for name, value in msgspec.structs.asdict(given).items() if value is not None}
    for name, value in fields.items():
        least, most = _BOUNDS[name]
        if not least <= value <= most:
            raise ValueError(
                f"{path}: {name} is {value:g}, not from {least:g} to {most:g}; mend it, or start with "
                "--generation-config vllm"
            )
    if "max_new_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_new_tokens")
    if fields.get("top_k") == -1:
        fields["top_k"] = 0
    return fields
