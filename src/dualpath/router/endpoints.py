"""The endpoints of the router: four that are routed, many that pass, and those that it does not pass on."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Raw
from starlette.requests import Request
from starlette.responses import Response

from dualpath.router.answering import RouterDoor
from dualpath.router.asked import Fields, Rendered, refuse_stored, why_direct, why_direct_rendered, without_transfer
from dualpath.router.reading import READERS
from dualpath.server.door import Route, json_response
from dualpath.server.errors import ApiError
from dualpath.server.http import while_connected

_JSON = ("application/json", "+json")
PASSED = (
    *("/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/chat/completions/batch", "/generative_scoring"),
    *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score"),
    *("/rerank", "/v1/rerank", "/v2/rerank", "/v1/audio/transcriptions", "/v1/audio/translations"),
)
"""What goes to a decode server as it is."""
_ONE_SERVER = "it would change one vLLM server of many; ask each server at its own port"
_WHOLE_CLUSTER = "it is not available for clusters of vLLM servers; DualPath has it for its own engines"
_PAST_US = "it would go past the cluster's placement; use /v1/completions with token ids"
_STORED = "a response is kept by one vLLM server alone; send the whole conversation as input"
REFUSED = {
    **dict.fromkeys(("/pause", "/resume", "/abort_requests", "/update_weights", "/sleep", "/wake_up"), _WHOLE_CLUSTER),
    **dict.fromkeys(("/reset_prefix_cache", "/is_paused", "/is_sleeping", "/collective_rpc"), _WHOLE_CLUSTER),
    **dict.fromkeys(("/init_weight_transfer_engine", "/start_weight_update", "/finish_weight_update"), _WHOLE_CLUSTER),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/scale_elastic_ep"), _ONE_SERVER),
    **dict.fromkeys(("/reset_mm_cache", "/reset_encoder_cache", "/start_profile", "/stop_profile"), _ONE_SERVER),
    **dict.fromkeys(("/server_info", "/load", "/fault_tolerance/apply", "/release_kv_cache_memory"), _ONE_SERVER),
    **dict.fromkeys(("/inference/v1/generate", "/invocations", "/cohere/v2/chat", "/v1/systemone"), _PAST_US),
    **dict.fromkeys((f"{path}/render" for path in READERS), _PAST_US),
    **dict.fromkeys((f"/v1/{kind}/derender" for kind in ("completions", "chat/completions")), _PAST_US),
    **dict.fromkeys(("/v1/responses/{id}", "/v1/responses/{id}/cancel"), _STORED),
}
"""What is not passed on, and why."""
_ANY = ("GET", "POST", "DELETE")


def routes(door: RouterDoor) -> list[Route]:
    api = _Endpoints(door)
    return [
        *(Route(path, api.generate, ("POST",)) for path in READERS),
        *(Route(path, api.passed, ("POST",)) for path in PASSED),
        *(Route(path, _refusing(path, why), _ANY) for path, why in REFUSED.items()),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
    ]


def _refusing(path: str, why: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(_request: Request) -> Response:
        raise ApiError(403, f"{path} is not passed on: {why}", code="unsupported_endpoint")

    return refuse


class _Endpoints:
    def __init__(self, door: RouterDoor) -> None:
        self._door = door

    async def generate(self, request: Request) -> Response:
        arrived_s = time.perf_counter()
        door, path = self._door, request.url.path
        deadline_s = door.deadline_s()
        fields = without_transfer(await door.bodies.fields(request))
        if path == "/v1/responses":
            refuse_stored(fields)
        if why_direct(path, fields) is None:
            prompts = await while_connected(request.receive, self._rendered(request, fields, deadline_s))
            if why_direct_rendered(prompts) is None and self._is_routable(path, fields):
                return await door.routed(request, fields, prompts, arrived_s, deadline_s)
        kept = {name: value for name, value in fields.items() if name != "return_timings"}
        return await door.passed(request, msgspec.json.encode(kept), deadline_s)

    def _is_routable(self, path: str, fields: Fields) -> bool:
        servers = self._door.servers
        if path == "/v1/responses" and servers.shares_ports:  # vLLM does not pin those to a data-parallel rank
            return False
        model = fields.get("model", Raw(b"null"))
        return bytes(model) == b"null" or msgspec.json.decode(model) in servers.names() | set(self._door.model.names)

    async def _rendered(self, request: Request, fields: Fields, deadline_s: float) -> list[Rendered]:
        return await self._door.servers.rendered(request.url.path, fields, request.scope, deadline_s)

    async def passed(self, request: Request) -> Response:
        deadline_s = self._door.deadline_s()
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind.endswith(_JSON):
            body = msgspec.json.encode(without_transfer(await self._door.bodies.fields(request)))
        else:
            body = await self._door.bodies.raw(request)
        return await self._door.passed(request, body, deadline_s)

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": await self._cards(request)})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        for card in await self._cards(request):
            if card["id"] == name:
                return json_response(card)
        raise ApiError(404, f"the model {name!r} does not exist", code="model_not_found", param="model")

    async def _cards(self, request: Request) -> list[dict[str, Any]]:
        """Returns vLLM's cards of the models, each once, with what a client of ours looks for."""
        answer = await while_connected(
            request.receive,
            self._door.servers.asked("/v1/models", request.scope, self._door.deadline_s(), method="GET"),
        )
        try:
            cards = msgspec.json.decode(answer, type=dict[str, Any])["data"]
            by_name = {card["id"]: card for card in reversed(cards)}
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise ApiError(502, "the vLLM server's /v1/models has no list of models", code="bad_models") from error
        own = {"owned_by": "dualpath", "cluster": self._door.model.cluster}
        return [card | own for card in reversed(by_name.values())]
