"""What the client itself costs: a client that is late or busy measures itself, not the server."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

TICK_SECONDS = 0.05


class Overhead:
    """Watches this process during a stage."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = time.process_time()
        self._lags: list[float] = []
        self._in_flight = 0
        self._peak = 0

    async def watch(self) -> None:
        """Measure how late the event loop wakes, until cancelled."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK_SECONDS)
            self._lags.append(time.perf_counter() - before - TICK_SECONDS)

    def begin_request(self) -> None:
        """A request goes out."""
        self._in_flight += 1
        self._peak = max(self._peak, self._in_flight)

    def end_request(self) -> None:
        """A request has ended."""
        self._in_flight -= 1

    def report(self) -> dict[str, Any]:
        """``wall_seconds``, ``cpu_share`` of a core, ``loop_lag_seconds`` (mean, p99, most), ``peak_requests``."""
        wall = time.perf_counter() - self._wall
        lags = self._lags or [0.0]
        return {
            "wall_seconds": round(wall, 3),
            "cpu_share": round((time.process_time() - self._cpu) / wall, 4),
            "loop_lag_seconds": {
                "mean": round(sum(lags) / len(lags), 6),
                "p99": round(sorted(lags)[math.ceil(0.99 * len(lags)) - 1], 6),
                "most": round(max(lags), 6),
            },
            "peak_requests": self._peak,
        }
