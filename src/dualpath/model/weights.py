"""Exchange of a loaded model's weights, and giving their memory back: for trainers, which write a checkpoint per step.

New weights are first read into host memory beside the old ones, and checked; only then are they copied into place. So
whatever is wrong with a checkpoint is found while the old weights still serve.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from dualpath.model.checkpoint import model_fingerprint
from dualpath.model.model import LoadedModel, load_network

_NO_MATTER = frozenset(
    {"_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype"}
    | {"transformers_version", "use_cache"}
)
"""Fields of a config that decide nothing of what the weights compute."""
_NAMED = 5
"""Most differences that a message names."""


class WeightsMismatchError(ValueError):
    """The checkpoint is not one of the model that is served."""


class NewWeights:
    """Weights in host memory, checked and ready for `use`."""

    def __init__(self, state: dict[str, Tensor], fingerprint: str) -> None:
        self.state = state
        self.fingerprint = fingerprint


def read_weights(model: LoadedModel, served: str | Path, path: str | Path) -> NewWeights:
    """Read the checkpoint `path` for a model that was loaded from `served`; the model does not change.

    Raises OSError when it can't be read, WeightsMismatchError that says how it differs.
    """
    network, fingerprint = _read(model, served, path)
    state = network.state_dict()
    if model.network is not None:
        wanted = {name: tuple(tensor.shape) for name, tensor in model.network.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if wanted != given:
            different = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
            raise WeightsMismatchError(f"{path} has other tensors than the served model: {_some(different)}")
    return NewWeights(state, fingerprint)


@torch.no_grad()
def use_weights(model: LoadedModel, new: NewWeights) -> None:
    """Copy `new` into the model's own tensors, while no forward runs. Raises WeightsMismatchError if they sleep."""
    if model.network is None:
        raise WeightsMismatchError("the weights are asleep; wake them first")
    for name, tensor in model.network.state_dict().items():
        tensor.copy_(new.state[name])
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def release_weights(model: LoadedModel, keep: bool) -> None:
    """Take the weights off the device: to host memory (`keep`), or away. Where the device is the host, keeping is all
    there is to do."""
    if keep:
        model.network.to("cpu")
    else:
        model.network = None


def restore_weights(model: LoadedModel, served: str | Path, path: str | Path) -> str:
    """Put the weights back onto the device. Returns the fingerprint of those that had to be read from `path`, else "".

    Raises as `read_weights`.
    """
    fingerprint = ""
    if model.network is None:
        model.network, fingerprint = _read(model, served, path)
    model.network.to(model.device)
    return fingerprint


def _read(model: LoadedModel, served: str | Path, path: str | Path) -> tuple[Any, str]:
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder on the engine's host; give a checkpoint that every engine sees"
        )
    fingerprint = model_fingerprint(path)
    _check_config(AutoConfig.from_pretrained(served, local_files_only=True), path)
    _check_tokenizer(Path(served), Path(path))
    return load_network(path, model.dtype), fingerprint


def _check_config(served: Any, path: str | Path) -> None:
    old, new = (
        {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER}
        for config in (served, AutoConfig.from_pretrained(path, local_files_only=True))
    )
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if different:
        raise WeightsMismatchError(
            f"{path} is another model than the served one: its config differs in {_some(different)}"
        )


def _check_tokenizer(served: Path, path: Path) -> None:
    """A trainer's folder may lack a tokenizer; one that is there must give the same ids."""
    files = [folder / "tokenizer.json" for folder in (served, path)]
    if not all(file.is_file() for file in files):
        return
    old, new = (json.loads(file.read_text()) for file in files)
    if (old["model"].get("vocab"), old.get("added_tokens")) != (new["model"].get("vocab"), new.get("added_tokens")):
        raise WeightsMismatchError(f"{path} has another tokenizer than the served model: tokens would mean other texts")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown
