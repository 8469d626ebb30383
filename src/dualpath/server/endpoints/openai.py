"""OpenAI's endpoints, with vLLM's /tokenize and /detokenize."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dualpath.server.answers import ChatWriter, CompletionWriter
from dualpath.server.door import Route, json_response
from dualpath.server.errors import bad_parameter
from dualpath.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dualpath.server.service import Service


def routes(service: Service) -> list[Route]:
    api = _OpenAI(service)
    return [
        Route("/v1/completions", api.completions, ("POST",)),
        Route("/v1/chat/completions", api.chat, ("POST",)),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/tokenize", api.tokenize, ("POST",)),
        Route("/detokenize", api.detokenize, ("POST",)),
    ]


class _OpenAI:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._checker = service.checker

    async def completions(self, request: Request) -> Response:
        arrived_s = time.perf_counter()
        service = self._service
        checked = await self._checker.completion(await service.body(request, CompletionRequest))
        writer = CompletionWriter(service.generator.model.name, checked, service.codec)
        return await service.answer(request, checked, writer, arrived_s)

    async def chat(self, request: Request) -> Response:
        arrived_s = time.perf_counter()
        service = self._service
        checked = await self._checker.chat(await service.body(request, ChatRequest))
        writer = ChatWriter(service.generator.model.name, checked, service.codec)
        return await service.answer(request, checked, writer, arrived_s)

    async def models(self, _request: Request) -> Response:
        return json_response(
            {"object": "list", "data": [self._model_card(name) for name in self._service.generator.model.names]}
        )

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._checker.check_model(name)
        return json_response(self._model_card(name))

    async def tokenize(self, request: Request) -> Response:
        asked = await self._service.body(request, TokenizeRequest)
        self._checker.check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad_parameter("prompt", "give either prompt or messages")
        if asked.messages is not None:
            tokens = await self._checker.chat_prompt(asked, asked.messages)
        else:
            special = asked.add_special_tokens is not False
            tokens = await self._service.codec.encode(asked.prompt or "", add_special_tokens=special)
        context = self._service.generator.model.max_model_len_tokens
        return json_response({"count": len(tokens), "max_model_len": context, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        asked = await self._service.body(request, DetokenizeRequest)
        self._checker.check_model(asked.model)
        self._checker.check_token_ids(asked.tokens, "tokens")
        return json_response({"prompt": self._service.codec.decode(asked.tokens, skip_special_tokens=False)})

    def _model_card(self, name: str) -> dict[str, Any]:
        model = self._service.generator.model
        return {
            "id": name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "dualpath",
            "root": model.name,
            "max_model_len": model.max_model_len_tokens,
            "weight_version": model.weight_version,
            "cluster": model.cluster,
        }
