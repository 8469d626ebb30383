"""What must hold of the files that options name, and of the room for buffers. Part of `preflight`."""

import os
from pathlib import Path

from dualpath.cluster.config import ClusterConfig
from dualpath.transfer.pool_files import POOL_DIRECTORY


class NotReadyError(ValueError):
    """The cluster can't start as it is configured; the message names the option and says what to do."""


def check_outputs(config: ClusterConfig) -> None:
    """Check that the files which are written later can be. Raises NotReadyError."""
    if config.journal is not None:
        _check_writable("--journal", Path(config.journal))
    if config.ready_file is not None:
        path = Path(config.ready_file)
        _check_writable("--ready-file", path)
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):  # it would be replaced, /dev/null too
            raise NotReadyError(f"--ready-file: {path} is there and is no regular file; give another place")


def _check_writable(option: str, path: Path) -> None:
    folder = path.parent
    why = ""
    if path.is_dir():
        why = "it is a folder; give a file in it"
    elif not folder.is_dir():
        why = f"there is no folder {folder}; make it, or give another place"
    elif path.exists() and not os.access(path, os.W_OK):
        why = "others have written it, or its disk is read-only; give another place"
    elif (path.is_file() or not path.exists()) and not os.access(folder, os.W_OK | os.X_OK):
        why = f"this user may not write in {folder}; give another place"
    if why:
        raise NotReadyError(f"{option}: {path} can't be written: {why}")


def check_buffers(config: ClusterConfig, engines: int) -> None:
    """Check that this host could have the buffers of so many engines at all. Raises NotReadyError.

    What is free is known only when engines take it: killed ones may have left buffers that are removed before.
    """
    room = os.statvfs(POOL_DIRECTORY)
    whole_bytes, wanted_bytes = room.f_blocks * room.f_frsize, engines * config.buffer_bytes
    if wanted_bytes > whole_bytes:
        raise NotReadyError(
            f"--buffer: {engines} engines of {config.buffer_bytes} bytes each need more than the {whole_bytes} bytes "
            f"of {POOL_DIRECTORY}; make the buffer smaller or the file system larger (docker: --shm-size)"
        )
