"""What a body may be: JSON within bounds, and a 400 that says why for all else."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_cluster import FakeGenerator, running_server, says
from raw_http import answer, connect, exchange, post

from dualpath.server import ServerLimits
from dualpath.server.body import check_structure, check_values
from dualpath.server.errors import ApiError
from dualpath.server.protocol import ChatMessage, ChatRequest, FunctionTool, Tool

LIMITS = ServerLimits()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(FakeGenerator(says("ok"))) as url:
        yield url


def ask(url: str, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, str, Any]:
    response = httpx.post(f"{url}{path}", content=body, headers=headers, timeout=60)
    code = response.json()["error"]["code"] if response.status_code >= 400 else ""
    return response.status_code, code, response.json()


def nested(levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return opening * levels + closing * levels


@pytest.mark.parametrize("levels", [101, 900, 1000, 5000, 1_000_000])
@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "ignored": %b}',
        b'{"prompt": "a", "tools": %b}',
        b'{"prompt": %b}',
        b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": %b}}',
        b'{"messages": [{"role": "user", "content": "a", "ignored": %b}]}',
        b"%b",
    ],
)
def test_nesting_is_bounded_in_every_field(url: str, body: bytes, levels: int) -> None:
    path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
    for value in (nested(levels), nested(levels, b'{"a":', b"}"), b"[" * levels, b'[{"\\"[{": ' * levels):
        status, code, told = ask(url, body % value, path)
        assert (status, code) in {(400, "invalid_json"), (400, "invalid_value")}
        assert "nested more than 100 levels" in told["error"]["message"] or "262144" in told["error"]["message"]
    assert ask(url, b'{"prompt": "a"}')[0] == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_nesting_is_bounded_at_every_endpoint(url: str, path: str) -> None:
    assert ask(url, b'{"x": %b}' % nested(2000), path)[:2] == (400, "invalid_json")


def test_exactly_as_deep_as_allowed() -> None:
    check_structure(nested(LIMITS.max_nesting), LIMITS)
    check_structure(b'{"a": [%b, %b]}' % (nested(98), nested(98)), LIMITS)
    for too_deep in (nested(LIMITS.max_nesting + 1), b'{"a": [%b, %b]}' % (nested(98), nested(99))):
        with pytest.raises(ApiError, match="nested more than 100"):
            check_structure(too_deep, LIMITS)


def test_brackets_in_texts_are_text(url: str) -> None:
    """Prompts are often code."""
    for text in ("[{" * 5000, '"[' * 5000, '\\"[{' * 5000, "\\" * 4001 + '"' + "[" * 500, "\\" * 4000 + "[" * 500):
        record = {"prompt": text, "max_tokens": 1}
        check_structure(json.dumps(record).encode(), LIMITS)
        check_structure(json.dumps({text: [{text: record}]}).encode(), LIMITS)
    assert ask(url, json.dumps({"prompt": "[{" * 100, "max_tokens": 1}).encode())[0] == 200


@pytest.mark.parametrize(
    "value",
    [b'{"a":1},' * 2**18 + b"1", b"{" + b'"a":1,' * 2**18 + b'"a":1}', b'"",' * 2**21 + b'""', b"[]," * 2**18 + b"1"],
)
def test_what_a_body_holds_is_bounded(url: str, value: bytes) -> None:
    status, code, told = ask(url, b'{"prompt": "a", "ignored": [%b]}' % value)
    assert (status, code) == (400, "invalid_value")
    assert "more than 262144 objects, lists and names" in told["error"]["message"]


def test_entries_of_lists_are_bounded(url: str) -> None:
    messages = [ChatMessage("user", "")]
    tool = Tool("function", FunctionTool("f"))
    for fields, most in (
        ({"messages": messages * (LIMITS.max_messages + 1)}, LIMITS.max_messages),
        ({"messages": messages, "tools": [tool] * (LIMITS.max_tools + 1)}, LIMITS.max_tools),
        ({"messages": messages, "stop_token_ids": [1] * (2**20 + 1)}, 2**20),
    ):
        record = ChatRequest(**fields)  # type: ignore[arg-type]
        with pytest.raises(ApiError, match=f"{[*fields][-1]} has {most + 1} entries; a request may have {most}"):
            check_values(record, LIMITS)
    many = b'%b{"role": "user", "content": ""}' % (b'{"role": "user", "content": ""},' * LIMITS.max_messages)
    for field, path in (("messages", "/v1/chat/completions"), ("input", "/v1/responses")):
        status, code, told = ask(url, b'{"%b": [%b]}' % (field.encode(), many), path)
        assert (status, code, told["error"]["param"]) == (400, "invalid_value", field)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"null", 400, "invalid_value"),
        (b'"prompt"', 400, "invalid_value"),
        (b"[1]", 400, "invalid_value"),
        (b"\x00", 400, "invalid_json"),
        (b'\xef\xbb\xbf{"prompt": "a"}', 400, "invalid_json"),
        (b'{"prompt": "a"} x', 400, "invalid_json"),
        (b'{"prompt": "\x00"}', 400, "invalid_json"),
        (b'{"prompt": "\\u0000"}', 200, ""),
        (b'{"prompt": "\\ud800"}', 400, "invalid_json"),
        (b'{"prompt": "\\udc00\\ud800"}', 400, "invalid_json"),
        (b'{"prompt": "\xed\xa0\x80"}', 400, "invalid_json"),
        (b'{"prompt": "\xff"}', 400, "invalid_json"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "invalid_json"),
        (b'{"prompt": "a", "temperature": Infinity}', 400, "invalid_json"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "invalid_value"),
        (b'{"prompt": "a", "temperature": 1e-999}', 200, ""),
        (b'{"prompt": "a", "seed": %b}' % (b"9" * 100_000), 400, "invalid_value"),
        (b'{"prompt": "a", "max_tokens": %b}' % (b"9" * 4300), 400, "invalid_value"),
        (b'{"prompt": [%b]}' % (b"9" * 100_000), 400, "invalid_value"),
        (b'{"prompt": [%b]}' % (b"9" * 4299), 400, "invalid_value"),
        (b'{"prompt": "a", "ignored": %b}' % (b"9" * 100_000), 200, ""),
        (b'{"prompt": "a", "prompt": "b"}', 200, ""),
        (b'{"prompt": "a", "model": "%b"}' % (b"m" * 100_000), 404, "model_not_found"),
    ],
)
def test_json_at_its_edges(url: str, body: bytes, status: int, code: str) -> None:
    assert ask(url, body)[:2] == (status, code)


def test_no_message_is_as_long_as_what_the_client_sent(url: str) -> None:
    for body in (b'{"prompt": "a", "model": "%b"}' % (b"m" * 10**6), b'{"prompt": [%b]}' % (b"9" * 4299)):
        assert len(json.dumps(ask(url, body)[2])) < 2500


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("content-encoding", "gzip", 415),
        ("content-encoding", "identity", 200),
        ("content-type", "text/plain", 415),
        ("content-type", "multipart/form-data; boundary=x", 415),
        ("content-type", "application/x-www-form-urlencoded", 415),
        ("content-type", "Application/JSON; charset=utf-8", 200),
        ("content-type", "application/vnd.api+json", 200),
    ],
)
def test_only_plain_json_is_taken(url: str, header: str, value: str, status: int) -> None:
    """A browser's page can send the other types to any server without asking it."""
    found, code, _ = ask(url, b'{"prompt": "a"}', **{header: value})
    assert (found, code) == (status, "" if status == 200 else "unsupported_media_type")


def test_a_query_is_ignored(url: str) -> None:
    assert ask(url, b'{"prompt": "a"}', "/v1/completions?api-version=2024-06-01&max_tokens=%FF")[0] == 200


def test_large_bodies_wait_for_each_other_and_small_ones_for_none() -> None:
    """One that drips holds its part of the budget; the next is told after its deadline, a small one is served."""
    limits = ServerLimits(max_large_body_bytes=200_000, body_timeout_s=0.5)
    with running_server(FakeGenerator(says("ok")), limits=limits) as url:
        large = b'{"prompt": "a", "ignored": "%b"}' % (b"x" * 150_000)
        dripping: list[socket.socket] = [connect(url)]
        dripping[0].sendall(post("/v1/completions", large)[:1000])
        threading_wait(url)
        assert ask(url, b'{"prompt": "a"}')[0] == 200
        status, code, _ = ask(url, large)
        assert (status, code) in {(429, "overloaded"), (200, "")}  # by then the other may have been given up
        assert answer(exchange(url, post("/v1/completions", large)))[0] == 200
        dripping[0].close()


def threading_wait(url: str) -> None:
    """Returns when the server has taken what was sent before."""
    assert httpx.get(f"{url}/health").status_code == 200
