"""What becomes of a request when a vLLM server, the cluster, the client or the router itself ends midway."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_routing import ENDED, FakeRouting, running_router
from fake_vllm import CUT, FakeVllm, Said, chat_events, rendered, sse
from test_router_answers import CHAT, PATHS, PROMPT, events, post

from dualpath.cluster.generator import GeneratedTokens, RequestError
from dualpath.router import create_router, routing
from dualpath.server.limits import ServerLimits

STREAM = CHAT | {"stream": True}
SSE = "text/event-stream"
FIRST = sse({"id": "chatcmpl-x", "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]})
CHAT_PATH = "/v1/chat/completions"
SHORT_S = 0.6


def wait_for(condition: Callable[[], Any], what: str) -> None:
    give_up_s = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < give_up_s, f"{what} did not happen"
        time.sleep(0.01)


# ── before the first byte ───────────────────────────────────────────────────────────────────────────────────────────

GARBAGE = [
    Said(500, '{"error": {}}'),
    Said(503, "busy"),
    Said(401, '{"error": "Unauthorized"}'),
    Said(302, ""),
    Said(200, "<html>"),
    Said(200, "[1]"),
    Said(200, '{"usage": 3}'),
    Said(200, '{"choices": [], "usage": {"completion_tokens": "three"}}'),
    Said(200, '{"choi', CUT),
    Said(200, b"\xff\xfe"),
]


@pytest.mark.parametrize("said", GARBAGE)
def test_a_server_without_an_answer_is_reported_and_another_asked(vllm: FakeVllm, url: str, said: Said) -> None:
    vllm.script = lambda number, path, body: said if number == 0 else None
    cluster = FakeRouting([url], lambda n: [url, url, ENDED])
    cluster.cached_tokens = lambda number: 0
    with running_router(cluster) as router:
        answer = post(router, CHAT_PATH, CHAT)
    assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "hey")
    assert [owner for owner, _ in cluster.failed] == [(0, 0)]
    assert [got["kv_transfer_params"]["dualpath"]["owner"] for _, got, _ in vllm.asked] == [[0, 0], [0, 1]]
    assert cluster.answers == [(0, 1), (0, 1)]


BROKEN_STREAMS = [
    Said(200, kind=SSE),
    Said(200, CUT, kind=SSE),
    Said(200, "data: {oops}\n\n", kind=SSE),
    Said(200, sse({"error": {"message": "engine dead", "code": 500}}), kind=SSE),
    Said(200, ": keep-alive\n\n", CUT, kind=SSE),
]


@pytest.mark.parametrize("said", BROKEN_STREAMS)
def test_a_stream_without_a_first_event_goes_on_elsewhere(vllm: FakeVllm, url: str, said: Said) -> None:
    vllm.script = lambda number, path, body: said if number == 0 else None
    cluster = FakeRouting([url], lambda n: [url, url, ENDED])
    with running_router(cluster) as router:
        answer = post(router, CHAT_PATH, STREAM)
    assert "".join(e["choices"][0]["delta"]["content"] for e in events(answer)[:-1]) == "hey"
    assert len(cluster.failed) == 1


def test_a_server_that_refuses_connections_is_reported(vllm: FakeVllm, url: str, nowhere: str) -> None:
    cluster = FakeRouting([url], lambda n: [nowhere, url, ENDED])
    with running_router(cluster) as router:
        assert post(router, CHAT_PATH, CHAT).status_code == 200
    ((owner, why),) = cluster.failed
    assert owner == (0, 0)
    assert nowhere in why


def test_another_hand_off_ends_the_wait_for_the_first(vllm: FakeVllm, url: str) -> None:
    never, asked = threading.Event(), threading.Event()

    def script(number: int, path: str, body: dict[str, Any]) -> Said | None:
        asked.set()
        return Said(200, never) if number == 0 else None

    vllm.script = script
    cluster = FakeRouting([url], lambda n: [url, asked, url, ENDED])
    with running_router(cluster) as router:
        assert post(router, CHAT_PATH, CHAT).status_code == 200
        assert vllm.gone.wait(10)
    assert not cluster.failed
    assert cluster.answers[0] == (0, 1)


def test_an_answer_of_an_attempt_that_is_over_is_dropped(vllm: FakeVllm, url: str) -> None:
    refused = RequestError(503, "no_engine", "none is left", 1.0)
    asked = threading.Event()

    def script(number: int, path: str, body: dict[str, Any]) -> None:
        asked.set()

    vllm.script = script
    cluster = FakeRouting([url], lambda n: [url, asked, threading.Event(), refused])
    cluster.moved = True
    cluster.steps = lambda n: [url, asked, refused]
    with running_router(cluster) as router:
        answer = post(router, CHAT_PATH, CHAT)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("path", PATHS)
def test_the_clusters_refusals_come_in_the_shape_of_the_api(vllm: FakeVllm, url: str, path: str) -> None:
    cluster = FakeRouting([url], lambda n: [RequestError(429, "overloaded", "wait a little", 2.0)])
    with running_router(cluster) as router:
        answer = post(router, path, PATHS[path] | {"stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    error = answer.json()["error"]
    assert error["type" if path == "/v1/messages" else "code"] in ("rate_limit_error", "overloaded")


def test_a_servers_refusal_is_the_clients_to_read(vllm: FakeVllm, url: str) -> None:
    said = {"error": {"message": "no", "type": "BadRequestError", "param": "x", "code": 422}}
    vllm.script = lambda number, path, body: Said(422, json.dumps(said))
    cluster = FakeRouting([url])
    with running_router(cluster) as router:
        for body in (CHAT, STREAM):
            answer = post(router, CHAT_PATH, body)
            assert (answer.status_code, answer.json()) == (422, said)
        assert cluster.all_closed.wait(10)
    assert not cluster.failed


def test_rendering_goes_on_at_another_server_and_says_so_when_none_is_left(url: str, nowhere: str) -> None:
    cluster = FakeRouting([nowhere, url], lambda n: [url, ENDED])
    with running_router(cluster) as router:
        assert {post(router, CHAT_PATH, CHAT).status_code for _ in range(4)} == {200}
        cluster.servers = cluster.servers[:1]
        answer = post(router, CHAT_PATH, CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_engine")
        cluster.servers = []
        assert post(router, CHAT_PATH, CHAT).status_code == 503
        assert post(router, "/tokenize", {}).status_code == 503


@pytest.mark.parametrize("status", [403, 404])
def test_a_server_that_does_not_render_is_the_operators_affair(vllm: FakeVllm, url: str, status: int) -> None:
    vllm.render = lambda path, body: Said(status, '{"detail": "Not Found"}')
    with running_router(FakeRouting([url])) as router:
        answer = post(router, CHAT_PATH, CHAT)
    assert answer.status_code == 503
    assert "--enable-scale-out" in answer.json()["error"]["message"]


def test_prompts_that_make_no_sense_are_a_bad_gateway(vllm: FakeVllm, url: str) -> None:
    vllm.render = lambda path, body: Said(200, '{"token_ids": "many"}')
    with running_router(FakeRouting([url])) as router:
        assert post(router, CHAT_PATH, CHAT).status_code == 502


# ── after the first byte ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "rest", [(CUT,), (), ("data: {oops}\n\n",), (b"data: " + b"[" * 10,)], ids=["cut", "short", "garbage", "half"]
)
def test_a_stream_that_breaks_off_ends_with_an_error_event(vllm: FakeVllm, url: str, rest: Any) -> None:
    vllm.script = lambda number, path, body: Said(200, FIRST, *rest, kind=SSE)
    cluster = FakeRouting([url])
    with running_router(cluster) as router:
        first, error = events(post(router, CHAT_PATH, STREAM))
        text = httpx.get(f"{router}/metrics").text
        assert cluster.all_closed.wait(10)
    assert first["choices"][0]["delta"]["content"] == "a"
    assert error["error"]["code"] == "answer_broke_off"
    assert not cluster.failed
    assert 'error_code="answer_broke_off"' in text


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_error_events_have_the_shape_of_their_api(vllm: FakeVllm, url: str, path: str) -> None:
    first = {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}, "sequence_number": 0}
    if path == "/v1/messages":
        first = {"type": "message_start", "message": {"usage": {"input_tokens": 9}}}
    vllm.script = lambda number, path, body: Said(200, sse(first, first["type"]), CUT, kind=SSE)
    with running_router(FakeRouting([url])) as router:
        text = post(router, path, PATHS[path] | {"stream": True}).text
    _, *failed = [block.split("\n") for block in text.split("\n\n") if block]
    told = [(name, json.loads(data.removeprefix("data: "))) for name, data in failed]
    assert told[0][0] == "event: error"
    assert told[0][1]["type"] == "error"
    if path == "/v1/responses":
        ((name, last),) = told[1:]
        assert name == "event: response.failed"
        assert (last["response"]["status"], last["response"]["id"]) == ("failed", "resp_1")


@pytest.mark.parametrize(("code", "told"), [(400, 400), (500, "answer_broke_off")])
def test_an_error_that_the_server_streams(vllm: FakeVllm, url: str, code: int, told: object) -> None:
    """One about the request is passed as it is; after one about the server the client should try again."""
    error = {"error": {"message": "so it is", "type": "Error", "code": code}}
    vllm.script = lambda number, path, body: Said(200, FIRST, sse(error), sse("[DONE]"), kind=SSE)
    with running_router(FakeRouting([url])) as router:
        _, got, *_ = events(post(router, CHAT_PATH, STREAM))
    assert got["error"]["code"] == told and "so it is" in got["error"]["message"]


def test_an_answer_outlives_the_cluster_but_not_its_deadline(vllm: FakeVllm, url: str) -> None:
    lost, go = threading.Event(), threading.Event()
    lines = chat_events(vllm, {}, {"x-request-id": "a"})
    vllm.script = lambda number, path, body: Said(200, lines[0], go, *lines[1:], kind=SSE)
    failure = RequestError(503, "engine_lost", "its blocks may not be stored")
    cluster = FakeRouting([url], lambda n: [url, lost, failure])
    with running_router(cluster) as router, httpx.stream("POST", router + CHAT_PATH, json=STREAM, timeout=20) as answer:
        lines_read = answer.iter_lines()
        assert "assistant" in next(lines_read)
        lost.set()
        assert cluster.all_closed.wait(10)
        go.set()
        assert [line for line in lines_read if line][-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (RequestError(504, "deadline_exceeded", "too late"), "deadline_exceeded"),
        (GeneratedTokens(token_ids=[], finish_reason="abort"), "aborted"),
    ],
)
def test_a_request_that_is_late_or_aborted_ends(vllm: FakeVllm, url: str, last: Any, code: str) -> None:
    begun, never = threading.Event(), threading.Event()
    vllm.script = lambda number, path, body: Said(200, FIRST, never, kind=SSE)
    with (
        running_router(FakeRouting([url], lambda n: [url, begun, last])) as router,
        httpx.stream("POST", router + CHAT_PATH, json=STREAM, timeout=20) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        begun.set()
        error = json.loads([line for line in lines if line][-1].removeprefix("data: "))
    assert error["error"]["code"] == code
    assert vllm.gone.wait(10)


@pytest.mark.parametrize("parts", [(), (FIRST,)], ids=["before", "after"])
def test_every_wait_has_an_end(vllm: FakeVllm, url: str, parts: tuple[bytes, ...]) -> None:
    never = threading.Event()
    vllm.script = lambda number, path, body: Said(200, *parts, never, kind=SSE)
    cluster = FakeRouting([url], lambda n: [url, never])
    with running_router(cluster, deadline_s=SHORT_S) as router:
        answer = post(router, CHAT_PATH, STREAM)
        assert vllm.gone.wait(10)
        assert cluster.all_closed.wait(10)
    error = answer.json() if not parts else events(answer)[-1]
    assert error["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("where", ["render", "route", "passed"])
def test_no_server_and_no_cluster_is_waited_for_without_end(vllm: FakeVllm, url: str, where: str) -> None:
    never = threading.Event()
    if where == "render":
        vllm.render = lambda path, body: Said(200, never)
    if where == "passed":
        vllm.script = lambda number, path, body: Said(200, never)
    body = CHAT | ({"echo": True} if where == "passed" else {})
    cluster = FakeRouting([url], lambda n: [never])
    with running_router(cluster, deadline_s=SHORT_S) as router:
        try:
            answer = post(router, CHAT_PATH, body)
        except httpx.RemoteProtocolError:  # a whole answer that passes and is late is cut
            assert where == "passed"
        else:
            assert answer.status_code in (503, 504)
        assert cluster.all_closed.wait(10)


# ── the end of an answer ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_end_of_a_stream_is_held_until_the_next_turn_would_hit(url: str) -> None:
    durable = threading.Event()
    cluster = FakeRouting([url], lambda n: [url, durable, ENDED])
    with running_router(cluster) as router, httpx.stream("POST", router + CHAT_PATH, json=STREAM, timeout=20) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert ["[DONE]" in next(lines) for _ in range(4)] == [False] * 4
        wait_for(lambda: len(cluster.answers) == 2, "the last byte")
        assert not cluster.all_closed.is_set()
        durable.set()
        assert list(lines) == ["data: [DONE]"]


def test_a_whole_answer_is_held_until_the_next_turn_would_hit(url: str) -> None:
    durable, answered = threading.Event(), threading.Event()
    cluster = FakeRouting([url], lambda n: [url, durable, ENDED])
    with running_router(cluster) as router:
        asking = threading.Thread(target=lambda: (post(router, CHAT_PATH, CHAT), answered.set()))
        asking.start()
        wait_for(lambda: len(cluster.answers) == 2, "the last byte")
        assert not answered.wait(0.1)
        durable.set()
        assert answered.wait(10)
        asking.join()


def test_the_end_is_not_held_for_ever(vllm: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "DURABLE_S", 0.3)
    cluster = FakeRouting([url], lambda n: [url, threading.Event()])
    with running_router(cluster) as router:
        assert events(post(router, CHAT_PATH, STREAM))[-1] == "[DONE]"
        assert cluster.all_closed.wait(10)


# ── clients ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("phase", ["render", "route", "waiting", "streaming", "durable", "passed"])
def test_a_client_that_leaves_ends_the_work(vllm: FakeVllm, url: str, phase: str) -> None:
    never, reached = threading.Event(), threading.Event()

    def at(said: Said) -> Said:
        reached.set()
        return said

    steps: list[Any] = [url, never]
    if phase == "render":
        vllm.render = lambda path, body: at(Said(200, never))
    elif phase == "route":
        steps = [never]
    elif phase == "waiting":
        vllm.script = lambda number, path, body: at(Said(200, never))
    elif phase in ("streaming", "passed"):
        vllm.script = lambda number, path, body: at(Said(200, FIRST, never, kind=SSE))
    cluster = FakeRouting([url], lambda n: steps)
    with running_router(cluster) as router:
        with sent(router, STREAM | ({"echo": True} if phase == "passed" else {})):
            if phase == "route":
                wait_for(lambda: cluster.open, "the route")
            elif phase == "durable":
                wait_for(lambda: len(cluster.answers) == 2, "the last byte")
            else:
                assert reached.wait(10)
        assert cluster.all_closed.wait(10)
        if phase not in ("route", "durable"):
            assert vllm.gone.wait(10)


def sent(url: str, body: dict[str, Any]) -> socket.socket:
    """Returns the connection on which a chat has been asked for."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    data = json.dumps(body).encode()
    connection.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT_PATH.encode(), len(data)))
    connection.sendall(data)
    return connection


def test_a_client_that_does_not_read_holds_the_server_back_and_is_given_up(vllm: FakeVllm, url: str) -> None:
    many = sse({"choices": [{"index": 0, "delta": {"content": "x" * 100_000}, "finish_reason": None}]})
    vllm.script = lambda number, path, body: Said(200, *[many] * 2000, kind=SSE)
    cluster = FakeRouting([url])
    with running_router(cluster, limits=ServerLimits(write_timeout_s=1.0)) as router, sent(router, STREAM):
        assert vllm.gone.wait(20)
        assert cluster.all_closed.wait(10)
    assert vllm.sent_bytes < 60_000_000  # what the sockets between hold


def test_a_huge_body_and_a_huge_answer_pass(vllm: FakeVllm, url: str) -> None:
    vllm.text = "ü" * 3_000_000
    vllm.render = lambda path, body: Said(200, json.dumps(rendered(path, CHAT)))
    body = CHAT | {"messages": [{"role": "user", "content": "é" * 4_000_000}]}
    with running_router(FakeRouting([url])) as router:
        answer = post(router, CHAT_PATH, body).json()
        assert answer["choices"][0]["message"]["content"] == vllm.text
        assert vllm.asked[0][1]["messages"] == body["messages"]
        too_large = CHAT | {"messages": [{"role": "user", "content": "e" * 33 * 2**20}]}
        assert post(router, CHAT_PATH, too_large).status_code == 413


# ── the router ends ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_router_that_stops_ends_its_streams_with_an_error_event(vllm: FakeVllm, url: str) -> None:
    never = threading.Event()
    vllm.script = lambda number, path, body: Said(200, FIRST, never, kind=SSE)
    cluster = FakeRouting([url])
    rest: list[str] = []

    def read(lines: Any) -> None:
        rest.extend(line for line in lines if line)

    with httpx.Client(timeout=20) as client:
        with running_router(cluster, drain_s=0.2) as router:
            answer = client.send(client.build_request("POST", router + CHAT_PATH, json=STREAM), stream=True)
            lines = answer.iter_lines()
            next(lines)
            reading = threading.Thread(target=read, args=(lines,))
            reading.start()
        reading.join(20)
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert cluster.all_closed.wait(10)
    assert vllm.gone.wait(10)


def test_a_router_without_room_says_so(url: str) -> None:
    never = threading.Event()
    cluster = FakeRouting([url], lambda n: [never])
    limits = ServerLimits(max_inflight_requests=1)
    with running_router(cluster, limits=limits) as router, sent(router, STREAM):
        wait_for(lambda: cluster.open, "the route")
        answer = post(router, CHAT_PATH, CHAT)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        never.set()


def test_probes_and_the_access_log(url: str) -> None:
    seen: list[Any] = []
    cluster = FakeRouting([url])
    with running_router(cluster, observers=(lambda scope, record: seen.append(record),)) as router:
        answer = post(router, CHAT_PATH, STREAM, headers={"x-request-id": "mine"})
        assert answer.headers["x-request-id"] == "mine"
        assert httpx.get(f"{router}/health").json()["status"] == "ok"
        cluster.status = "unavailable"
        assert httpx.get(f"{router}/ready").status_code == 503
        assert httpx.get(f"{router}/livez").status_code == 200
        text = httpx.get(f"{router}/metrics").text
    usage = seen[0].usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (len(PROMPT), 64, 3)
    assert usage.timings is not None
    assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 1.0' in text
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 1.0' in text


def test_what_can_not_be_had_is_refused_at_the_start(url: str) -> None:
    for options in ({"enable_control": True}, {"api_keys": [""]}):
        with pytest.raises(ValueError, match=r"control|keys"):
            create_router(FakeRouting([url]), **options)
