"""What clients get through the router: vLLM's answers, with the cluster's `cached_tokens`."""

import json
from typing import Any

import httpx
import pytest
from fake_routing import ENDED, TIMINGS, FakeRouting, running_router
from fake_vllm import FINGERPRINT, FakeVllm, Said, ids, rendered

from dualpath.client.completion import _EVENT
from dualpath.spec.timings import Timings

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi ✓"}], "max_tokens": 5}
PROMPT = ids(json.dumps(CHAT["messages"]))
PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "m", "prompt": "hello", "max_tokens": 5},
    "/v1/responses": {"model": "m", "input": "hello", "max_output_tokens": 5},
    "/v1/messages": CHAT,
}


def post(url: str, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=30, trust_env=False, **options)


def events(response: httpx.Response) -> list[Any]:
    blocks = [block.rpartition("data: ")[2] for block in response.text.split("\n\n") if block]
    return [block if block == "[DONE]" else json.loads(block) for block in blocks]


def test_a_chat_is_handed_off_with_its_own_fields(vllm: FakeVllm, url: str) -> None:
    cluster = FakeRouting([url])
    cluster.dp_rank = 3
    evil = {"dualpath": {"owner": [9, 9], "prompt_tokens": 1}}
    body = CHAT | {"kv_transfer_params": evil, "ec_transfer_params": evil, "cache_salt": "who", "top_k": 7}
    body["vllm_xargs"] = {"kv_transfer_params": "x", "mine": 1.5}
    with running_router(cluster) as router:
        answer = post(
            router, "/v1/chat/completions", body, headers={"x-request-id": "abc", "x-data-parallel-rank": "9"}
        )
    assert answer.status_code == 200
    ((path, got, headers),) = vllm.asked
    assert path == "/v1/chat/completions"
    params = got.pop("kv_transfer_params")
    assert params == {"dualpath": {"owner": [0, 0], "prompt_tokens": len(PROMPT)}, "prompt_token_ids": PROMPT}
    assert got == {**CHAT, "cache_salt": "who", "top_k": 7, "vllm_xargs": {"mine": 1.5}}
    assert (headers["x-request-id"], headers["x-data-parallel-rank"]) == ("abc", "3")
    (request,) = cluster.requests
    assert (request.prompt_token_ids, request.tenant, request.sampling.max_tokens) == (PROMPT, "who", 5)
    assert "kv_transfer_params" not in vllm.rendered[0]
    whole = answer.json()
    assert whole["id"] == "chatcmpl-abc"
    assert whole["kv_transfer_params"] is None
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 64, "created_cache_tokens": 0}


def test_what_vllm_leaves_out_when_it_renders_has_its_default(vllm: FakeVllm, url: str) -> None:
    cluster = FakeRouting([url])
    with running_router(cluster) as router:
        assert post(router, "/v1/chat/completions", CHAT | {"max_tokens": 16}).status_code == 200
    assert "max_tokens" not in rendered("/v1/chat/completions", CHAT | {"max_tokens": 16})["sampling_params"]
    assert [request.sampling.max_tokens for request in cluster.requests] == [16]


def test_a_completion_is_handed_off_as_token_ids(vllm: FakeVllm, url: str) -> None:
    with running_router(FakeRouting([url])) as router:
        post(router, "/v1/completions", {"model": "m", "prompt": "hello", "suffix": "end", "max_tokens": 5})
    ((_, got, _),) = vllm.asked
    owner = {"owner": [0, 0], "prompt_tokens": 5}
    assert got == {"model": "m", "prompt": ids("hello"), "max_tokens": 5, "kv_transfer_params": {"dualpath": owner}}


def test_the_servers_key_is_sent_and_the_clients_is_not(
    vllm: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    with running_router(FakeRouting([url]), api_keys=["ours"]) as router:
        assert post(router, "/v1/chat/completions", CHAT).status_code == 401
        headers = {"x-api-key": "ours", "cookie": "secret=1"}
        assert post(router, "/v1/chat/completions", CHAT, headers=headers).status_code == 200
    ((_, _, got),) = vllm.asked
    assert got["authorization"] == "Bearer theirs"
    assert "x-api-key" not in got
    assert "cookie" not in got


@pytest.mark.parametrize("cached", [0, 128])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_cached_tokens_are_the_clusters(vllm: FakeVllm, url: str, path: str, stream: bool, cached: int) -> None:
    cluster = FakeRouting([url])
    cluster.cached_tokens = lambda number: cached
    body = PATHS[path] | {"stream": stream, "stream_options": {"include_usage": True}}
    with running_router(cluster) as router:
        answer = post(router, path, body)
        text = httpx.get(f"{router}/metrics").text
    last = answer.json() if not stream else [e for e in events(answer) if isinstance(e, dict) and "usage" in str(e)][-1]
    usage = last.get("response", last)["usage"]
    if path == "/v1/messages":
        prompt = len(PROMPT)
        assert (usage["cache_read_input_tokens"], usage["input_tokens"]) == (cached, max(0, prompt - cached))
    else:
        kind = "input" if path == "/v1/responses" else "prompt"
        assert usage[f"{kind}_tokens_details"]["cached_tokens"] == cached
    assert f'dualpath_request_tokens_total{{kind="cached"}} {cached}.0' in text
    assert 'dualpath_request_tokens_total{kind="completion"} 3.0' in text
    assert 'vllm:generation_tokens_total{engine="0",model_name="m"} 3.0' in text


def test_a_stream_without_usage_is_vllms_own(vllm: FakeVllm, url: str) -> None:
    with running_router(FakeRouting([url])) as router:
        body, headers = CHAT | {"stream": True, "stream_options": None}, {"x-request-id": "a"}
        direct, routed = (post(one, "/v1/chat/completions", body, headers=headers) for one in (url, router))
    assert events(routed) == events(direct)
    assert events(routed)[-2]["system_fingerprint"] == FINGERPRINT


def test_usage_of_every_chunk_has_cached_tokens(vllm: FakeVllm, url: str) -> None:
    with_usage = {"choices": [{"index": 0, "delta": {"content": "x"}}], "usage": {"prompt_tokens": 3}}
    vllm.script = lambda n, path, body: Said(
        200, f"data: {json.dumps(with_usage)}\n\ndata: [DONE]\n\n", kind="text/event-stream"
    )
    with running_router(FakeRouting([url])) as router:
        first, _ = events(post(router, "/v1/chat/completions", CHAT | {"stream": True}))
    assert first["usage"] == {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 64}}


def test_what_a_server_found_in_later_turns_of_a_response_stays(vllm: FakeVllm, url: str) -> None:
    details = {"cached_tokens": 30, "cached_tokens_per_turn": [10, 20]}
    vllm.script = lambda n, path, body: Said(
        200, json.dumps({"status": "incomplete", "usage": {"input_tokens_details": details, "output_tokens": 4}})
    )
    with running_router(FakeRouting([url])) as router:
        answer = post(router, "/v1/responses", PATHS["/v1/responses"]).json()
    assert answer["usage"]["input_tokens_details"] == {"cached_tokens": 84, "cached_tokens_per_turn": [64, 20]}


@pytest.mark.parametrize("stream", [False, True])
def test_timings_for_who_asks(vllm: FakeVllm, url: str, stream: bool) -> None:
    body = {"model": "m", "prompt": [1, 2], "max_tokens": 5, "stream": stream, "return_timings": True}
    with running_router(FakeRouting([url])) as router:
        answer = post(router, "/v1/completions", body)
    last = answer.text if not stream else answer.text.split("\n\n")[-3].removeprefix("data: ")
    timings = _EVENT.decode(last).timings
    assert json.loads(bytes(timings)) == json.loads(
        json.dumps({f: getattr(TIMINGS, f) for f in Timings.__struct_fields__})
    )
    ((_, got, _),) = vllm.asked
    assert "return_timings" not in got


# ── several choices ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_choices_of_many_prompts_are_merged_in_order(vllm: FakeVllm, url: str) -> None:
    cluster = FakeRouting([url])
    cluster.cached_tokens = lambda number: 10 * number
    body = {"model": "m", "prompt": ["a", "bcd"], "n": 2, "seed": 5, "max_tokens": 9}
    with running_router(cluster) as router:
        whole = post(router, "/v1/completions", body, headers={"x-request-id": "abc"}).json()
    assert whole["id"] == "cmpl-abc"
    assert [(c["index"], c["text"]) for c in whole["choices"]] == [(0, "hey5"), (1, "hey6"), (2, "hey5"), (3, "hey6")]
    usage = {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
    assert whole["usage"].items() >= usage.items()
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 10 + 30  # the most of each prompt
    assert whole["metrics"] is None
    assert [request.prompt_token_ids for request in cluster.requests] == [ids("a")] * 2 + [ids("bcd")] * 2
    assert {got["n"] for _, got, _ in vllm.asked} == {1}
    assert len({headers["x-request-id"] for _, _, headers in vllm.asked}) == 4


@pytest.mark.parametrize("asks_usage", [False, True])
def test_streams_of_many_choices_are_interleaved(vllm: FakeVllm, url: str, asks_usage: bool) -> None:
    body = CHAT | {"n": 3, "stream": True} | ({"stream_options": {"include_usage": True}} if asks_usage else {})
    with running_router(FakeRouting([url])) as router:
        got = events(post(router, "/v1/chat/completions", body, headers={"x-request-id": "abc"}))
    assert got.pop() == "[DONE]"
    assert {event["id"] for event in got} == {"chatcmpl-abc"}
    if asks_usage:
        usage = got.pop()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), 9)
    texts = {0: "", 1: "", 2: ""}
    for event in got:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"]["content"]
        assert ("system_fingerprint" in event) is (choice["finish_reason"] is not None and not asks_usage)
    assert texts == dict.fromkeys(range(3), "hey")


def test_too_many_choices_are_refused(vllm: FakeVllm, url: str) -> None:
    with running_router(FakeRouting([url])) as router:
        answer = post(router, "/v1/chat/completions", CHAT | {"n": 129})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    assert not vllm.asked


def test_one_choice_that_fails_ends_the_others(vllm: FakeVllm, url: str) -> None:
    cluster = FakeRouting([url], lambda n: [url, ENDED] if n else [ValueError("a bug")])
    with running_router(cluster) as router:
        answer = post(router, "/v1/chat/completions", CHAT | {"n": 3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert cluster.all_closed.wait(10)


# ── what is not routed ──────────────────────────────────────────────────────────────────────────────────────────────

DIRECT: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT | {"use_beam_search": True}),
    ("/v1/chat/completions", CHAT | {"echo": True}),
    ("/v1/chat/completions", CHAT | {"return_prompt_text": True}),
    ("/v1/chat/completions", CHAT | {"prompt_logprobs": 0}),
    ("/v1/chat/completions", CHAT | {"model": "lora"}),
    ("/v1/completions", {"model": "m", "prompt": "hello", "echo": True}),
    ("/v1/completions", {"model": "m", "prompt": "hello", "prompt_embeds": "abc"}),
]


@pytest.mark.parametrize(("path", "body"), DIRECT)
def test_what_needs_the_whole_prompt_goes_straight_to_a_decode_server(
    vllm: FakeVllm, url: str, path: str, body: dict[str, Any]
) -> None:
    cluster = FakeRouting([url])
    with running_router(cluster) as router:
        answer = post(router, path, body | {"kv_transfer_params": {"dualpath": {}}, "return_timings": True})
    assert answer.status_code == 200
    assert not cluster.requests
    ((_, got, _),) = vllm.asked
    assert got == body


def test_media_go_straight_to_a_decode_server(vllm: FakeVllm, url: str) -> None:
    vllm.render = lambda path, body: Said(200, json.dumps(rendered(path, body, features={"mm_hashes": {}})))
    cluster = FakeRouting([url])
    with running_router(cluster) as router:
        assert post(router, "/v1/chat/completions", CHAT | {"stream": True}).text.endswith("data: [DONE]\n\n")
    assert not cluster.requests
    assert vllm.rendered[0]["mm_payload"] == "none"


def test_endpoints_of_one_server_pass_or_are_refused_by_name(vllm: FakeVllm, url: str) -> None:
    with running_router(FakeRouting([url])) as router:
        assert post(router, "/tokenize", {"prompt": "a", "kv_transfer_params": {}}).json() == {"passed": "/tokenize"}
        assert json.loads(vllm.other[-1][2]) == {"prompt": "a"}
        audio = {"content-type": "multipart/form-data; boundary=x"}
        httpx.post(f"{router}/v1/audio/transcriptions?a=1", content=b"\0wave", headers=audio)
        assert vllm.other[-1][2] == b"\0wave"
        assert vllm.other[-1][3]["content-type"] == audio["content-type"]
        for path in ("/sleep", "/v1/load_lora_adapter", "/inference/v1/generate", "/v1/completions/render"):
            refusal = post(router, path, {})
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (403, "unsupported_endpoint")
            assert path in refusal.json()["error"]["message"]
        assert httpx.get(f"{router}/v1/responses/resp_1").status_code == 403
        assert post(router, "/a/new/endpoint", {}).status_code == 404
        assert len(vllm.other) == 2


def test_models_are_listed_once_and_described(vllm: FakeVllm, url: str) -> None:
    with running_router(FakeRouting([url])) as router:
        cards = httpx.get(f"{router}/v1/models").json()["data"]
        assert [(card["id"], card["owned_by"]) for card in cards] == [("m", "dualpath"), ("lora", "dualpath")]
        assert httpx.get(f"{router}/v1/models/m").json() == cards[0]
        assert httpx.get(f"{router}/v1/models/x").status_code == 404


@pytest.mark.parametrize("name", ["previous_response_id", "background"])
def test_responses_that_one_server_would_keep_are_refused(vllm: FakeVllm, url: str, name: str) -> None:
    with running_router(FakeRouting([url])) as router:
        answer = post(router, "/v1/responses", PATHS["/v1/responses"] | {name: "resp_1"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize(
    ("said", "told"),
    [('{"detail": "There was an error"}', "There was an error"), ("[1", "[1"), ('{"a": 1}', '{"a": 1}')],
)
def test_words_of_vllms_framework_get_the_shape_of_openais(vllm: FakeVllm, url: str, said: str, told: str) -> None:
    vllm.render = lambda path, body: Said(400, said)
    with running_router(FakeRouting([url])) as router:
        answer = post(router, "/v1/chat/completions", CHAT)
    assert answer.status_code == 400
    assert answer.json()["error"] | {"type": ""} == {
        "message": told,
        "type": "",
        "param": None,
        "code": "refused_by_vllm",
    }


def test_mistakes_are_answered_in_vllms_words(vllm: FakeVllm, url: str) -> None:
    said = {"error": {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}}
    vllm.render = lambda path, body: Said(404, json.dumps(said))
    with running_router(FakeRouting([url])) as router:
        answer = post(router, "/v1/chat/completions", CHAT)
        assert (answer.status_code, answer.json()) == (404, said)
        answer = post(router, "/v1/messages", CHAT)
        error = {"message": "no such model", "type": "NotFoundError"}
        assert (answer.status_code, answer.json()) == (404, {"type": "error", "error": error})
        assert 'error_code="refused_by_vllm"' in httpx.get(f"{router}/metrics").text
        assert post(router, "/v1/chat/completions", [1]).status_code == 400
        assert httpx.post(f"{router}/v1/chat/completions", content=b'{"a": ').status_code == 400
