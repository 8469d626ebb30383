"""SIGTERM ends a run as Ctrl-C does: what it holds is given back, what it wrote is whole."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

Value = TypeVar("Value")


async def until_terminated(work: Coroutine[Any, Any, Value]) -> Value:
    """`work`'s result. A signal cancels it and raises KeyboardInterrupt."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
