"""smolagents: an agent that calls tools, and one that writes code in structured output; steps are bounded."""

import sys

from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool

url, model = sys.argv[1:3]
client = OpenAIModel(model_id=model, api_base=f"{url}/v1", api_key="none", max_tokens=120, temperature=0)


@tool
def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    return f"sunny in {city}"


agents = (
    ToolCallingAgent(tools=[weather], model=client, max_steps=2, verbosity_level=0),
    ToolCallingAgent(tools=[weather], model=client, max_steps=2, verbosity_level=0, stream_outputs=True),
    CodeAgent(tools=[weather], model=client, max_steps=2, verbosity_level=0, use_structured_outputs_internally=True),
)
called = 0
for agent in agents:
    agent.run("How is the weather in Paris?")
    steps = [step for step in agent.memory.steps if hasattr(step, "step_number")]
    assert steps and all(step.token_usage for step in steps)
    called += sum(len(step.tool_calls or []) for step in steps)
assert called
print(f"three agents of two steps each ended; {called} calls")
