"""What clients may send and this server does not do: the one table, for the check and for the documents.

A field of it that asks for nothing passes: null, or one of its `neutral` values. Any other value is refused by name.
Fields that are neither supported nor here are ignored, because they don't change the answer.
``python -m dualpath.server.unsupported`` prints the table of docs/how-to/openai-api.md.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from dualpath.server.errors import bad_parameter

_BOTH = ("completions", "chats")
_CHATS = ("chats",)
_COMPLETIONS = ("completions",)
_MESSAGES = ("messages",)
_RESPONSES = ("responses",)
_SGLANG = ("/generate",)
_VLLM = ("/inference/v1/generate",)
_NOTHING: tuple[Any, ...] = (False, [], {})


class Unsupported(NamedTuple):
    """One field: on which endpoints it is refused, the values that change nothing, and what to do instead."""

    name: str
    endpoints: tuple[str, ...]
    neutral: tuple[Any, ...]
    instead: str


UNSUPPORTED = (
    Unsupported("audio", _CHATS, (), "this server takes and gives text"),
    Unsupported("audio_data", _SGLANG, _NOTHING, "this server takes and gives text"),
    Unsupported("background", _RESPONSES, (False,), "stream the response, or wait for it"),
    Unsupported("best_of", _BOTH, (1,), "send n and choose yourself"),
    Unsupported("chat_template", _CHATS, (), "serve the model with that template, or send chat_template_kwargs"),
    Unsupported("container", _MESSAGES, (), "run code in a tool of the client's"),
    Unsupported("context_management", _RESPONSES, ([],), "shorten the input yourself"),
    Unsupported("conversation", _RESPONSES, (), "send previous_response_id, or the whole input"),
    Unsupported("custom_logit_processor", _SGLANG, _NOTHING, "send logit_bias, or a grammar"),
    Unsupported("documents", _CHATS, ([],), "put them into a message"),
    Unsupported("echo", _CHATS, (False,), "send return_token_ids, or use /v1/completions"),
    Unsupported("features", _VLLM, _NOTHING, "this server takes and gives text"),
    Unsupported("function_call", _CHATS, ("none", "auto"), "send tool_choice"),
    Unsupported("functions", _CHATS, ([],), "send tools"),
    Unsupported("guided_choice", _BOTH, (), 'send structured_outputs: {"choice": […]}'),
    Unsupported("guided_grammar", _BOTH, (), 'send structured_outputs: {"grammar": …}'),
    Unsupported("guided_json", _BOTH, (), 'send structured_outputs: {"json": …}'),
    Unsupported("guided_regex", _BOTH, (), 'send structured_outputs: {"regex": …}'),
    Unsupported("image_data", _SGLANG, _NOTHING, "this server takes and gives text"),
    Unsupported("input_embeds", _SGLANG, _NOTHING, "send text or token ids"),
    Unsupported("kv_transfer_params", _VLLM, _NOTHING, "the cluster moves KV by itself"),
    Unsupported("length_penalty", _BOTH, (1,), "there is no beam search"),
    Unsupported("logits_processors", _BOTH, ([],), "send logit_bias, or structured_outputs"),
    Unsupported("lora_path", _SGLANG, _NOTHING, "merge the adapter into the weights"),
    Unsupported("mcp_servers", _MESSAGES, ([],), "give their tools with an input_schema"),
    Unsupported("modalities", _CHATS, (["text"],), "this server takes and gives text"),
    Unsupported("moderation", _RESPONSES, (), "moderate before you send"),
    Unsupported("prompt", _RESPONSES, (), "send instructions and input"),
    Unsupported("prompt_embeds", _BOTH, (), "send text or token ids"),
    Unsupported("return_hidden_states", _SGLANG, _NOTHING, "ask for log-probabilities"),
    Unsupported("return_routed_experts", _SGLANG, _NOTHING, "ask for log-probabilities"),
    Unsupported("session_params", _SGLANG, _NOTHING, "send the whole prompt; its KV is in storage"),
    Unsupported("stop_regex", _SGLANG, _NOTHING, "send stop, or a grammar"),
    Unsupported("structural_tag", _SGLANG, _NOTHING, "send json_schema, regex or ebnf"),
    Unsupported("suffix", _COMPLETIONS, ("",), "write the model's own markers for filling in into the prompt"),
    Unsupported("thinking_token_budget", _CHATS, (), "send max_tokens, or chat_template_kwargs"),
    Unsupported("token_ids_logprob", _SGLANG, _NOTHING, "ask for top_logprobs_num"),
    Unsupported("top_logprobs", _RESPONSES, (0,), "use /v1/chat/completions"),
    Unsupported("truncation", _RESPONSES, ("disabled",), "shorten the input yourself"),
    Unsupported("use_beam_search", _BOTH, (False,), "send n and choose yourself"),
    Unsupported("video_data", _SGLANG, _NOTHING, "this server takes and gives text"),
    Unsupported("web_search_options", _CHATS, (), "give the model a tool that searches"),
)


def refuse_unsupported(fields: Mapping[str, Any], endpoint: str) -> None:
    """Raises ApiError (400) for the first field that is set and not supported on `endpoint`; values may be raw JSON."""
    for entry in UNSUPPORTED:
        if entry.name not in fields or endpoint not in entry.endpoints:
            continue
        value = fields[entry.name]
        value = msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value
        if value is not None and value not in entry.neutral:
            raise bad_parameter(
                entry.name,
                f"{entry.name} is not supported by this server; {entry.instead}",
                code="unsupported_parameter",
            )


def table() -> str:
    """Returns the table in Markdown."""
    rows = ["| field | on | do |", "|---|---|---|"]
    rows += [f"| `{entry.name}` | {', '.join(entry.endpoints)} | {entry.instead} |" for entry in UNSUPPORTED]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
