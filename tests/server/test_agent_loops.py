"""Agent loops of other people's packages, unchanged, against the server: call a tool, send its result, answer."""

import asyncio
from typing import Any

import pytest
from anthropic import Anthropic, beta_tool
from fake_cluster import TOKENIZER, FakeGenerator, running_server, says

CALL = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
ANSWER = "It is five."


def calling_then_answering() -> FakeGenerator:
    """A model that calls a tool in its first answer, as Hermes and Qwen write it, and answers after that."""
    cluster = FakeGenerator(lambda request: says(CALL if len(cluster.requests) == 1 else ANSWER)(request))
    cluster.max_model_len_tokens = 4096  # tools take room
    return cluster


def second_prompt(cluster: FakeGenerator) -> str:
    _first, second = cluster.requests
    return str(TOKENIZER.decode(second.prompt_token_ids))


def test_anthropics_tool_runner() -> None:
    @beta_tool
    def add(a: int, b: int) -> str:
        """Add two numbers."""
        return f"sum={a + b}"

    cluster = calling_then_answering()
    with running_server(cluster) as url:
        runner = Anthropic(base_url=url, api_key="none", max_retries=0).beta.messages.tool_runner(
            model="tiny", max_tokens=500, tools=[add], messages=[{"role": "user", "content": "2 + 3?"}]
        )
        answers = list(runner)
    assert [answer.stop_reason for answer in answers] == ["tool_use", "end_turn"]
    assert [block.text for block in answers[-1].content if block.type == "text"] == ["It is five."]
    assert "sum=5" in second_prompt(cluster)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_openai_agents(streamed: bool, stored: bool) -> None:
    agents: Any = pytest.importorskip("agents", reason="pip install openai-agents to run its loop")
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

    cluster = calling_then_answering()
    with running_server(cluster) as url:
        assert asyncio.run(run(url)) == "It is five."
    assert "sum=5" in second_prompt(cluster) and "2 + 3?" in second_prompt(cluster)
