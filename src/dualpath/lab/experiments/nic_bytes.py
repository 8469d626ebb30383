"""Reads from /metrics how many bytes each node's storage NIC received: now, when settled, or over time."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from prometheus_client.parser import text_string_to_metric_families

from dualpath.results.file import SnicSample
from dualpath.spec.metrics import NIC_BYTES

SERIES = NIC_BYTES.name
PREFIX = {"prefill": "PE", "decode": "DE"}
SAMPLE_S = 0.25
SETTLE_S = 0.6
"""Longer than the engines' reporting interval: two equal readings this far apart mean that nothing moves any more."""
MAX_SETTLE_S = 20.0
TIMEOUT_S = 10.0


class MetricsError(Exception):
    """/metrics can't be read, or lacks the series."""


class NicBytes:
    """Bytes by (engine, NIC, direction), summed over traffic classes."""

    def __init__(self, text: str) -> None:
        self._bytes: dict[tuple[int, str, str], int] = {}
        self._roles: dict[int, str] = {}
        self._nodes: dict[int, str] = {}
        # The parser is slow and runs four times a second beside the measured cluster, so nothing else is parsed.
        lines = [line for line in text.splitlines(keepends=True) if line.startswith(SERIES)]
        for family in text_string_to_metric_families("".join(lines)):
            for sample in family.samples:
                self._add(sample.labels, sample.value)
        if not self._bytes:
            raise MetricsError(f"/metrics has no {SERIES}; is this a dualpath cluster?")

    def _add(self, labels: dict[str, str], n_bytes: float) -> None:
        engine = int(labels["engine"])
        key = (engine, labels["nic"], labels["direction"])
        self._roles[engine] = labels["role"]
        self._nodes[engine] = labels.get("node") or str(engine)
        self._bytes[key] = self._bytes.get(key, 0) + int(n_bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NicBytes) and self._bytes == other._bytes

    def snic_received_since(self, before: "NicBytes") -> dict[str, int]:
        """Returns bytes by node: ``PE0``, ``PE1``, …, then ``DE0``, …, in order of their first engine's id.

        What the engines of a node read has passed its one SNIC.
        """
        received: dict[str, int] = {}
        for role in ("prefill", "decode"):
            names: dict[str, str] = {}
            for engine in sorted(engine for engine, its_role in self._roles.items() if its_role == role):
                name = names.setdefault(self._nodes[engine], f"{PREFIX[role]}{len(names)}")
                key = (engine, "snic", "rx")
                n_bytes = self._bytes.get(key, 0) - before._bytes.get(key, 0)
                received[name] = received.get(name, 0) + n_bytes
        return received


class NicMeter:
    """Reads one cluster's /metrics."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._metrics = f"{url.rstrip('/').removesuffix('/v1')}/metrics"

    async def read(self) -> NicBytes:
        """Returns the bytes now. Raises MetricsError."""
        try:
            response = await self._client.get(self._metrics)
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise MetricsError(f"{self._metrics} can't be read: {error or type(error).__name__}") from error
        return NicBytes(response.text)

    async def settled(self) -> NicBytes:
        """Returns the bytes once work under way, such as persisting blocks, is done; after MAX_SETTLE_S in any case."""
        before = await self.read()
        for _ in range(round(MAX_SETTLE_S / SETTLE_S)):
            await asyncio.sleep(SETTLE_S)
            now = await self.read()
            if now == before:
                break
            before = now
        return before

    @asynccontextmanager
    async def sampling(self) -> AsyncIterator["Readings"]:
        """Takes readings every SAMPLE_S until the context is left.

        A reading that fails is left out; others notice a cluster that has died.
        """
        readings: Readings = []
        sampler = asyncio.create_task(self._sample(readings))
        try:
            yield readings
        finally:
            sampler.cancel()
            await asyncio.gather(sampler, return_exceptions=True)

    async def _sample(self, readings: "Readings") -> None:
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + SAMPLE_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            try:
                now = await self.read()
            except MetricsError:
                continue
            readings.append((time.monotonic(), now))


Readings = list[tuple[float, NicBytes]]
"""Readings, each with the monotonic clock's seconds."""


def snic_samples(readings: Readings, before: NicBytes, started_s: float) -> list[SnicSample]:
    """Returns bytes since `before`, with times from `started_s` on the monotonic clock; drops earlier readings."""
    return [
        SnicSample(at_s - started_s, now.snic_received_since(before)) for at_s, now in readings if at_s >= started_s
    ]


@asynccontextmanager
async def nic_meter(url: str) -> AsyncIterator[NicMeter]:
    """Yields a meter of the cluster whose server is at `url` (``/v1`` optional)."""
    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client:
        yield NicMeter(client, url)
