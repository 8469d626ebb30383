"""A request's id and its line in the access log."""

import json
import logging
import threading

import httpx
import pytest
from fake_cluster import FakeGenerator, running_server, says

from dualpath.cluster.generator import GeneratedTokens
from dualpath.server.request_log import log_access
from dualpath.spec.log import _Json, _Text

ASKED = {"prompt": "a secret question", "max_tokens": 4}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "dualpath")
    return caplog


def of_access(log: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in log.records if record.name == "dualpath.access"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_id_that_was_sent_is_answered_and_names_the_answer(stream: bool) -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        answer = httpx.post(f"{url}/v1/completions", json=ASKED | {"stream": stream}, headers={"X-Request-Id": "job-7"})
        assert answer.headers["x-request-id"] == "job-7"
        assert '"id":"cmpl-job-7"' in answer.text


@pytest.mark.parametrize("sent", [b"", b"two words", b"a" * 129, b"a\tb", "é".encode(), b'"quoted"'])
def test_an_id_that_could_forge_a_log_is_replaced(sent: bytes) -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        answer = httpx.get(f"{url}/v1/models", headers=[(b"x-request-id", sent)])
    assert answer.status_code == 200
    assert len(answer.headers["x-request-id"]) == 32


def test_every_answer_has_an_id_of_its_own() -> None:
    with running_server(FakeGenerator(says("ok")), api_keys=["key"]) as url:
        answers = [
            httpx.get(f"{url}/health"),
            httpx.get(f"{url}/v1/models"),
            httpx.get(f"{url}/nothing", headers={"authorization": "Bearer key"}),
            httpx.post(f"{url}/v1/completions", json={}, headers={"authorization": "Bearer key"}),
        ]
    assert [answer.status_code for answer in answers] == [200, 401, 404, 400]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4


def test_an_unexpected_failure_has_an_id_that_the_log_knows(log: pytest.LogCaptureFixture) -> None:
    with running_server(FakeGenerator(lambda _: [ZeroDivisionError()])) as url:
        answer = httpx.post(f"{url}/v1/completions", json=ASKED, headers={"x-request-id": "job-8"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "job-8")
    assert any("job-8" in line.getMessage() for line in log.records if line.levelno == logging.ERROR)


def test_a_stream_that_fails_is_named_in_the_log(log: pytest.LogCaptureFixture) -> None:
    cluster = FakeGenerator(lambda _: [GeneratedTokens(token_ids=[65]), ZeroDivisionError()])
    with running_server(cluster) as url:
        httpx.post(f"{url}/v1/completions", json=ASKED | {"stream": True}, headers={"x-request-id": "job-9"})
    assert [line for line in log.records if "job-9" in line.getMessage() and line.exc_info]


def test_the_access_log_has_a_line_a_request_and_nothing_that_was_said(log: pytest.LogCaptureFixture) -> None:
    with running_server(FakeGenerator(says("words", cached_tokens=2)), observers=(log_access,), api_keys=["k"]) as url:
        key = {"authorization": "Bearer k", "x-request-id": "job-1"}
        httpx.post(f"{url}/v1/completions", json=ASKED, headers=key)
        httpx.post(f"{url}/v1/completions?k=secret", json=ASKED | {"stream": True}, headers=key)
        httpx.get(f"{url}/v1/models/a%0Ab")
        for probe in ("health", "livez", "ready", "ping", "metrics", "version"):
            httpx.get(f"{url}/{probe}")
    whole, streamed, refused = of_access(log)
    for line in (whole, streamed):
        assert line.getMessage() == "POST /v1/completions 200"
        fields = line.fields  # type: ignore[attr-defined]
        tokens = [fields[f"{kind}_tokens"] for kind in ("prompt", "cached", "completion")]
        assert (tokens, fields["client"], fields["request_id"]) == ([17, 2, 4], "127.0.0.1", "job-1")
    assert refused.getMessage() == "GET /v1/models/a%0Ab 401"
    text = "\n".join(_Text("%(message)s").format(line) for line in (whole, streamed, refused))
    assert "secret" not in text and "words" not in text and "Bearer" not in text
    assert "seconds=0." in text and "prompt_tokens=17 cached_tokens=2 completion_tokens=4 request_id=job-1" in text


def test_a_client_that_left_is_499_with_the_tokens_it_cost(log: pytest.LogCaptureFixture) -> None:
    cluster = FakeGenerator(lambda _: [GeneratedTokens(token_ids=[65]), threading.Event()])
    with running_server(cluster, observers=(log_access,)) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json=ASKED | {"stream": True}) as answer:
            next(answer.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=ASKED, timeout=0.5)
        assert cluster.all_closed.wait(10)
    begun, waiting = of_access(log)
    assert begun.getMessage().endswith(" 200") and begun.fields["completion_tokens"] == 1  # type: ignore[attr-defined]
    assert waiting.getMessage().endswith(" 499")


def test_json_lines_have_the_fields() -> None:
    record = logging.LogRecord("dualpath.access", logging.INFO, "f", 1, "GET %s", ("/é",), None)
    record.fields = {"seconds": 0.5}
    written = json.loads(_Json().format(record))
    assert written.pop("time")[:4].isdigit()
    assert written == {"level": "info", "who": "access", "message": "GET /é", "seconds": 0.5}
    try:
        raise ValueError("why")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "m", (), (type(error), error, error.__traceback__))
    assert "ValueError: why" in json.loads(_Json().format(record))["traceback"]
