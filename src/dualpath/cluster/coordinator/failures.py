"""How a cause in core becomes the error a client sees."""

from dualpath.cluster.api import RequestError
from dualpath.core.vocabulary import Cause


def request_error(cause: Cause, prompt_tokens: int) -> RequestError:
    """The HTTP status, code and advice for a request that core has given up."""
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
                f"the KV-cache of {prompt_tokens} prompt tokens and those to generate fits no engine of this cluster; "
                "shorten the prompt, lower max_tokens, or serve with a larger --buffer and --hbm",
            )
        case Cause.TIMEOUT:
            return RequestError(504, "deadline_exceeded", "the request was not served within its deadline", 5.0)
        case _:
            return RequestError(
                503, cause.value, f"the request failed on every attempt, last because of {cause.value}", 1.0
            )
