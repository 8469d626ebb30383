"""The table of trace formats, the one place where a format is named.

To add a format, write its reader in a module of its own (``read(path, options)`` returns trajectories and takes its
errors from `dualpath.traces.reading.records`) and give it an entry in `FORMATS`. The help of commands, the messages
about files they can't read, and the description of results follow. This module imports only the standard library,
because every command's ``--help`` shows `SOURCES_HELP`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dualpath.traces.reading import ReadOptions
    from dualpath.traces.trajectory import Trajectory

    Reader = Callable[[Path, ReadOptions], list[Trajectory]]


class Format(NamedTuple):
    """A trace format."""

    name: str
    """The prefix in ``weka:FILE``."""
    title: str
    """What a file holds, for messages."""
    keys: frozenset[str]
    """A file whose first record has these keys is taken to be of this format."""
    summary: str
    """One line for a table of formats."""
    reader: str
    """``module:function``, imported when the first file is read."""
    texts: bool = False
    """Whether it holds texts, whose tokens must be counted."""
    blocks: bool = False
    """Whether ``name@TOKENS:FILE`` may say how many tokens a block has."""

    def load_reader(self) -> Reader:
        module, _, function = self.reader.partition(":")
        reader: Reader = getattr(import_module(f"dualpath.traces.{module}"), function)
        return reader


FORMATS = (
    Format(
        "weka",
        "WEKA sessions",
        frozenset({"requests"}),
        "sessions of coding agents: lengths, block hashes, pauses, subagents",
        "weka:read_weka",
    ),
    Format(
        "mooncake",
        "Mooncake traces",
        frozenset({"hash_ids", "input_length"}),
        "requests: lengths, block hashes, arrivals; sessions where given",
        "mooncake:read_mooncake",
        blocks=True,
    ),
    Format(
        "miniswe",
        "mini-SWE-agent sessions",
        frozenset({"session_id", "input"}),
        "requests with whole prompts and answers as text",
        "miniswe:read_miniswe",
        texts=True,
    ),
    Format(
        "chat",
        "chat messages",
        frozenset({"messages"}),
        "OpenAI's messages: a conversation a line, or a growing request a line",
        "chat:read_chat",
        texts=True,
    ),
    Format(
        "sharegpt",
        "ShareGPT conversations",
        frozenset({"conversations"}),
        "conversations as from and value",
        "sharegpt:read_sharegpt",
        texts=True,
    ),
)
BY_NAME = {one.name: one for one in FORMATS}
PAPER_ROWS = ("32K", "48K", "64K")
"""Rows of the paper's trace table, named by the length of their contexts."""

SOURCES_HELP = (
    f"{', '.join(PAPER_ROWS[:-1])} or {PAPER_ROWS[-1]} (the paper's), or files or directories of "
    f"{', '.join(one.title for one in FORMATS)}; FORMAT:FILE names the format"
)
