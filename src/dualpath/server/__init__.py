"""The OpenAI-compatible server of a cluster (`cluster.generator.Generator`). Start with `app.py`.

The names below are imported when they are first used: `dualpath serve`'s supervisor has a listener and no HTTP.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualpath.server.app import create_app
    from dualpath.server.codec import load_tokenizer
    from dualpath.server.limits import ServerLimits
    from dualpath.server.listener import bind
    from dualpath.server.listening import serve

__all__ = ["ServerLimits", "bind", "create_app", "load_tokenizer", "serve"]

_HOMES = {
    "ServerLimits": "limits",
    "bind": "listener",
    "create_app": "app",
    "load_tokenizer": "codec",
    "serve": "listening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dualpath.server' has no attribute {name!r}")
    return getattr(import_module(f"dualpath.server.{_HOMES[name]}"), name)
