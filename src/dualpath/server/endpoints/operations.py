"""What operators and their monitors ask."""

from starlette.requests import Request
from starlette.responses import Response

from dualpath import __version__
from dualpath.server.service import Route, Service, json_response


def routes(service: Service) -> list[Route]:
    async def health(_request: Request) -> Response:
        facts = service.generator.health()
        return json_response(facts, 503 if facts["status"] == "unavailable" else 200)

    async def metrics(_request: Request) -> Response:
        text = service.metrics.exposition(service.generator.gauges())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(_request: Request) -> Response:
        return json_response({"version": __version__})

    return [Route("/health", health), Route("/metrics", metrics), Route("/version", version)]
