"""Requests of other APIs are translated; their errors name the fields that the client sent."""

from typing import Any

import httpx
import pytest
from fake_cluster import FakeGenerator, running_server, says

BAD: Any = {"type": "object", "properties": {"a": {"type": "strng"}}}
TOOL: Any = {"type": "function", "name": "f", "parameters": BAD, "strict": True}
SCHEMA: Any = {"format": {"type": "json_schema", "name": "x", "schema": BAD, "strict": True}}
HELLO: Any = [{"role": "user", "content": "hi"}]
CALLED: Any = {"tools": [{"name": "f", "input_schema": BAD}], "tool_choice": {"type": "any"}}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/responses", {"input": "x", "tools": [TOOL], "tool_choice": "required"}, "tools[0].parameters"),
        ("/v1/responses", {"input": "x", "text": SCHEMA}, "text.format.schema"),
        ("/v1/messages", {"model": "tiny", "max_tokens": 9, "messages": HELLO, **CALLED}, "tools[0].input_schema"),
        ("/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
        ("/generate", {"input_ids": [-1]}, "input_ids"),
        ("/generate", {"input_ids": [1], "sampling_params": {"json_schema": "{"}}, "json_schema"),
        ("/generate", {"input_ids": [1], "sampling_params": {"sampling_seed": "x"}}, "sampling_seed"),
        ("/inference/v1/generate", {"token_ids": [-1]}, "token_ids"),
    ],
)
def test_an_error_names_the_field_that_was_sent(path: str, body: dict[str, Any], field: str) -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        answer = httpx.post(url + path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error.get("param", field) == field
    assert path != "/v1/messages" or field in error["message"]
