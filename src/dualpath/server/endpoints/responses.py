"""OpenAI's Responses API, translated into chats and back, with a bounded memory of what it answered."""

import hashlib
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dualpath.server.door import Route, json_response
from dualpath.server.errors import bad_parameter, in_words_of_client
from dualpath.server.http import api_key
from dualpath.server.protocol import ChatRequest
from dualpath.server.responses.answer import Keep, ResponsesWriter
from dualpath.server.responses.request import InputTokensRequest, ResponsesRequest, as_chat, own_items
from dualpath.server.responses.store import Owner, ResponseStore
from dualpath.server.responses.tools import Tools
from dualpath.server.service import Service

_WORDS = {
    r"response_format\.json_schema\.schema": "text.format.schema",
    r"response_format": "text.format",
    r"(tools\[\d+\])\.function": r"\1",
    r"messages": "input",
}
"""Fields of a chat, and what they are called here."""


def routes(service: Service) -> list[Route]:
    api = _Responses(service)
    return [
        Route("/v1/responses", api.create, ("POST",)),
        Route("/v1/responses/input_tokens", api.input_tokens, ("POST",)),
        Route("/v1/responses/{id}", api.retrieve),
        Route("/v1/responses/{id}", api.delete, ("DELETE",)),
    ]


class _Responses:
    def __init__(self, service: Service) -> None:
        self._service = service
        limits = service.limits
        self._store = ResponseStore(limits.max_stored_response_bytes, limits.max_stored_responses)

    async def create(self, request: Request) -> Response:
        arrived_s = time.perf_counter()
        service = self._service
        asked = await service.body(request, ResponsesRequest)
        owner = Owner(_key_digest(request), asked.cache_salt)
        tools = Tools(asked.tools, asked.tool_choice)
        with in_words_of_client(_WORDS):
            chat = self._chat(asked, owner, tools)
            checked = await service.checker.chat_up_to(chat, "max_output_tokens", asked.max_output_tokens)
        writer = ResponsesWriter(service.generator.model.name, checked, asked, tools, self._keep(asked, owner))
        return await service.answer(request, checked, writer, arrived_s)

    async def input_tokens(self, request: Request) -> Response:
        asked = await self._service.body(request, InputTokensRequest)
        owner = Owner(_key_digest(request), asked.cache_salt)
        with in_words_of_client(_WORDS):
            chat = self._chat(asked, owner, Tools(asked.tools, asked.tool_choice))
            self._service.checker.check_model(chat.model)
            prompt = await self._service.checker.chat_prompt(chat, chat.messages)
        return json_response({"object": "response.input_tokens", "input_tokens": len(prompt)})

    async def retrieve(self, request: Request) -> Response:
        if request.query_params.get("stream") == "true":
            raise bad_parameter("stream", "a stored response is not streamed; leave stream out")
        body = self._store.get(request.path_params["id"], _key_digest(request))
        return Response(body, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        response_id = request.path_params["id"]
        self._store.delete(response_id, _key_digest(request))
        return json_response({"id": response_id, "object": "response", "deleted": True})

    def _chat(self, asked: InputTokensRequest, owner: Owner, tools: Tools) -> ChatRequest:
        earlier = self._store.conversation(asked.previous_response_id, owner)
        return as_chat(asked, earlier, lambda item_id: self._store.item(item_id, owner), tools)

    def _keep(self, asked: ResponsesRequest, owner: Owner) -> Keep:
        def keep(key: str, body: bytes, output: list[dict[str, Any]]) -> None:
            if asked.store is not False:
                self._store.put(key, owner, body, own_items(asked), output, asked.previous_response_id)

        return keep


def _key_digest(request: Request) -> bytes:
    return hashlib.sha256(api_key(request.headers)).digest()
