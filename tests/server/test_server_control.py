"""Trainers' endpoints: who may use them, and what they ask of the cluster."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fake_cluster import FakeGenerator, running_server, says
from starlette.requests import Request
from starlette.responses import Response

from dualpath.cluster.generator import RequestError
from dualpath.server.endpoints.control import _ELSEWHERE, _Control
from dualpath.server.errors import ApiError

BOTH = ("weights", "kv_cache")
CALLS: list[tuple[str, dict[str, Any] | None, tuple[Any, ...]]] = [
    ("/pause", None, ("pause", "abort")),
    ("/pause?mode=keep&clear_cache=false", None, ("pause", "keep")),
    ("/pause?wait_for_inflight_requests=true", None, ("pause", "wait")),
    ("/resume", None, ("resume",)),
    ("/pause", {"mode": "keep"}, ("pause", "keep")),
    ("/pause", {"wait_for_inflight_requests": True}, ("pause", "wait")),
    ("/abort_requests", {}, ("abort", None)),
    ("/abort_requests", {"request_ids": []}, ("abort", [])),
    ("/abort_requests", {"request_ids": ["a", "b"]}, ("abort", ["a", "b"])),
    ("/update_weights", {"weight_dir": "/w/step_5"}, ("update_weights", "/w/step_5", "step_5", "wait")),
    (
        "/update_weights",
        {"model_path": "/w", "weight_version": "7", "mode": "keep"},
        ("update_weights", "/w", "7", "keep"),
    ),
    ("/update_weights", {"update_info": {"model_path": "/w/2"}}, ("update_weights", "/w/2", "2", "wait")),
    ("/reset_prefix_cache", {"reset_running_requests": False}, ("reset_prefix_cache",)),
    ("/sleep", None, ("sleep", BOTH, True, "abort")),
    ("/sleep?level=2&tags=kv_cache&mode=wait", None, ("sleep", ("kv_cache",), False, "wait")),
    ("/wake_up", None, ("wake", BOTH)),
    ("/wake_up?tags=weights", None, ("wake", ("weights",))),
    ("/pause_generation", {}, ("pause", "abort")),
    ("/pause_generation", {"mode": "retract"}, ("pause", "keep")),
    ("/continue_generation", {}, ("resume",)),
    ("/abort_request", {"abort_all": True, "rid": ""}, ("abort", None)),
    ("/abort_request", {"rid": "x"}, ("abort", ["x"])),
    ("/flush_cache", None, ("reset_prefix_cache",)),
    (
        "/update_weights_from_disk",
        {"model_path": "/w/3/", "flush_cache": True, "abort_all_requests": True, "load_format": None},
        ("update_weights", "/w/3/", "3", "abort"),
    ),
    ("/release_memory_occupation", {"tags": None}, ("sleep", BOTH, True, "wait")),
    ("/resume_memory_occupation", {"tags": ["weights"]}, ("wake", ("weights",))),
]


@pytest.mark.parametrize(("path", "body", "call"), CALLS, ids=[f"{path} {body or ''}" for path, body, _ in CALLS])
def test_what_is_asked_of_the_cluster(path: str, body: dict[str, Any] | None, call: tuple[Any, ...]) -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster, enable_control=True) as url:
        answer = httpx.post(url + path, json=body)
        assert answer.status_code == 200, answer.text
    assert cluster.control.calls == [call]


def test_closed_unless_opened() -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url:
        for path in {call[0].partition("?")[0] for call in CALLS}:
            answer = httpx.post(url + path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "control_closed")
        assert httpx.get(f"{url}/flush_cache").status_code == 403
        assert httpx.get(f"{url}/is_paused").json() == {"is_paused": False}
    assert cluster.control.calls == []


def test_with_keys_a_key_is_needed() -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster, enable_control=True, api_keys=["secret"]) as url:
        assert httpx.post(f"{url}/pause").status_code == 401
        assert httpx.post(f"{url}/pause", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert cluster.control.calls == [("pause", "abort")]


@pytest.mark.parametrize(
    ("client", "allowed"),
    [
        (("127.0.0.1", 5), True),
        (("::1", 5), True),
        (("::ffff:127.0.0.1", 5), True),
        (("10.1.2.3", 5), False),
        (("testclient", 5), False),
        (None, False),
    ],
)
def test_without_keys_only_this_host(client: tuple[str, int] | None, allowed: bool) -> None:
    async def endpoint(_: Request) -> Response:
        return Response()

    asked = Request({"type": "http", "client": client, "headers": [(b"host", b"localhost")]})
    guarded = _Control(SimpleNamespace(who_controls="this host")).guarded(endpoint)  # type: ignore[arg-type]
    with nullcontext() if allowed else pytest.raises(ApiError, match="only programs of this host"):
        asyncio.run(guarded(asked))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "elsewhere.example"},
        {"Host": "elsewhere.example:8000"},
    ],
)
def test_without_keys_no_web_page_of_this_host_controls(headers: dict[str, str]) -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster, enable_control=True) as url:
        for ask in (
            lambda: httpx.post(f"{url}/pause", headers=headers),
            lambda: httpx.get(f"{url}/flush_cache", headers=headers),
        ):
            assert ask().json()["error"]["code"] == "control_closed"
        for name in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
            assert httpx.post(f"{url}/pause", headers={"Host": name}).status_code == 200
    assert cluster.control.calls == [("pause", "abort")] * 3


def test_a_misspelt_field_aborts_nothing() -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster, enable_control=True) as url:
        assert httpx.post(f"{url}/abort_requests", json={"request_id": "x"}).status_code == 400
    assert cluster.control.calls == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/pause?mode=never", None, "mode"),
        ("/sleep?level=3", None, "level"),
        ("/wake_up?tags=all", None, "tags"),
        ("/update_weights", {}, "model_path"),
        ("/update_weights", {"model_path": "/w", "weight_version": 'a"b'}, "weight_version"),
        ("/update_weights", {"model_path": "/w", "load_format": "gguf"}, "load_format"),
        ("/abort_request", {}, "rid"),
        ("/pause", {"mode": "never"}, "mode"),
        ("/pause?wait_for_inflight_requests=banana", None, "wait_for_inflight_requests"),
        ("/release_memory_occupation", {"tags": ["all"]}, "tags"),
    ],
)
def test_what_is_wrong_is_named(path: str, body: dict[str, Any] | None, param: str) -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster, enable_control=True) as url:
        answer = httpx.post(url + path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert cluster.control.calls == []


def test_endpoints_that_need_a_network_of_the_trainers_say_what_to_do() -> None:
    with running_server(FakeGenerator(says("ok")), enable_control=True) as url:
        for path in _ELSEWHERE:
            answer = httpx.post(url + path, json={})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_endpoint")
            assert "/update_weights" in answer.json()["error"]["message"]


def test_a_refused_update_is_told_in_each_ones_shape() -> None:
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster, enable_control=True) as url:
        cluster.control.failure = RequestError(400, "weights_refused", "it is another model")
        answer = httpx.post(f"{url}/update_weights", json={"model_path": "/w"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "weights_refused")
        cluster.control.failure = RequestError(400, "weights_refused", "it is another model")
        answer = httpx.post(f"{url}/update_weights_from_disk", json={"model_path": "/w"})
        assert (answer.status_code, answer.json()["success"]) == (400, False)
        assert answer.json()["message"] == "it is another model"


def test_what_is_open_to_all() -> None:
    cluster = FakeGenerator(says("ok"))
    cluster.control.requests = 4
    with running_server(cluster) as url:

        def get(path: str) -> Any:
            return httpx.get(url + path).json()

        assert get("/is_sleeping") == {"is_sleeping": False}
        assert get("/weight_info") == get("/get_weight_version") == {"weight_version": "default"}
        assert get("/get_model_info")["model_path"] == get("/server_info")["model_path"] == "/models/tiny"
        assert get("/v1/loads?include=core")["loads"] == [{"num_reqs": 4}]
        assert get("/v1/models")["data"][0]["weight_version"] == "default"
        assert httpx.get(f"{url}/health_generate").status_code == 200
        assert cluster.requests[-1].sampling.max_tokens == 1
        cluster.script = lambda _request: [RequestError(503, "no_engine", "none is left")]
        assert httpx.get(f"{url}/health_generate").status_code == 503
