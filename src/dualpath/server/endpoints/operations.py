"""What operators, their monitors and orchestrators ask. Answered without a key. `server.front` answers before.

``/livez``: the process answers. ``/ready``: send it requests. ``/health`` and SageMaker's ``/ping``: it can serve.
"""

from starlette.requests import Request
from starlette.responses import Response

from dualpath import __version__
from dualpath.server.door import Door, Route, json_response


def routes(service: Door) -> list[Route]:
    async def health(_request: Request) -> Response:
        facts = service.generator.health()
        return json_response(facts, 503 if facts["status"] == "unavailable" else 200)

    async def ready(request: Request) -> Response:
        if service.drain.begun:
            return json_response({"status": "draining"}, 503)
        return await health(request)

    async def livez(_request: Request) -> Response:
        return json_response({"status": "alive"})

    async def metrics(_request: Request) -> Response:
        text = service.metrics.exposition(service.generator.gauges())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(_request: Request) -> Response:
        return json_response({"version": __version__})

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/ping", health, ("GET", "POST")),
        Route("/livez", livez),
        Route("/metrics", metrics),
        Route("/version", version),
    ]
