"""litellm, as OpenAI's, vLLM's and Anthropic's provider: a tool call and its result, a stream."""

import sys

import litellm

url, model = sys.argv[1:3]
litellm.telemetry = False
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}
providers = {"openai": f"{url}/v1", "hosted_vllm": f"{url}/v1", "anthropic": url}
for provider, base in providers.items():
    asked = {
        "model": f"{provider}/{model}",
        "api_base": base,
        "api_key": "none",
        "max_tokens": 60,
        "tools": [TOOL],
        "num_retries": 0,
    }
    turns = [{"role": "user", "content": "How is the weather in Paris?"}]
    message = litellm.completion(messages=turns, tool_choice="required", **asked).choices[0].message
    call = message.tool_calls[0]
    turns += [message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    chunks = list(litellm.completion(messages=turns, stream=True, stream_options={"include_usage": True}, **asked))
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens
print(f"{', '.join(providers)}: a tool call and its result, a stream")
