"""How an engine leaves without a request being lost: it gets nothing new, ends what it has, and is dismissed."""

import asyncio

from dualpath.cluster import messages as m
from dualpath.cluster.coordinator.driver import SchedulerDriver
from dualpath.cluster.coordinator.links import EngineLinks

RETIRE_POLL_S = 0.02


async def retire(links: EngineLinks, driver: SchedulerDriver, ticket: str, patience_s: float) -> str:
    """Retire the member with that ticket. Returns why it could not be; it then goes on. Empty: it is dismissed."""
    members = [link for link in links.of_ticket(ticket) if link.engine is not None]
    if not members:
        return "it is no member of the cluster"
    (link,) = members
    engine = link.engine
    assert engine is not None
    driver.input(lambda s, now: s.engine_draining(now, engine, True))
    try:
        async with asyncio.timeout(patience_s):
            while driver.is_busy(engine):
                await asyncio.sleep(RETIRE_POLL_S)
    except TimeoutError:
        driver.input(lambda s, now: s.engine_draining(now, engine, False))
        return f"its requests did not end within {patience_s:g} s"
    link.retired = True
    links.send(engine, m.Shutdown("another takes its place"))
    return ""
