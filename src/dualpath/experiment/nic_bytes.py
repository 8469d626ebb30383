"""Bytes that each engine's storage NIC received, from a cluster's /metrics."""

import asyncio

import httpx
from prometheus_client.parser import text_string_to_metric_families

SERIES = "dualpath_nic_bytes_total"
PREFIX = {"prefill": "PE", "decode": "DE"}
SETTLE_S = 0.6
"""Longer than the engines' reporting interval: two equal readings this far apart mean that nothing moves any more."""
MAX_SETTLE_S = 20.0


class MetricsError(Exception):
    """/metrics that can't be read, or lacks the series."""


class NicBytes:
    """Bytes by (engine, NIC, direction), summed over traffic classes."""

    def __init__(self, text: str) -> None:
        self._bytes: dict[tuple[int, str, str], int] = {}
        self._roles: dict[int, str] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == SERIES:
                    self._add(sample.labels, sample.value)
        if not self._bytes:
            raise MetricsError(f"/metrics has no {SERIES}; is this a dualpath cluster?")

    def _add(self, labels: dict[str, str], n_bytes: float) -> None:
        engine = int(labels["engine"])
        key = (engine, labels["nic"], labels["direction"])
        self._roles[engine] = labels["role"]
        self._bytes[key] = self._bytes.get(key, 0) + int(n_bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NicBytes) and self._bytes == other._bytes

    def snic_received_since(self, before: "NicBytes") -> dict[str, int]:
        """Bytes by engine name: ``PE0``, ``PE1``, …, then ``DE0``, …, numbered within their role by engine id."""
        received: dict[str, int] = {}
        for role in ("prefill", "decode"):
            engines = sorted(engine for engine, its_role in self._roles.items() if its_role == role)
            for rank, engine in enumerate(engines):
                key = (engine, "snic", "rx")
                received[f"{PREFIX[role]}{rank}"] = self._bytes.get(key, 0) - before._bytes.get(key, 0)
        return received


async def read_nic_bytes(url: str) -> NicBytes:
    """As they are now. Raises MetricsError."""
    root = url.rstrip("/").removesuffix("/v1")
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=10.0) as client:
            response = await client.get(f"{root}/metrics")
            response.raise_for_status()
    except httpx.HTTPError as error:
        raise MetricsError(f"{root}/metrics can't be read: {error or type(error).__name__}") from error
    return NicBytes(response.text)


async def settled_nic_bytes(url: str) -> NicBytes:
    """Once they stand still: what was under way, such as persisting blocks, is done. After MAX_SETTLE_S in any case."""
    before = await read_nic_bytes(url)
    for _ in range(round(MAX_SETTLE_S / SETTLE_S)):
        await asyncio.sleep(SETTLE_S)
        now = await read_nic_bytes(url)
        if now == before:
            break
        before = now
    return before
