"""The `anthropic` package: count, tool use and its result, stream."""

import sys

from anthropic import Anthropic

url, model = sys.argv[1:3]
client = Anthropic(base_url=url, api_key="none", max_retries=0)
schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
tools = [{"name": "weather", "description": "The weather of a city", "input_schema": schema}]
turns = [{"role": "user", "content": "How is the weather in Paris?"}]
counted = client.messages.count_tokens(model=model, messages=turns, tools=tools, system="Be brief.")
asked = {"model": model, "max_tokens": 60, "tools": tools, "system": "Be brief."}
message = client.messages.create(
    messages=turns, tool_choice={"type": "any", "disable_parallel_tool_use": True}, **asked
)
usage = message.usage
assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens
call = next(block for block in message.content if block.type == "tool_use")
assert message.stop_reason == "tool_use" and call.input["city"] in ("Paris", "Rome")
result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
turns += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
with client.messages.stream(messages=turns, **asked) as stream:
    text = "".join(stream.text_stream)
    assert stream.get_final_message().usage.output_tokens
print(f"counted {counted.input_tokens} tokens, tool use and its result, a streamed answer of {len(text)} characters")
