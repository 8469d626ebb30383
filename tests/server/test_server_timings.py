"""``"return_timings": true``: where the answer says how the cluster spent its time."""

from typing import Any

import httpx
import msgspec
import pytest
from fake_cluster import FakeGenerator, running_server, says
from openai import OpenAI

from dualpath.cluster.generator import GenerateRequest
from dualpath.spec.timings import Timings

TIMINGS = Timings(
    scheduling_s=0.5,
    allocation_s=0.25,
    read_s=1.5,
    prefill_s=2.0,
    decode_s=0.0,
    prefill_engine="PE0",
    decode_engine="DE1",
    pe_read_tokens=64,
    de_read_tokens=128,
    attempts=1,
)


def timed(request: GenerateRequest) -> Any:
    """As a cluster: every step carries the timings up to it."""
    steps = says("a b c", finish_reason="length")(request)
    return [
        msgspec.structs.replace(step, timings=msgspec.structs.replace(TIMINGS, decode_s=float(i)))
        for i, step in enumerate(steps)
    ]


def post(url: str, endpoint: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{endpoint}", json={"max_tokens": 5} | body, trust_env=False, timeout=30)


PROMPTS: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "hi"},
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("endpoint", PROMPTS)
def test_in_the_body(endpoint: str) -> None:
    with running_server(FakeGenerator(timed)) as url:
        answer = post(url, endpoint, return_timings=True, **PROMPTS[endpoint]).json()
        without = post(url, endpoint, **PROMPTS[endpoint]).json()
    assert answer["timings"] == msgspec.to_builtins(TIMINGS) | {"decode_s": 4.0}
    assert "timings" not in without


@pytest.mark.parametrize("endpoint", PROMPTS)
@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_in_the_last_event_of_a_stream(endpoint: str, options: dict[str, Any]) -> None:
    with running_server(FakeGenerator(timed)) as url:
        answer = post(url, endpoint, stream=True, return_timings=True, **options, **PROMPTS[endpoint])
    *events, done = [line[6:] for line in answer.text.splitlines() if line]
    assert done == "[DONE]"
    *steps, last = [msgspec.json.decode(event) for event in events]
    assert all("timings" not in step for step in steps)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 5)
    assert last["timings"]["decode_s"] == 4.0


def test_an_answer_that_ends_at_a_stop_string_has_them_too() -> None:
    """Its generation is closed early: the cluster's own last step never comes."""
    with running_server(FakeGenerator(timed)) as url:
        answer = post(url, "completions", prompt="hi", stop="b", return_timings=True).json()
    assert answer["timings"]["decode_s"] == 2.0


@pytest.mark.parametrize("body", [{"prompt": ["a", "b"]}, {"prompt": "a", "n": 2}])
def test_several_answers_have_no_timings(body: dict[str, Any]) -> None:
    with running_server(FakeGenerator(timed)) as url:
        refused = post(url, "completions", return_timings=True, **body)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "return_timings")
    assert "several requests" in error["message"]


def test_through_the_official_client() -> None:
    with running_server(FakeGenerator(timed)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
        answer = client.completions.create(model="tiny", prompt="hi", extra_body={"return_timings": True})
    assert answer.model_extra is not None
    assert msgspec.convert(answer.model_extra["timings"], Timings).read_s == 1.5
