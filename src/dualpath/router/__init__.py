"""The OpenAI API of a cluster of vLLM servers: requests pass through, our placement between. Start with `app.py`.

The names below are imported when they are first used, as those of `dualpath.server`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualpath.router.app import create_router

__all__ = ["create_router"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dualpath.router' has no attribute {name!r}")
    from dualpath.router import app

    return getattr(app, name)
