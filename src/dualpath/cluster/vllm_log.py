"""What vLLM's log says: how far a server is with its start, and why it has ended.

The lines are vLLM's own and change between versions. One that is not known says nothing, and nothing depends on it.
"""

import re
from collections.abc import Iterable

_STEPS = (
    ("non-default args", "reads its configuration"),
    ("Initializing a V1 LLM engine", "starts its engine"),
    ("Starting to load model", "loads the weights"),
    ("Loading weights took", "makes room for KV"),
    ("Dynamo bytecode transform", "compiles the model"),
    ("Capturing CUDA graph", "captures CUDA graphs"),
    ("init engine (", "has its engine"),
    ("Starting vLLM", "starts its HTTP server"),
)
_NO_AGENT = re.compile(r"the agent at \S+ is not there \((?P<why>.*)\); vLLM serves on without it")
"""The connector's own line, `vllm.agent_link`."""
_REFUSES = "it refuses: "
_PREFIX = re.compile(r"^(?:\([\w-]+ pid=\d+\) ?)?(?:(?:ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
"""Which process says it, when, and where in the code."""
_ERROR = re.compile(r"^(?:[a-zA-Z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b: *(?P<message>.*)")
_USAGE = re.compile(r"^\S+: error: (?P<message>.+)")
"""argparse's last line."""
_DIED = re.compile(r"^(?P<message>Worker proc \S+ died .*)")
_FOLLOWS_FROM_ANOTHER = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "See root cause",
    "EngineCore encountered an issue",
    "cancelled",
)
_LONGEST_REASON = 500


def step_of(line: str) -> str | None:
    """Returns what a server does now, if the line says that."""
    return next((step for words, step in _STEPS if words in line), None)


def without_agent(line: str) -> tuple[str, bool] | None:
    """Returns why an engine is no part of the cluster, and whether that is for good; None if the line says nothing."""
    found = _NO_AGENT.search(line)
    return None if found is None else (found["why"].removeprefix(_REFUSES), found["why"].startswith(_REFUSES))


def reason_in(lines: Iterable[str]) -> str:
    """Returns the last error that does not follow from another one, in one line; empty when there is none."""
    bare = [_PREFIX.sub("", line.rstrip()) for line in lines]
    found = ""
    for index, line in enumerate(bare):
        message = _message(line, bare[index + 1 : index + 3])
        if message and (not found or not any(words in message for words in _FOLLOWS_FROM_ANOTHER)):
            found = message
    return found[:_LONGEST_REASON]


def _message(line: str, after: list[str]) -> str:
    said = _USAGE.match(line) or _DIED.match(line)
    if said:
        return said["message"]
    error = _ERROR.match(line)
    if error is None:
        return ""
    if "validation error for " in line:  # pydantic: the field, or the sentence itself, stands below
        return " ".join(part.strip() for part in after if part.strip()).partition(" [type=")[0]
    return error["message"] or line
