"""Enforced calls by a real cluster: valid, and found again in storage when the next turn sends them back."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI

import dualpath

PARAMETERS = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "maxLength": 6},
        "lines": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["path", "lines"],
    "additionalProperties": False,
}
BLOCK_TOKENS = 64


@pytest.mark.slow
def test_an_agents_enforced_calls_are_valid_and_hit(tmp_path: Path) -> None:
    model = dualpath.make_checkpoint(tmp_path / "tiny", "qwen3")
    tools: Any = [{"type": "function", "function": {"name": "read_file", "parameters": PARAMETERS}}]
    messages: Any = [{"role": "user", "content": "What is in the notes? " * 10}]
    config = dualpath.ClusterConfig(model=str(model), store=str(tmp_path / "kv"), port=0)
    with dualpath.Server(config) as server:
        client = OpenAI(base_url=f"{server.url.removesuffix('/v1')}/v1", api_key="none", max_retries=0, timeout=60)
        known_tokens = 0
        for turn in range(3):
            answer = client.chat.completions.create(
                model=client.models.list().data[0].id,
                messages=messages,
                tools=tools,
                tool_choice="required",
                parallel_tool_calls=False,
                max_tokens=300,
                seed=turn,
            )
            message, usage = answer.choices[0].message, answer.usage
            (call,) = message.tool_calls or []
            assert call.type == "function" and call.function.name == "read_file"
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
            assert usage is not None and usage.prompt_tokens_details is not None
            assert usage.prompt_tokens_details.cached_tokens == known_tokens // BLOCK_TOKENS * BLOCK_TOKENS
            known_tokens = usage.prompt_tokens + usage.completion_tokens - 1  # the last token's KV is never computed
            messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "milk, bread, tea"}]
