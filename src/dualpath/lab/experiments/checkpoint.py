"""The demo model: made once, by a process of its own so that this one never imports torch."""

import asyncio
import os
import shutil
import sys
from pathlib import Path

from rich.console import Console

from dualpath.lab.experiments.cluster_process import ClusterError, log_tail

FILES = ("config.json", "model.safetensors", "tokenizer.json")


async def ensure_checkpoint(path: Path, log: Path, console: Console) -> None:
    """Make the demo checkpoint at `path` unless there is one. Raises ClusterError with the tail of `log`."""
    missing = [name for name in FILES if not (path / name).exists()]
    if not missing:
        return
    if path.exists():
        raise ClusterError(f"{path} is there but lacks {missing[0]}; give a checkpoint with --model, or remove it")
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
            raise ClusterError(f"making the demo model failed with exit code {code}.{log_tail(log)}")
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
