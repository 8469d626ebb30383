"""The application of the router, in the place that `server.create_app` has for a cluster of our own engines.

Theory of operation. vLLM itself renders a request once (`servers`): its prompts become token ids, and its mistakes are
answered in vLLM's words. Each choice then goes its own way (`choices`): the cluster brings the prompt's KV to a decode
engine, the client's own body is posted to that engine's server (`asked`), and the answer passes as it comes, with
`cached_tokens` put right (`reading`). Several choices become one answer (`merging`). What can't be routed goes straight
to a decode server (`passing`). `answering` connects these; `endpoints` says which endpoint is of which kind.
"""

import os
from collections.abc import Collection

from fastapi import FastAPI

from dualpath.router.answering import RouterDoor, RoutingCluster
from dualpath.router.endpoints import routes
from dualpath.router.upstream import RefusalError, Upstream
from dualpath.server.door import assembled
from dualpath.server.drain import Drain
from dualpath.server.endpoints import operations
from dualpath.server.limits import ServerLimits

API_KEY = "VLLM_API_KEY"
"""The environment's variable with the key of the vLLM servers, as they read it themselves."""


def create_router(
    cluster: RoutingCluster,
    *,
    api_keys: Collection[str] = (),
    limits: ServerLimits | None = None,
    drain: Drain | None = None,
    deadline_s: float = 300.0,
    enable_control: bool = False,
) -> FastAPI:
    """Returns the application. No `api_keys`: open to all. `deadline_s`: how long one request may take.

    Raises ValueError for an empty key, and for `enable_control`, which vLLM servers have not.
    """
    if enable_control:
        raise ValueError("trainers' endpoints are not available for vLLM servers; start without --enable-control")
    limits = limits or ServerLimits()
    upstream = Upstream(limits, os.environ.get(API_KEY, ""))
    door = RouterDoor(cluster, limits, drain or Drain(), upstream, deadline_s)
    app = assembled(door, [*routes(door), *operations.routes(door)], api_keys, upstream.close)
    app.add_exception_handler(RefusalError, door.refusal)
    return app
