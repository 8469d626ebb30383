"""What a cluster on vLLM answers equals what one plain vLLM server answers, token for token, whoever reads the prefix.

The cluster's system takes the three paths in turn. `cached_tokens` is what storage gave.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from vllm_models import Pair
from vllm_servers import NAME, figures

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
BLOCK_TOKENS = 64
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look something up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{url}{path}", json={"model": NAME} | body, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def complete(url: str, prompt: list[int], tokens: int, **more: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return post(url, "/v1/completions", body | more)


def ids(answer: Any) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


def cached(answer: Any) -> int:
    found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def streamed(url: str, body: dict[str, Any]) -> list[Any]:
    """The deltas of a chat stream, merged: content, reasoning, tool calls, finish reason; and the usage."""
    text, calls, reasons, usage = "", "", [], None
    asked = {"model": NAME, "stream": True, "stream_options": {"include_usage": True}} | body
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=300, trust_env=False) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    for event in map(json.loads, lines):
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls") or []:
                calls += (call["function"].get("name") or "") + (call["function"].get("arguments") or "")
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return [text, calls, reasons, usage]


def test_turns_of_agents(pair: Pair) -> None:
    """Four agents, four turns each, unaligned, some longer than a chunk: each turn hits all of the one before."""
    read_before = figures(pair.url, "dualpath_nic_bytes_total")
    for first in (150, 700, 1500, 64):
        prompt, stored = pair.prompt(first), 0
        for turn in range(4):
            expected, got = (complete(url, prompt, 70) for url in (pair.plain, pair.url))
            assert ids(got) == ids(expected), (first, turn)
            assert cached(got) == min(stored, (len(prompt) - 1) // BLOCK_TOKENS) * BLOCK_TOKENS, (first, turn)
            prompt = prompt + ids(got)[0]
            stored = (len(prompt) - 1) // BLOCK_TOKENS  # the last token has no KV yet
            prompt += pair.prompt(37 + turn)
    read = {
        role: sum(
            figure - read_before.get(labels, 0)
            for labels, figure in figures(pair.url, "dualpath_nic_bytes_total").items()
            if f'role="{role}"' in labels and 'nic="snic"' in labels and 'direction="rx"' in labels
        )
        for role in ("prefill", "decode")
    }
    assert min(read.values()) > 0, "both sides have read"


def test_eight_at_once(pair: Pair) -> None:
    first = [pair.prompt(200 + 61 * n) for n in range(8)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda prompt: complete(pair.url, prompt, 40), first))
        prompts = [prompt + ids(answer)[0] + pair.prompt(33) for prompt, answer in zip(first, answers, strict=True)]
        again = list(threads.map(lambda prompt: complete(pair.url, prompt, 40), prompts))
    for prompt, answer in zip(first + prompts, answers + again, strict=True):
        assert ids(answer) == ids(complete(pair.plain, prompt, 40))
    assert all(cached(answer) >= 192 for answer in again)


def test_several_choices(pair: Pair) -> None:
    prompt = pair.prompt(300)
    more = {"n": 3, "temperature": 0.8, "top_k": 1}  # vLLM refuses several of greedy sampling; seeds end it on a CPU
    expected, got = (complete(url, prompt, 20, **more) for url in (pair.plain, pair.url))
    assert ids(got) == ids(expected)
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2]
    assert got["usage"]["completion_tokens"] == 60
    assert got["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_a_stop_string(pair: Pair) -> None:
    """vLLM's front end finds it, and aborts the request in its engine: no failure, and what is whole is stored."""
    prompt = pair.prompt(200)
    text = complete(pair.plain, prompt, 60)["choices"][0]["text"]
    stop = text[30:32]
    for more in ({}, {"stream": False, "include_stop_str_in_output": True}):
        expected, got = (complete(url, prompt, 60, stop=stop, **more)["choices"][0] for url in (pair.plain, pair.url))
        assert (got["text"], got["finish_reason"], got["stop_reason"]) == (expected["text"], "stop", stop)
    assert cached(complete(pair.url, prompt, 1)) == 192


def test_logprobs(pair: Pair) -> None:
    prompt = pair.prompt(333)
    expected, got = (complete(url, prompt, 20, logprobs=3) for url in (pair.plain, pair.url))
    assert ids(got) == ids(expected)
    for mine, other in zip(
        got["choices"][0]["logprobs"]["token_logprobs"],
        expected["choices"][0]["logprobs"]["token_logprobs"],
        strict=True,
    ):
        assert mine == pytest.approx(other, abs=1e-3)


def test_chat_with_tools_and_structure(pair: Pair) -> None:
    messages = [{"role": "user", "content": "Look up what a cache is, and tell me. " * 12}]
    schema = {
        "type": "object",
        "properties": {"word": {"enum": ["cache", "disk"]}, "sure": {"type": "boolean"}},
        "required": ["word", "sure"],
        "additionalProperties": False,
    }
    plain = {"messages": messages, "max_tokens": 24, "temperature": 0}
    for more in (
        {},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}, "max_tokens": 60},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}}, "max_tokens": 60},
    ):
        expected, got = (post(url, "/v1/chat/completions", plain | more) for url in (pair.plain, pair.url))
        for answer in (expected, got):
            for call in answer["choices"][0]["message"].get("tool_calls") or []:
                call.pop("id")
        assert got["choices"] == expected["choices"]
        *merged, usage = streamed(pair.url, plain | more)
        *merged_plain, _ = streamed(pair.plain, plain | more)
        assert merged == merged_plain
        assert usage["prompt_tokens_details"]["cached_tokens"] == (got["usage"]["prompt_tokens"] - 1) // 64 * 64


def test_nothing_is_held_at_the_end(pair: Pair) -> None:
    held = figures(pair.url, "dualpath_buffer_held_blocks")
    assert held and set(held.values()) == {0.0}
    assert httpx.get(f"{pair.url}/health", trust_env=False).json()["status"] == "ok"
