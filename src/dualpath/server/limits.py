"""Bounds on what clients may use of the server. docs/how-to/openai-api.md has them as a table, held by a test."""

import msgspec


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Every bound of the HTTP door. The model's context bounds prompts beside these."""

    max_body_bytes: int = 32 * 2**20
    """Size of a request's body."""
    max_body_containers: int = 2**18
    """Objects and lists in a body, and names in its objects; four times as many texts. Each costs time and memory."""
    max_nesting: int = 100
    """Depth of objects and lists in a body."""
    max_messages: int = 16_384
    """Messages of a chat. Each costs some tokens of the context, and a walk through the chat template."""
    max_tools: int = 1024
    """Tools of a chat."""
    max_list_entries: int = 2**20
    """Entries of any other list, such as token ids."""
    max_choices: int = 128
    """Choices (prompts × n) in one request."""
    max_inflight_requests: int = 8192
    """Requests in flight; more get 429."""
    max_stored_responses: int = 10_000
    max_stored_response_bytes: int = 64 * 2**20
    """All that /v1/responses keeps for its clients, together; the least recently used make room."""
    max_large_body_bytes: int = 256 * 2**20
    """Bodies above 64 KiB that are received and decoded at a time, together; the next ones wait."""
    max_tokenising_characters: int = 2**23
    """Long texts that are tokenised at a time, together, unless one alone is longer; the next ones wait."""
    max_waiting: int = 1024
    """Large bodies, or long texts, that wait for their turn; more get 429."""
    max_connections: int = 10_000
    """Open connections; more get 503. At most what the process's limit of open files leaves."""
    max_pipelined: int = 16
    """Requests that wait on one connection for the answer to the one before."""
    max_head_bytes: int = 64 * 2**10
    """Size of a request's headers."""
    max_headers: int = 256
    """Number of a request's headers."""
    max_target_bytes: int = 16 * 2**10
    """Length of a request's path and query."""
    head_timeout_s: float = 30.0
    """How long a new connection may stay silent, and a request's headers take."""
    body_timeout_s: float = 60.0
    """How long a request's body may take, or wait for its turn."""
    tokenise_timeout_s: float = 60.0
    """How long a long text may wait for its turn."""
    keep_alive_s: float = 30.0
    """How long a connection may stay silent after an answer."""
    write_timeout_s: float = 60.0
    """How long a client may leave its stream unread."""
