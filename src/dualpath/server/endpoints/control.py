"""For trainers: pause, abort, other weights, an empty prefix cache, sleep; under vLLM's names and SGLang's.

What changes how the cluster serves is closed unless the operator opens it (`--enable-control`). Docs:
docs/how-to/rollouts.md.
"""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from typing import Any, Literal, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dualpath.cluster.generator import Control, GenerateRequest, Inflight, Memory, RequestError
from dualpath.server.door import Door, Route, json_response
from dualpath.server.errors import ApiError, bad_parameter
from dualpath.spec.loopback import is_loopback
from dualpath.spec.sampling import SamplingParams

_VERSION = re.compile(r'[^"\\\x00-\x1f\x7f]{1,128}')
_HEALTH_S = 20.0
_MEMORY: tuple[Memory, ...] = get_args(Memory)
_INFLIGHT: tuple[Inflight, ...] = get_args(Inflight)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_SGLANG_MODES: dict[str, Inflight] = {"abort": "abort", "retract": "keep", "in_place": "keep"}
_FROM_PATH = 'weights come from a folder here: POST /update_weights with {"model_path": DIR}'
_ELSEWHERE = {
    **dict.fromkeys(("/init_weight_transfer_engine", "/start_weight_update", "/finish_weight_update"), _FROM_PATH),
    **dict.fromkeys(("/init_weights_update_group", "/update_weights_from_distributed"), _FROM_PATH),
    **dict.fromkeys(("/update_weights_from_tensor", "/update_weights_from_ipc", "/collective_rpc"), _FROM_PATH),
    **dict.fromkeys(("/init_communicator", "/update_named_param", "/init_broadcaster"), _FROM_PATH),
    **dict.fromkeys(
        ("/load_lora_adapter", "/v1/load_lora_adapter"), "adapters are not served; merge the adapter, and " + _FROM_PATH
    ),
}
"""Endpoints of others that can't be had here, and what to do instead."""


class UpdateWeights(msgspec.Struct, kw_only=True):
    """Body of /update_weights and /update_weights_from_disk: a folder under one of the names that trainers use."""

    model_path: str | None = None
    weight_dir: str | None = None
    update_info: "UpdateWeights | None" = None
    weight_version: str | None = None
    mode: Inflight | None = None
    abort_all_requests: bool | None = None
    flush_cache: bool | None = None
    keep_pause: bool | None = None
    load_format: Literal["auto", "safetensors"] | None = None


class AbortRequests(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of /abort_requests (vLLM) and /abort_request (SGLang). A misspelt field must not abort everything."""

    request_ids: list[str] | None = None
    """None: all requests; an empty list: none of them."""
    rid: str | None = None
    abort_all: bool | None = None


class Pause(msgspec.Struct, kw_only=True):
    """Body of /pause. vLLM has these in the query; the query wins."""

    mode: Inflight | None = None
    wait_for_inflight_requests: bool | None = None


class PauseGeneration(msgspec.Struct, kw_only=True):
    mode: Literal["abort", "retract", "in_place"] | None = None


class Tags(msgspec.Struct, kw_only=True):
    tags: list[Memory] | None = None


def routes(service: Door) -> list[Route]:
    api = _Control(service)
    changes: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/pause": api.pause,
        "/resume": api.resume,
        "/abort_requests": api.abort_requests,
        "/update_weights": api.update_weights,
        "/reset_prefix_cache": api.reset_prefix_cache,
        "/sleep": api.sleep,
        "/wake_up": api.wake_up,
        "/pause_generation": api.pause_generation,
        "/continue_generation": api.resume,
        "/abort_request": api.abort_request,
        "/update_weights_from_disk": api.update_weights_from_disk,
        "/release_memory_occupation": api.release_memory,
        "/resume_memory_occupation": api.resume_memory,
        **dict.fromkeys(_ELSEWHERE, api.not_here),
    }
    tells = {"/is_paused": api.is_paused, "/is_sleeping": api.is_sleeping, "/health_generate": api.health_generate}
    tells |= dict.fromkeys(("/weight_info", "/get_weight_version"), api.weight_version)
    tells |= dict.fromkeys(("/model_info", "/get_model_info"), api.model_info)
    tells |= dict.fromkeys(("/server_info", "/get_server_info"), api.server_info) | {"/v1/loads": api.loads}
    guarded = [Route(path, api.guarded(endpoint), ("POST",)) for path, endpoint in changes.items()]
    flush = Route("/flush_cache", api.guarded(api.reset_prefix_cache), ("GET", "POST"))
    return [*guarded, flush, *(Route(path, endpoint) for path, endpoint in tells.items())]


class _Control:
    def __init__(self, service: Door) -> None:
        self._service = service

    @property
    def _control(self) -> Control:
        return self._service.generator.control

    def guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            who = self._service.who_controls
            if who == "nobody":
                raise ApiError(
                    403, "trainers' endpoints are closed; start with --enable-control", code="control_closed"
                )
            at = request.client.host if request.client else ""
            if who == "this host" and not (is_loopback(at) and _is_no_page(request)):
                what = (
                    "without API keys only programs of this host may use trainers' endpoints, at its own address and "
                    "not from a web page; start with --api-key"
                )
                raise ApiError(403, what, code="control_closed")
            return await endpoint(request)

        return checked

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def pause(self, request: Request) -> Response:
        asked = await self._service.optional_body(request, Pause)
        mode = _inflight(request, asked.mode or "abort")
        await self._control.pause("wait" if _waits(request) or asked.wait_for_inflight_requests else mode)
        # vLLM empties the cache on request; here KV is named by its weights, so it stays right and is kept.
        return json_response({"status": "paused"})

    async def pause_generation(self, request: Request) -> Response:
        asked = await self._service.optional_body(request, PauseGeneration)
        await self._control.pause(_SGLANG_MODES[asked.mode or "abort"])
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, _request: Request) -> Response:
        await self._control.resume()
        return json_response({"status": "resumed"})

    async def abort_requests(self, request: Request) -> Response:
        asked = await self._service.optional_body(request, AbortRequests)
        return json_response({"status": "aborted", "aborted": self._control.abort(asked.request_ids)})

    async def abort_request(self, request: Request) -> Response:
        asked = await self._service.optional_body(request, AbortRequests)
        if not asked.abort_all and not asked.rid:
            raise bad_parameter("rid", "give a request's rid, or abort_all: true")
        chosen = None if asked.abort_all else (asked.rid or "",)
        return json_response({"aborted": self._control.abort(chosen)})

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def update_weights(self, request: Request) -> Response:
        asked = await self._service.optional_body(request, UpdateWeights)
        version = await self._update(asked)
        return json_response({"message": "Weights updated", "status": "ok", "weight_version": version})

    async def update_weights_from_disk(self, request: Request) -> Response:
        asked = await self._service.optional_body(request, UpdateWeights)
        try:
            await self._update(asked)
        except (ApiError, RequestError) as failure:
            error = self._service.error_of(request, failure)
            return json_response({"success": False, "message": error.message, "num_paused_requests": 0}, error.status)
        return json_response(
            {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
        )

    async def _update(self, asked: UpdateWeights) -> str:
        given = asked.update_info or asked
        path = given.model_path or given.weight_dir
        if not path:
            raise bad_parameter("model_path", "no folder is given: set model_path, or weight_dir")
        version = asked.weight_version or given.weight_version or path.rstrip("/").rpartition("/")[2]
        if not _VERSION.fullmatch(version):
            raise bad_parameter("weight_version", "weight_version must be 1 to 128 characters, no quotes among them")
        if asked.keep_pause:
            await self._control.pause("abort" if asked.abort_all_requests else "wait")
        inflight: Inflight = "abort" if asked.abort_all_requests else asked.mode or given.mode or "wait"
        await self._control.update_weights(path, version, inflight)
        return version

    async def reset_prefix_cache(self, _request: Request) -> Response:
        await self._control.reset_prefix_cache()
        return json_response({"status": "ok", "message": "Cache flushed."})

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def sleep(self, request: Request) -> Response:
        level = request.query_params.get("level", "1")
        if level not in ("1", "2"):
            raise bad_parameter("level", f"level is {level!r}; it must be 1 or 2")
        await self._control.sleep(_query_tags(request), level == "1", _inflight(request))
        return Response(status_code=200)

    async def wake_up(self, request: Request) -> Response:
        await self._control.wake(_query_tags(request))
        return Response(status_code=200)

    async def release_memory(self, request: Request) -> Response:
        asked = await self._service.optional_body(request, Tags)
        await self._control.sleep(asked.tags or _MEMORY, True, "wait")
        return json_response({})

    async def resume_memory(self, request: Request) -> Response:
        asked = await self._service.optional_body(request, Tags)
        await self._control.wake(asked.tags or _MEMORY)
        return json_response({})

    async def not_here(self, request: Request) -> Response:
        raise ApiError(400, f"{request.url.path}: {_ELSEWHERE[request.url.path]}", code="unsupported_endpoint")

    # ── what is open to all ─────────────────────────────────────────────────────────────────────────────────────────

    async def is_paused(self, _request: Request) -> Response:
        return json_response({"is_paused": self._control.paused})

    async def is_sleeping(self, _request: Request) -> Response:
        return json_response({"is_sleeping": bool(self._control.sleeping)})

    async def weight_version(self, _request: Request) -> Response:
        return json_response({"weight_version": self._service.generator.model.weight_version})

    async def model_info(self, _request: Request) -> Response:
        return json_response(self._facts())

    async def server_info(self, _request: Request) -> Response:
        model = self._service.generator.model
        return json_response(
            self._facts() | {"served_model_name": model.name, "context_length": model.max_model_len_tokens}
        )

    async def loads(self, _request: Request) -> Response:
        load = {"num_reqs": self._control.requests}
        return json_response({"loads": [load], "aggregate": {"total_reqs": load["num_reqs"]}})

    async def health_generate(self, _request: Request) -> Response:
        """200 when a token can be generated, or generation is paused on purpose."""
        if not self._control.paused:
            asked = GenerateRequest(prompt_token_ids=[0], sampling=SamplingParams(max_tokens=1, temperature=0.0))
            try:
                async with (
                    asyncio.timeout(_HEALTH_S),
                    contextlib.aclosing(self._service.generator.generate(asked)) as steps,
                ):
                    async for _step in steps:
                        pass
            except TimeoutError:
                raise ApiError(503, f"no token came within {_HEALTH_S:g} s", code="not_healthy") from None
        return Response(status_code=200)

    def _facts(self) -> dict[str, Any]:
        model = self._service.generator.model
        facts = {"model_path": model.path, "tokenizer_path": model.path, "is_generation": True}
        return facts | {"weight_version": model.weight_version}


def _is_no_page(request: Request) -> bool:
    """False for what a browser sends for a page of elsewhere, also one whose name was made to mean this host."""
    headers = request.headers
    host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
    if "origin" in headers or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    return is_loopback(host.strip("[]")) is True


def _waits(request: Request) -> bool:
    given = request.query_params.get("wait_for_inflight_requests", "false").lower()
    if given not in _BOOLEANS:
        raise bad_parameter(
            "wait_for_inflight_requests", f"wait_for_inflight_requests is {given!r}; give true or false"
        )
    return _BOOLEANS[given]


def _inflight(request: Request, default: str = "abort") -> Inflight:
    mode = request.query_params.get("mode", default)
    for known in _INFLIGHT:
        if mode == known:
            return known
    raise bad_parameter("mode", f"mode is {mode!r}; it must be one of {', '.join(_INFLIGHT)}")


def _query_tags(request: Request) -> tuple[Memory, ...]:
    tags = request.query_params.getlist("tags")
    unknown = [tag for tag in tags if tag not in _MEMORY]
    if unknown:
        raise bad_parameter("tags", f"tags has {unknown[0]!r}; it may have {' and '.join(_MEMORY)}")
    return tuple(tag for tag in _MEMORY if not tags or tag in tags)
