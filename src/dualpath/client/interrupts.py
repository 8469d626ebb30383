"""Makes SIGTERM end a run as Ctrl-C does: resources are given back, and written files are complete."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

Value = TypeVar("Value")


async def until_terminated(work: Coroutine[Any, Any, Value]) -> Value:
    """Returns `work`'s result. SIGTERM cancels it and raises KeyboardInterrupt."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
