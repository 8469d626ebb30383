"""Anthropic's Messages API, translated into chats and back."""

import time

from starlette.requests import Request
from starlette.responses import Response

from dualpath.server.anthropic.answer import MessagesWriter
from dualpath.server.anthropic.request import CountTokensRequest, MessagesRequest, as_chat
from dualpath.server.service import Route, Service, json_response


def routes(service: Service) -> list[Route]:
    async def messages(request: Request) -> Response:
        arrived_s = time.perf_counter()
        asked = await service.body(request, MessagesRequest)
        checked = await service.checker.chat_up_to(as_chat(asked), "max_tokens", asked.max_tokens)
        writer = MessagesWriter(service.generator.model.name, checked, asked.max_tokens)
        return await service.answer(request, checked, writer, arrived_s)

    async def count_tokens(request: Request) -> Response:
        chat = as_chat(await service.body(request, CountTokensRequest))
        service.checker.check_model(chat.model)
        prompt = await service.checker.chat_prompt(chat, chat.messages)
        return json_response({"input_tokens": len(prompt)})

    return [
        Route("/v1/messages", messages, ("POST",)),
        Route("/v1/messages/count_tokens", count_tokens, ("POST",)),
    ]
