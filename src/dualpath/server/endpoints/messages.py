"""Anthropic's Messages API, translated into chats and back."""

import time

from starlette.requests import Request
from starlette.responses import Response

from dualpath.server.anthropic.answer import MessagesWriter
from dualpath.server.anthropic.request import CountTokensRequest, MessagesRequest, as_chat
from dualpath.server.door import Route, json_response
from dualpath.server.errors import in_words_of_client
from dualpath.server.service import Service

_WORDS = {
    r"response_format\.json_schema": "output_config.format",
    r"response_format": "output_config.format",
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function": r"\1",
    r"stop": "stop_sequences",
}
"""Fields of a chat, and what they are called here."""


def routes(service: Service) -> list[Route]:
    async def messages(request: Request) -> Response:
        arrived_s = time.perf_counter()
        asked = await service.body(request, MessagesRequest)
        with in_words_of_client(_WORDS):
            checked = await service.checker.chat_up_to(as_chat(asked), "max_tokens", asked.max_tokens)
        writer = MessagesWriter(service.generator.model.name, checked, asked.max_tokens)
        return await service.answer(request, checked, writer, arrived_s)

    async def count_tokens(request: Request) -> Response:
        chat = as_chat(await service.body(request, CountTokensRequest))
        service.checker.check_model(chat.model)
        with in_words_of_client(_WORDS):
            prompt = await service.checker.chat_prompt(chat, chat.messages)
        return json_response({"input_tokens": len(prompt)})

    return [
        Route("/v1/messages", messages, ("POST",)),
        Route("/v1/messages/count_tokens", count_tokens, ("POST",)),
    ]
