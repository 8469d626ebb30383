"""Agent loops of other people's packages, unchanged, against the server: call a tool, send its result, answer."""

import asyncio
from typing import Any

import pytest
from anthropic import Anthropic, beta_tool
from fake_cluster import TOKENIZER, FakeGenerator, running_server
from scripted_deltas import scripted

from dualpath.server.chat.deltas import Delta

CALL = [
    [Delta("reasoning", "I must add.")],
    [Delta("content", "Let me see.")],
    [Delta("call", "add", 0, "call_1")],
    [Delta("arguments", '{"a": 2, ', 0)],
    [Delta("arguments", '"b": 3}', 0)],
]
ANSWER = [[Delta("content", "It is ")], [Delta("content", "five.")]]


def second_prompt(cluster: FakeGenerator) -> str:
    _first, second = cluster.requests
    return str(TOKENIZER.decode(second.prompt_token_ids))


def test_anthropics_tool_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    @beta_tool
    def add(a: int, b: int) -> str:
        """Add two numbers."""
        return f"sum={a + b}"

    cluster = scripted(monkeypatch, CALL, ANSWER)
    with running_server(cluster) as url:
        runner = Anthropic(base_url=url, api_key="none", max_retries=0).beta.messages.tool_runner(
            model="tiny", max_tokens=50, tools=[add], messages=[{"role": "user", "content": "2 + 3?"}]
        )
        answers = list(runner)
    assert [answer.stop_reason for answer in answers] == ["tool_use", "end_turn"]
    assert [block.text for block in answers[-1].content if block.type == "text"] == ["It is five."]
    assert "sum=5" in second_prompt(cluster)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_openai_agents(monkeypatch: pytest.MonkeyPatch, streamed: bool, stored: bool) -> None:
    agents: Any = pytest.importorskip("agents", reason="openai-agents is not installed: docs/how-to/tests.md")
    from openai import AsyncOpenAI

    @agents.function_tool
    def add(a: int, b: int) -> str:
        """Add two numbers."""
        return f"sum={a + b}"

    async def run(url: str) -> str:
        api = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        model = agents.OpenAIResponsesModel(model="tiny", openai_client=api)
        agent = agents.Agent(name="Adder", instructions="Use tools.", model=model, tools=[add])
        options = {"auto_previous_response_id": stored, "run_config": agents.RunConfig(tracing_disabled=True)}
        if not streamed:
            return str((await agents.Runner.run(agent, "2 + 3?", **options)).final_output)
        result = agents.Runner.run_streamed(agent, "2 + 3?", **options)
        async for _event in result.stream_events():
            pass
        return str(result.final_output)

    cluster = scripted(monkeypatch, CALL, ANSWER)
    with running_server(cluster) as url:
        assert asyncio.run(run(url)) == "It is five."
    assert "sum=5" in second_prompt(cluster) and "2 + 3?" in second_prompt(cluster)
