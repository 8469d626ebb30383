"""Prepares runs: makes the demo model and the store directories.

A separate process makes the model once, so this one never imports torch. One store is warmed up, and every run gets a
copy that links the block files instead of copying their bytes. A block file never changes after it is published, so a
run adds, moves aside or deletes blocks in its own directory only.
"""

import asyncio
import os
import shutil
import sys
from pathlib import Path

from rich.console import Console

from dualpath.lab.experiments.local_cluster import LaunchError, log_tail

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
BLOCK_SUFFIX = ".kv"


async def ensure_checkpoint(path: Path, log: Path, console: Console) -> None:
    """Makes the demo checkpoint at `path` unless there is one. Raises LaunchError with the tail of `log`."""
    missing = [name for name in MODEL_FILES if not (path / name).exists()]
    if not missing:
        return
    if path.exists():
        raise LaunchError(f"{path} exists but lacks {missing[0]}; give a checkpoint with --model, or remove it")
    console.print(f"making the demo model in {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft-{os.getpid()}")
    command = (sys.executable, "-m", "dualpath", "checkpoint", str(draft), "--demo")
    try:
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if code != 0:
            raise LaunchError(f"making the demo model failed with exit code {code}.{log_tail(log)}")
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def fresh_directory(path: Path) -> Path:
    """Returns `path` as an empty directory."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def linked_copy(source: Path, target: Path) -> Path:
    """Makes `target` a copy of the store at `source` that shares its block files; deletes what was there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link_blocks)
    return target


def _link_blocks(source: str, target: str) -> None:
    if source.endswith(BLOCK_SUFFIX):
        os.link(source, target)
    else:
        shutil.copy2(source, target)
