"""The `openai` package: chat, streams, tools, structured output, completions, responses."""

import json
import sys

from openai import OpenAI
from pydantic import BaseModel

url, model = sys.argv[1:3]
client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
WEATHER = {
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Capital(BaseModel):
    country: str
    founded: int


assert model in [card.id for card in client.models.list()]
question = [{"role": "user", "content": "How is the weather in Paris?"}]
settings = {"model": model, "max_tokens": 60, "temperature": 0}
tools = [{"type": "function", "function": WEATHER}]
answer = client.chat.completions.create(messages=question, tools=tools, tool_choice="required", **settings)
call = answer.choices[0].message.tool_calls[0]
assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
turns = [*question, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
with client.chat.completions.stream(messages=turns, tools=tools, **settings) as stream:
    final = stream.get_final_completion()
assert final.choices[0].message.content
parsed = client.chat.completions.parse(messages=question, response_format=Capital, **settings)
assert parsed.choices[0].finish_reason == "length" or parsed.choices[0].message.parsed
assert client.completions.create(prompt="Paris is", **settings).choices[0].text
tool = {"type": "function", "strict": True, **WEATHER}
first = client.responses.create(
    model=model, input="How is the weather?", tools=[tool], tool_choice="required", max_output_tokens=60
)
call = next(item for item in first.output if item.type == "function_call")
result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
with client.responses.stream(
    model=model, input=[result], previous_response_id=first.id, tools=[tool], max_output_tokens=40
) as stream:
    last = list(stream)[-1]
assert last.type in ("response.completed", "response.incomplete") and last.response.output
print("models, tool call and its result, stream, parsed JSON, completion, responses with a call, streamed")
