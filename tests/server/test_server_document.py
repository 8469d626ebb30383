"""docs/how-to/openai-api.md says what the code does, and its example runs."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_cluster import EOS, FakeGenerator, ids, running_server, says
from test_chat_tools import Roomy, obeys

from dualpath.server import ServerLimits
from dualpath.server.anthropic.request import MessagesRequest
from dualpath.server.chat.formats import CALL_FORMATS
from dualpath.server.protocol import ChatRequest, CompletionRequest
from dualpath.server.responses.request import ResponsesRequest
from dualpath.server.unsupported import UNSUPPORTED, table
from dualpath.spec.timings import Timings

DOCUMENT = (Path(__file__).parents[2] / "docs/how-to/openai-api.md").read_text()
AGENTS = (Path(__file__).parents[2] / "docs/how-to/agents.md").read_text()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    with running_server(FakeGenerator(says("none do", cached_tokens=0))) as url:
        exec(compile(example.replace("http://127.0.0.1:8000", url), "openai-api.md", "exec"), {})
    text, usage, token_ids = capsys.readouterr().out.splitlines()
    assert text == "none do"
    assert re.fullmatch(r"0 of \d+ prompt tokens read", usage)
    assert token_ids == str([*ids("none do"), EOS])


def test_every_timing_is_documented_and_nothing_else() -> None:
    table = DOCUMENT.split("## Timings")[1].split("## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.M)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(Timings.__struct_fields__)


def test_every_parameter_is_documented_and_nothing_else() -> None:
    parameters = DOCUMENT.split("## Parameters")[1].split("### Not supported")[0]
    rows = re.findall(r"^\| (`.*?) \|", parameters, re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} | {"top_logprobs"}
    fields = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__} - {"prompt", "messages"}
    assert named == fields


def test_what_is_not_supported_is_the_servers_table() -> None:
    assert table() in DOCUMENT
    assert [entry.name for entry in UNSUPPORTED] == sorted(entry.name for entry in UNSUPPORTED)


@pytest.mark.parametrize("entry", UNSUPPORTED, ids=lambda entry: entry.name)
def test_what_is_not_supported_is_refused_by_name_and_its_neutral_values_pass(entry: Any) -> None:
    hello = [{"role": "user", "content": "x"}]
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "chats": ("/v1/chat/completions", {"messages": hello}),
        "completions": ("/v1/completions", {"prompt": "x"}),
        "responses": ("/v1/responses", {"input": "x"}),
        "messages": ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": hello}),
        "/generate": ("/generate", {"text": "x"}),
        "/inference/v1/generate": ("/inference/v1/generate", {"token_ids": [1]}),
    }
    cluster = FakeGenerator(says("ok"))
    with running_server(cluster) as url:
        for endpoint in entry.endpoints:
            path, body = bodies[endpoint]
            refused = httpx.post(f"{url}{path}", json={**body, entry.name: {"set": 1}})
            error = refused.json()["error"]
            assert refused.status_code == 400
            assert f"{entry.name} is not supported" in error["message"] and entry.instead in error["message"]
            if endpoint != "messages":  # Anthropic's errors have neither
                assert (error["code"], error["param"]) == ("unsupported_parameter", entry.name)
            if endpoint == "/generate":  # SGLang's clients send some of them with the sampling parameters
                inner = httpx.post(f"{url}{path}", json={**body, "sampling_params": {entry.name: {"set": 1}}})
                assert inner.json()["error"]["param"] == entry.name
            for value in (None, *entry.neutral):
                assert httpx.post(f"{url}{path}", json={**body, entry.name: value}).status_code == 200


TOOLS = (Path(__file__).parents[2] / "docs/how-to/tools.md").read_text()


def test_the_tools_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TOOLS, re.S)
    with running_server(Roomy(obeys)) as url:
        exec(compile(example.replace("http://127.0.0.1:8000", url), "tools.md", "exec"), {})
    name, arguments = capsys.readouterr().out.split(" ", 1)
    assert name == "read_file" and list(json.loads(arguments)) == ["path"]


def test_every_format_is_documented_and_nothing_else() -> None:
    section = TOOLS.split("### Formats")[1].split("## Structured output")[0]
    rows = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`.*?) \|", section, re.M)]
    assert {name for row in rows for name in row} == {name for form in CALL_FORMATS for name in form.names}


@pytest.mark.parametrize(
    ("section", "body"), [("## Claude Code", MessagesRequest), ("## openai-agents", ResponsesRequest)]
)
def test_every_field_of_the_other_apis_is_documented_and_nothing_else(section: str, body: Any) -> None:
    fields = AGENTS.split(section)[1].split("What a body may have:")[1]
    taken, refused = fields.split("Other fields are ignored")
    assert set(re.findall(r"`(\w+)`", taken)) == set(body.__struct_fields__)
    assert set(re.findall(r"`(\w+)`", refused.split("So are")[0])) == {
        entry.name for entry in UNSUPPORTED if body.api in entry.endpoints
    }


def test_every_limit_is_documented_with_its_value() -> None:
    table = DOCUMENT.split("## Limits")[1].split("## Errors")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", table, re.M)
    assert rows == [(name, shown(name, getattr(ServerLimits(), name))) for name in ServerLimits.__struct_fields__]


def shown(name: str, value: float) -> str:
    if name.endswith("_s"):
        return f"{value:g} s"
    if name.endswith("_bytes"):
        return f"{value // 2**20} MiB" if value >= 2**20 else f"{value // 2**10} KiB"
    return f"{value:,}"
