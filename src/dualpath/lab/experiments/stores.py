"""Store directories of an experiment: one warmed up once, and a fresh copy of it for every run.

Copying links the block files instead of their bytes: a block file never changes after it is published, so a run that
adds, moves aside or deletes blocks does so in its own directory only.
"""

import os
import shutil
from pathlib import Path

BLOCK_SUFFIX = ".kv"


def fresh_directory(path: Path) -> Path:
    """`path`, empty."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def linked_copy(source: Path, target: Path) -> Path:
    """`target` as a copy of the store at `source` that shares its block files; whatever was there is gone."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link_blocks)
    return target


def _link_blocks(source: str, target: str) -> None:
    if source.endswith(BLOCK_SUFFIX):
        os.link(source, target)
    else:
        shutil.copy2(source, target)
