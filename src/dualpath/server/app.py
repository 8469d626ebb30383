"""The application over a `Generator`: its routes, its gate, and its handlers of failures.

Theory of operation. A body is read and decoded (`protocol`), checked and tokenised (`requests`), and becomes one
`GenerateRequest` per choice. The cluster's tokens become pieces of text (`generation`). Pieces become events or one
body (`answers`), and `http` sends them while the client is connected. Every failure becomes an `ApiError`, at the
latest in the handlers below. `service` connects these steps; `endpoints/` has the endpoints, a module per group.
"""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI

from dualpath.cluster.generator import Generator
from dualpath.server.chat.dialect import Dialect
from dualpath.server.codec import TextCodec
from dualpath.server.door import assembled
from dualpath.server.drain import Drain
from dualpath.server.endpoints import control, messages, openai, operations, responses, rollout
from dualpath.server.limits import ServerLimits
from dualpath.server.service import Service

GROUPS = (
    *(openai.routes, responses.routes, messages.routes, operations.routes),
    *(rollout.routes, control.routes),
)


def create_app(
    generator: Generator,
    tokenizer: Any,
    *,
    api_keys: Collection[str] = (),
    limits: ServerLimits | None = None,
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
    enable_control: bool = False,
    drain: Drain | None = None,
) -> FastAPI:
    """Returns the application. `tokenizer` is a Transformers tokenizer (`load_tokenizer`). No `api_keys`: open to all.

    `tool_call_parser` and `reasoning_parser` are names of `chat.formats`; None: as the chat template says.

    `enable_control` opens the endpoints that change how the cluster serves: to who has a key, else to this host.

    Raises ValueError for an empty key, which would admit clients that send none, and for an unknown parser.
    """
    limits = limits or ServerLimits()
    dialect = Dialect(tokenizer, generator.model.vocab_size, tool_call_parser, reasoning_parser)
    codec = TextCodec(tokenizer, generator.model.max_model_len_tokens, limits)
    service = Service(generator, codec, dialect, limits, drain or Drain())
    service.who_controls = ("keys" if api_keys else "this host") if enable_control else "nobody"
    routes = [route for group in GROUPS for route in group(service)]

    async def close() -> None:
        dialect.close()

    return assembled(service, routes, api_keys, close)
