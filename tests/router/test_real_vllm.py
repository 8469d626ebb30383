"""What a client gets through the router is what a vLLM server gives it, field by field. Needs `.venv-vllm`.

The router hands every request off to that one server, which has no connector and takes no notice of the owner.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_routing import FakeRouting, running_router

from dualpath.cluster.vllm_launch import on_cpu
from dualpath.model.checkpoint import make_checkpoint
from dualpath.server import bind

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("DUALPATH_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
START_S = 240.0
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM in .venv-vllm")]

SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
ASKED: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "system", "content": "héllo ✓"}, {"role": "user", "content": "x" * 150}],
    "max_tokens": 12,
    "temperature": 0,
}
USAGE = {"stream_options": {"include_usage": True}}
STREAM = {"stream": True, **USAGE}
FORMAT = {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}
PROMPTS = {"model": "m", "prompt": ["hello", "wörld"], "max_tokens": 9, "seed": 3}
ONE = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 9, "temperature": 0}
RESPONSE = {"model": "m", "input": "hi", "max_output_tokens": 9, "temperature": 0}
CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    f"/v1/{name}" for name in ("chat/completions", "completions", "responses", "messages")
)
SAME = [
    (CHAT, ASKED),
    (CHAT, ASKED | {"max_tokens": 16}),
    (CHAT, ASKED | {"stream": True}),
    (CHAT, ASKED | STREAM),
    (CHAT, ASKED | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 64}),
    (CHAT, ASKED | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 64, **STREAM}),
    (CHAT, ASKED | {"tools": [TOOL], "max_tokens": 8}),
    (CHAT, ASKED | {"response_format": FORMAT, "max_tokens": 40}),
    (CHAT, ASKED | {"logprobs": True, "top_logprobs": 3, "return_token_ids": True}),
    (CHAT, ASKED | {"logprobs": True, "top_logprobs": 3, "return_token_ids": True, **STREAM}),
    (CHAT, ASKED | {"n": 3, "seed": 7, "temperature": 1}),
    (CHAT, ASKED | {"echo": True, "prompt_logprobs": 1}),
    (COMPLETIONS, PROMPTS | {"n": 2}),
    (COMPLETIONS, ONE | {"logprobs": 2, "return_token_ids": True}),
    (COMPLETIONS, ONE | {"logprobs": 2, "return_token_ids": True, **STREAM}),
    (COMPLETIONS, ONE | {"echo": True, "logprobs": 2}),
    (COMPLETIONS, ONE | {"stream": True, "echo": True}),
    (COMPLETIONS, ONE | {"use_beam_search": True, "n": 2}),
    (RESPONSES, RESPONSE),
    (RESPONSES, RESPONSE | {"stream": True}),
    (MESSAGES, ASKED | {"max_tokens": 9}),
    (MESSAGES, ASKED | {"max_tokens": 9, "stream": True}),
    ("/tokenize", {"model": "m", "prompt": "abc"}),
    ("/detokenize", {"model": "m", "tokens": [1, 2]}),
    ("/v1/messages/count_tokens", {"model": "m", "messages": ASKED["messages"][1:]}),
    # refusals, in vLLM's words
    (CHAT, ASKED | {"model": "another"}),
    (CHAT, ASKED | {"n": 2}),
    (CHAT, ASKED | {"max_tokens": 99_999}),
    (CHAT, ASKED | {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": {"type": 1}}}}),
    (COMPLETIONS, ONE | {"prompt": []}),
    (MESSAGES, ASKED | {"model": "another"}),
]
INTERLEAVED = [
    (CHAT, ASKED | {"n": 3, "seed": 7, "temperature": 1, **STREAM}),
    (COMPLETIONS, PROMPTS | {"n": 2, **STREAM}),
]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm")
    make_checkpoint(folder / "model", "qwen3", head_dim=64)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    environment = on_cpu(1) | {"VLLM_CACHE_ROOT": str(folder / "cache")}
    command = f"{PYTHON} -m vllm.entrypoints.openai.api_server --model {folder / 'model'} --served-model-name m"
    command += f" --host 127.0.0.1 --port {port} --enforce-eager --kv-cache-memory-bytes 134217728 --block-size 64"
    command += " --max-model-len 2048 --max-num-seqs 8 --enable-prompt-tokens-details --enable-scale-out"
    command += " --no-enable-prefix-caching --dtype float32 --enable-auto-tool-choice --tool-call-parser hermes"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command.split(), env=os.environ | environment, stdout=log, stderr=log)
    try:
        _wait(f"http://127.0.0.1:{port}", server, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def _wait(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up_s = time.monotonic() + START_S
    while time.monotonic() < give_up_s and server.poll() is None:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"vLLM did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def cluster(vllm: str) -> FakeRouting:
    cluster = FakeRouting([vllm])
    cluster.cached_tokens = lambda number: 0  # the server has no prefix cache
    return cluster


@pytest.fixture(scope="module")
def router(cluster: FakeRouting) -> Iterator[str]:
    with running_router(cluster) as url:
        yield url


def answer(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    response = httpx.post(url + path, json=body, timeout=60, trust_env=False)
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.status_code, _without_names(response.json())
    return response.status_code, _joined([_event(block) for block in response.text.split("\n\n") if block])


def _event(block: str) -> tuple[str, Any]:
    name, _, data = block.rpartition("data: ")
    return name, data if data == "[DONE]" else _without_names(json.loads(data))


class _DifferentError(Exception):
    """Two events that are no two parts of one delta."""


_TEXT = ("content", "text", "arguments", "delta", "partial_json")
_LISTS = ("token_ids", "tokens", "token_logprobs", "top_logprobs", "text_offset", "content", "logprobs")
_LATER = ("finish_reason", "stop_reason", "system_fingerprint", "sequence_number")


def _joined(events: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Joins deltas that follow each other: how many tokens an event has depends on who was faster."""
    joined: list[tuple[str, Any]] = []
    for event in events:
        try:
            grown = _join("", joined[-1], event) if joined else event
        except _DifferentError:
            grown = event
        if grown is event or tuple(grown) == joined[-1]:  # the same event twice is no delta
            joined.append(event)
        else:
            joined[-1] = tuple(grown)
    return joined


def _join(name: str, one: Any, other: Any) -> Any:
    if name in _LATER:
        return other
    if isinstance(one, str) and isinstance(other, str) and name in _TEXT:
        return one + other
    if isinstance(one, list) and isinstance(other, list) and name in _LISTS:
        return one + other
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _join(key, one.get(key), other.get(key)) for key in one | other}
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        return [_join(name, a, b) for a, b in zip(one, other, strict=True)]
    if one != other:
        raise _DifferentError
    return one


def _without_names(value: Any) -> Any:
    """Without what differs from one request to the next. (Events are numbered, and how many there are differs.)"""
    if isinstance(value, list):
        return [_without_names(one) for one in value]
    if isinstance(value, dict):
        changing = ("id", "created", "created_at", "item_id", "sequence_number")
        return {k: "*" if k in changing and v is not None else _without_names(v) for k, v in value.items()}
    return value


@pytest.mark.parametrize(("path", "body"), SAME, ids=[f"{path}-{i}" for i, (path, _) in enumerate(SAME)])
def test_the_answer_is_vllms_own(vllm: str, router: str, path: str, body: dict[str, Any]) -> None:
    status, expected = answer(vllm, path, body)
    got_status, got = answer(router, path, body)
    if body.get("stream") and path == MESSAGES:  # vLLM's first event has no figures of the cache
        assert got[0][1]["message"]["usage"].pop("cache_read_input_tokens") == 0
    assert (got_status, got) == (status, expected)


def per_choice(events: list[tuple[str, Any]]) -> tuple[dict[int, list[Any]], list[Any]]:
    """Returns each choice's text, reasons and tokens, and what is not of one choice."""
    choices: dict[int, list[Any]] = {}
    rest: list[Any] = []
    for _, event in events:
        own = event["choices"] if isinstance(event, dict) else []
        rest += [] if own else [event]
        for choice in own:
            told = choices.setdefault(choice["index"], ["", None, event["id"]])
            told[0] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            told[1] = choice["finish_reason"] or told[1]
    return choices, rest


@pytest.mark.parametrize(("path", "body"), INTERLEAVED)
def test_streams_of_many_choices_have_vllms_choices(vllm: str, router: str, path: str, body: dict[str, Any]) -> None:
    expected, got = answer(vllm, path, body)[1], answer(router, path, body)[1]
    assert per_choice(got) == per_choice(expected)


def test_what_vllm_rendered_is_what_was_routed(cluster: FakeRouting, vllm: str, router: str) -> None:
    seen = len(cluster.requests)
    tokens = httpx.post(vllm + CHAT, json=ASKED | {"return_token_ids": True}, timeout=60).json()["prompt_token_ids"]
    answer(router, CHAT, ASKED | {"cache_salt": "who"})
    (request,) = cluster.requests[seen:]
    assert request.prompt_token_ids == tokens
    assert (request.sampling.max_tokens, request.tenant) == (12, "who")


def test_the_models_are_vllms_with_our_name(vllm: str, router: str) -> None:
    (expected,), (got,) = (httpx.get(f"{url}/v1/models").json()["data"] for url in (vllm, router))
    own = {"owned_by": "dualpath", "cluster": None}
    assert _without_names(got | {"permission": []}) == _without_names(expected | {"permission": []} | own)
