"""What the coordinator tells a client whose request can't be served, before or after core has tried."""

from dualpath.cluster.generator import GenerateRequest, ModelFacts, RequestError, overflow_message
from dualpath.core.vocabulary import Cause


def check_request(asked: GenerateRequest, model: ModelFacts) -> None:
    """Check what would harm other requests; the server has checked the rest. Raises RequestError."""
    prompt_tokens, max_tokens = len(asked.prompt_token_ids), asked.sampling.max_tokens
    if prompt_tokens < 1 or max_tokens < 1:
        raise RequestError(
            400, "empty_request", f"{prompt_tokens} prompt tokens and {max_tokens} to generate: both must be ≥ 1"
        )
    if not 0 <= min(asked.prompt_token_ids) <= max(asked.prompt_token_ids) < model.vocab_size:
        raise RequestError(400, "invalid_token", f"token ids must be from 0 to {model.vocab_size - 1}")
    # The last token is never computed on, so it needs no place in the context.
    if prompt_tokens + max_tokens - 1 > model.max_model_len_tokens:
        raise RequestError(
            400,
            "context_length_exceeded",
            overflow_message(model.max_model_len_tokens, prompt_tokens, max_tokens),
        )


def request_error(cause: Cause, asked: GenerateRequest, context_tokens: int) -> RequestError:
    """Returns the HTTP status, code and message for a request that core has failed."""
    match cause:
        case Cause.OVERLOADED:
            return RequestError(429, "overloaded", "too many requests are waiting; try again shortly", 1.0)
        case Cause.NO_ENGINE:
            return RequestError(
                503, "no_engine", "no prefill engine or no decode engine is left to serve this request", 5.0
            )
        case Cause.TOO_LARGE:
            return RequestError(
                400,
                "context_length_exceeded",
                overflow_message(context_tokens, len(asked.prompt_token_ids), asked.sampling.max_tokens)
                + " The KV-cache of so many fits no engine of this cluster; a larger --buffer and --hbm would take it.",
            )
        case Cause.TIMEOUT:
            return RequestError(504, "deadline_exceeded", "the request was not served within its deadline", 5.0)
        case _:
            return RequestError(
                503, cause.value, f"the request failed on every attempt, last because of {cause.value}", 1.0
            )
