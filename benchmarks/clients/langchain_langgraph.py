"""langchain-openai and langgraph: a bound tool, structured output, an agent graph with memory."""

import sys

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import MemorySaver
from pydantic import BaseModel

url, model = sys.argv[1:3]
chat = ChatOpenAI(
    model=model, base_url=f"{url}/v1", api_key="none", max_tokens=60, temperature=0, max_retries=0, stream_usage=True
)


class City(BaseModel):
    """A city."""

    letters: int


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


question = HumanMessage("How is the weather in Paris?")
called = chat.bind_tools([weather], tool_choice="any").invoke([question])
call = called.tool_calls[0]
result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
streamed = list(chat.stream([question, called, result]))
assert sum(chunk.usage_metadata["output_tokens"] for chunk in streamed if chunk.usage_metadata)
for method in ("json_schema", "function_calling"):
    city = chat.with_structured_output(City, method=method).invoke("How many letters has Paris?")
    assert isinstance(city, City)
agent = create_agent(chat, [weather], checkpointer=MemorySaver())
thread = {"configurable": {"thread_id": "1"}, "recursion_limit": 12}
for text in ("Hello!", "Which city is the capital of France?"):
    state = agent.invoke({"messages": [HumanMessage(text)]}, thread)
print(f"tool call, stream, structured output in two ways, a graph of {len(state['messages'])} messages")
