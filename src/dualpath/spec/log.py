"""The log of a process of the cluster: a line on stderr says when, who and what, as text or as JSON.

Our loggers stand below ``dualpath``. A program that uses us as a library configures logging itself.
"""

import logging
import time

import msgspec

FORMATS = ("text", "json")
ROOT = "dualpath"


def start_log(style: str = "text") -> None:
    """Send the log to stderr, unless this process has a log already. `style` is one of `FORMATS`."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if style == "json" else _Text("%(asctime)s %(who)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger(ROOT).setLevel(logging.INFO)


class Seldom:
    """Says that it is time for a line at most once a minute: a stranger must not be able to fill the disk."""

    EVERY_S = 60.0

    def __init__(self) -> None:
        self._last_s = -self.EVERY_S

    def due(self) -> bool:
        now_s = time.monotonic()
        if now_s - self._last_s < self.EVERY_S:
            return False
        self._last_s = now_s
        return True


def _who(record: logging.LogRecord) -> str:
    return record.name.removeprefix(f"{ROOT}.")


class _Text(logging.Formatter):
    """``2026-01-31 12:00:00 who: message``, and the record's own `fields` as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        record.who = _who(record)
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())])


class _Json(logging.Formatter):
    """One object a line: ``time``, ``level``, ``who``, ``message``, and the record's own `fields` if it has some."""

    def format(self, record: logging.LogRecord) -> str:
        written = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created)),
            "level": record.levelname.lower(),
            "who": _who(record),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            written["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(written).decode()
