"""The server's own metrics while it is under load."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

# vLLM's and this project's metrics that the report shows; all of `PREFIX` is kept beside them.
PREFIX = "vllm_sparse_"
FAMILIES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "process_resident_memory_bytes",
)
REQUEST_SECONDS = 10.0


def parse(exposition: str) -> list[dict[str, Any]]:
    """The samples that matter, each with ``name``, ``labels`` and ``value``; histograms without their buckets,
    numbers only if they are finite.

    Args:
        exposition: text of ``/metrics``.
    """
    lines = [line for line in exposition.splitlines() if line.removeprefix("# TYPE ").startswith((PREFIX, *FAMILIES))]
    return [
        {"name": sample.name, "labels": dict(sample.labels), "value": sample.value}
        for family in text_string_to_metric_families("\n".join([*lines, ""]))
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created")) and math.isfinite(sample.value)
    ]


class Scraper:
    """Reads ``/metrics`` at intervals, and hands each reading on; a reading that fails says why.

    Args:
        http: connections.
        url: of the server, without a path.
        interval_seconds: between readings.
        clock: of all times.
        keep: takes a reading: ``seconds``, and ``samples`` or ``error``.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        interval_seconds: float,
        clock: Callable[[], float],
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._http = http
        self._url = url
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._keep = keep

    async def read(self) -> None:
        """One reading."""
        seconds = round(self._clock(), 3)
        try:
            timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
            async with self._http.get(f"{self._url}/metrics", timeout=timeout) as response:
                response.raise_for_status()
                text = await response.text()
            self._keep({"seconds": seconds, "samples": parse(text)})
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            self._keep({"seconds": seconds, "error": f"{type(error).__name__}: {error}"})

    async def run(self) -> None:
        """Readings until cancelled."""
        while True:
            await self.read()
            await asyncio.sleep(self._interval_seconds)
