"""openai-agents: an agent with a tool, over /v1/responses (its default) and over chat completions; streamed."""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

url, model = sys.argv[1:3]
client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
calls: list[str] = []


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    calls.append(city)
    return "sunny, 23 degrees"


async def main() -> None:
    set_tracing_disabled(True)
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        settings = ModelSettings(temperature=0, max_tokens=60, tool_choice="required")
        agent = Agent(
            name="weatherman",
            instructions="Answer in one sentence.",
            tools=[weather],
            model=kind(model, client),
            model_settings=settings,
        )
        answer = await Runner.run(agent, "How is the weather in Paris?", max_turns=4)
        streamed = Runner.run_streamed(agent, "How is the weather in Rome?", max_turns=4)
        events = [event.type async for event in streamed.stream_events()]
        assert answer.final_output and streamed.final_output and events
    assert len(calls) >= 4


asyncio.run(main())
print(f"two APIs, whole and streamed: the tool was called {len(calls)} times, each run ended with text")
