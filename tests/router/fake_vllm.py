"""A vLLM server for the router's tests: its endpoints' shapes over real HTTP, and every way to fail by script.

`test_real_vllm.py` holds the router to a real server; the shapes here are that server's. One token a byte.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

FINGERPRINT = "vllm-0.32.0-abcdef01"
CUT = "cut"
"""In a script: the connection breaks here."""
Script = list[bytes | str | threading.Event]
"""Parts of a body, events that are waited for, `CUT`."""


class Said:
    """One answer by script: a status, and its body's parts."""

    def __init__(self, status: int, *parts: bytes | str | threading.Event, kind: str = "application/json") -> None:
        self.status = status
        self.parts = parts
        self.kind = kind


class FakeVllm:
    """Answers `text` to everybody, or what `script(number, path, body)` says to the request of this number."""

    def __init__(self, text: str = "hey") -> None:
        self.text = text
        self.usage_cached = 999
        """What this server takes for cached: never what the client is to be told."""
        self.script: Callable[[int, str, dict[str, Any]], Said | None] = lambda number, path, body: None
        self.render: Callable[[str, dict[str, Any]], Said | None] = lambda path, body: None
        self.rendered: list[dict[str, Any]] = []
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        """What was to be generated: path, body, headers."""
        self.other: list[tuple[str, str, bytes, dict[str, str]]] = []
        self.gone = threading.Event()
        """Set when the router has closed a request before its end."""
        self.sent_bytes = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        said = self._answer(path, scope["method"], body, headers)
        await send(
            {"type": "http.response.start", "status": said.status, "headers": [(b"content-type", said.kind.encode())]}
        )
        left = asyncio.create_task(self._watch(receive))
        try:
            for part in said.parts:
                await self._send_part(part, left, send)
            await send({"type": "http.response.body", "body": b""})
        finally:
            left.cancel()

    async def _send_part(self, part: bytes | str | threading.Event, left: "asyncio.Task[None]", send: Any) -> None:
        await asyncio.sleep(0)
        if left.done():
            return
        if part == CUT:
            raise ConnectionAbortedError
        if isinstance(part, threading.Event):
            while not part.is_set() and not left.done():
                await asyncio.sleep(0.005)
            return
        data = part if isinstance(part, bytes) else part.encode()
        self.sent_bytes += len(data)
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone.set()

    def _answer(self, path: str, method: str, body: bytes, headers: dict[str, str]) -> Said:
        if path.endswith("/render"):
            asked = json.loads(body)
            self.rendered.append(asked)
            path = path.removesuffix("/render")
            return self.render(path, asked) or Said(200, json.dumps(rendered(path, asked)))
        if path in ANSWERS:
            asked = json.loads(body)
            number = len(self.asked)
            self.asked.append((path, asked, headers))
            return self.script(number, path, asked) or ANSWERS[path](self, asked, headers)
        self.other.append((method, path, body, headers))
        if path == "/v1/models":
            cards = [{"id": name, "object": "model", "owned_by": "vllm", "parent": None} for name in ("m", "m", "lora")]
            return Said(200, json.dumps({"object": "list", "data": cards}))
        return Said(200, json.dumps({"passed": path}))


def ids(text: str) -> list[int]:
    return list(text.encode())


def prompts_of(path: str, body: dict[str, Any]) -> list[list[int]]:
    if path == "/v1/completions":
        prompt = body["prompt"]
        many = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        return [ids(one) if isinstance(one, str) else one for one in many]
    return [ids(json.dumps(body.get("messages", body.get("input"))))]


def rendered(path: str, body: dict[str, Any], **more: Any) -> Any:
    limit = body.get("max_tokens") or body.get("max_output_tokens") or 100
    sampling = {"n": body.get("n") or 1, "temperature": body.get("temperature", 1.0)}
    sampling |= {} if limit == 16 else {"max_tokens": limit}  # vLLM leaves out its defaults
    sampling |= {} if body.get("seed") is None else {"seed": body["seed"]}
    sampling |= {} if body.get("prompt_logprobs") is None else {"prompt_logprobs": body["prompt_logprobs"]}
    found = [
        {
            "request_id": "r",
            "token_ids": prompt,
            "features": None,
            "sampling_params": sampling,
            "stream": bool(body.get("stream")),
            "stream_options": body.get("stream_options") if body.get("stream") else None,
            "cache_salt": body.get("cache_salt"),
            **more,
        }
        for prompt in prompts_of(path, body)
    ]
    return found if path == "/v1/completions" else found[0]


def sse(data: Any, event: str = "") -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


def usage(vllm: FakeVllm, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": vllm.usage_cached, "created_cache_tokens": 0},
        "completion_tokens_details": None,
    }


def _prompt_tokens(path: str, body: dict[str, Any]) -> int:
    given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
    return len(given or prompts_of(path, body)[0])


def chat_events(vllm: FakeVllm, body: dict[str, Any], headers: dict[str, str]) -> list[bytes]:
    common = {
        "id": f"chatcmpl-{headers['x-request-id']}",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
    }

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return sse({**common, "choices": [choice], **more})

    tokens, options = len(vllm.text), body.get("stream_options") or {}
    end = {} if options.get("include_usage") else {"system_fingerprint": FINGERPRINT}
    events = [chunk({"role": "assistant", "content": ""})]
    events += [chunk({"content": character}) for character in vllm.text[:-1]]
    events.append(chunk({"content": vllm.text[-1]}, "stop", **end))
    if options.get("include_usage"):
        counted = usage(vllm, _prompt_tokens("/v1/chat/completions", body), tokens)
        events.append(sse({**common, "choices": [], "usage": counted, "system_fingerprint": FINGERPRINT}))
    return [*events, sse("[DONE]")]


def _chat(vllm: FakeVllm, body: dict[str, Any], headers: dict[str, str]) -> Said:
    if body.get("stream"):
        return Said(200, *chat_events(vllm, body, headers), kind="text/event-stream; charset=utf-8")
    message = {"role": "assistant", "content": vllm.text, "tool_calls": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    whole = {"id": f"chatcmpl-{headers['x-request-id']}", "object": "chat.completion", "created": 1, "model": "m"}
    whole |= {"choices": [choice], "usage": usage(vllm, _prompt_tokens("/v1/chat/completions", body), len(vllm.text))}
    return Said(200, json.dumps(whole | {"kv_transfer_params": {"secret": 1}, "metrics": None}, ensure_ascii=False))


def _completions(vllm: FakeVllm, body: dict[str, Any], headers: dict[str, str]) -> Said:
    common = {"id": f"cmpl-{headers['x-request-id']}", "object": "text_completion", "created": 1, "model": "m"}
    counted = usage(vllm, _prompt_tokens("/v1/completions", body), len(vllm.text))
    text = f"{vllm.text}{body.get('seed', '')}"
    if not body.get("stream"):
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
        return Said(200, json.dumps({**common, "choices": [choice], "usage": counted, "metrics": {"x": 1}}))
    events = [
        sse({**common, "choices": [{"index": 0, "text": c, "finish_reason": "length" if i == len(text) - 1 else None}]})
        for i, c in enumerate(text)
    ]
    events.append(sse({**common, "choices": [], "usage": counted, "system_fingerprint": FINGERPRINT}))
    return Said(200, *events, sse("[DONE]"), kind="text/event-stream; charset=utf-8")


def _responses(vllm: FakeVllm, body: dict[str, Any], headers: dict[str, str]) -> Said:
    begun = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": "in_progress",
        "output": [],
        "usage": None,
    }
    details = {"cached_tokens": vllm.usage_cached, "input_tokens_per_turn": [], "cached_tokens_per_turn": []}
    counted = {"input_tokens": 20, "input_tokens_details": details, "output_tokens": len(vllm.text), "total_tokens": 23}
    counted |= {"output_tokens_details": {"reasoning_tokens": 1}}
    output = [{"type": "message", "content": [{"type": "output_text", "text": vllm.text}]}]
    whole = begun | {"status": "completed", "output": output, "usage": counted, "kv_transfer_params": {"secret": 1}}
    if not body.get("stream"):
        return Said(200, json.dumps(whole))
    deltas = [
        sse({"delta": c, "sequence_number": i + 1, "type": "response.output_text.delta"}, "response.output_text.delta")
        for i, c in enumerate(vllm.text)
    ]
    first = sse({"response": begun, "sequence_number": 0, "type": "response.created"}, "response.created")
    last = sse({"response": whole, "sequence_number": 9, "type": "response.completed"}, "response.completed")
    return Said(200, first, *deltas, last, kind="text/event-stream; charset=utf-8")


def _messages(vllm: FakeVllm, body: dict[str, Any], headers: dict[str, str]) -> Said:
    prompt = _prompt_tokens("/v1/messages", body)
    cached = min(vllm.usage_cached, prompt)
    counted = {"input_tokens": prompt - cached, "output_tokens": len(vllm.text), "cache_read_input_tokens": cached}
    whole = {"id": "chatcmpl-1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn"}
    if not body.get("stream"):
        return Said(200, json.dumps(whole | {"content": [{"type": "text", "text": vllm.text}], "usage": counted}))
    begun = whole | {"content": [], "stop_reason": None, "usage": {"input_tokens": prompt, "output_tokens": 0}}
    deltas = [
        sse(
            {"type": "content_block_delta", "delta": {"type": "text_delta", "text": c}, "index": 0},
            "content_block_delta",
        )
        for c in vllm.text
    ]
    return Said(
        200,
        sse({"type": "message_start", "message": begun}, "message_start"),
        *deltas,
        sse({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": counted}, "message_delta"),
        sse({"type": "message_stop"}, "message_stop"),
        kind="text/event-stream; charset=utf-8",
    )


ANSWERS = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completions,
    "/v1/responses": _responses,
    "/v1/messages": _messages,
}


@contextlib.contextmanager
def running(vllm: FakeVllm) -> Iterator[str]:
    """The server on a free port, in a thread; gives its address."""
    config = uvicorn.Config(vllm, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the fake vLLM did not stop"
