"""The ready file: there while `dualpath serve` serves, so that whoever waits for it reads of no server that is gone.

One that was killed can't remove its own; the next start does.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import msgspec

from dualpath.spec.log import ROOT
from dualpath.spec.private_files import PRIVATE
from dualpath.spec.whole_file import Draft, fill_whole

logger = logging.getLogger(f"{ROOT}.server")


class ReadyFile:
    """A context manager: at its start and at its end there is no file. Without a path it does nothing."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._written = b""

    def __enter__(self) -> Self:
        """Raises OSError when a file of before can't be removed."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        return self

    def write(self, facts: dict[str, Any]) -> None:
        """A file that can't be written now is an error in the log: clients are served all the same."""
        if self._path is None:
            return
        written = msgspec.json.encode(facts)
        try:
            fill_whole(Draft(self._path, PRIVATE), written, durable=False)
            self._written = written
        except OSError as error:
            logger.error("--ready-file: %s can't be written: %s", self._path, error.strerror)

    def __exit__(self, *_: object) -> None:
        """Another server's file of that name, which was started meanwhile, stays."""
        with suppress(OSError):
            if self._path is not None and self._written and self._path.read_bytes() == self._written:
                self._path.unlink()
