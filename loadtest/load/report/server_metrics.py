"""What the server's metrics say about a stretch of time."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Reading = Mapping[str, Any]

DENSITY = "vllm_sparse_density_ratio"
FALLBACKS = "vllm_sparse_fallbacks_total"

# Name in the report, the metric, and what it is divided by for its unit.
SERIES = (
    ("Requests running", "vllm:num_requests_running", 1.0),
    ("Requests waiting", "vllm:num_requests_waiting", 1.0),
    ("KV cache used, %", "vllm:kv_cache_usage_perc", 0.01),
    ("API server's memory, GiB", "process_resident_memory_bytes", 2.0**30),
    ("KV cache not read, GiB since the server started", "vllm_sparse_kv_saved_bytes_total", 2.0**30),
    ("Buffers of sparse decoding, GiB", "vllm_sparse_decode_buffer_bytes", 2.0**30),
)


def series_of(metrics: Iterable[Reading], start_seconds: float, end_seconds: float) -> list[Reading]:
    """Readings of a stretch of time, with the last one before it and the first one after it."""
    readings = sorted((one for one in metrics if "samples" in one), key=lambda one: one["seconds"])
    before = [one for one in readings if one["seconds"] <= start_seconds][-1:]
    within = [one for one in readings if start_seconds < one["seconds"] < end_seconds]
    after = [one for one in readings if one["seconds"] >= end_seconds][:1]
    return before + within + after


def total(reading: Reading, name: str, **labels: str) -> float | None:
    """Sum of a metric's samples with these labels; none if it has no samples at all."""
    samples = [one for one in reading["samples"] if one["name"] == name]
    chosen = [one["value"] for one in samples if labels.items() <= one["labels"].items()]
    return sum(chosen) if samples else None


def _keys(reading: Reading, name: str) -> list[tuple[str, str]]:
    pairs = [(one["labels"]["phase"], one["labels"]["method"]) for one in reading["samples"] if one["name"] == name]
    return list(dict.fromkeys(pairs))


def _growth(readings: Sequence[Reading], name: str, **labels: str) -> float:
    """How much a counter grew; one that a restarted server began anew counts from zero."""
    values = [total(one, name, **labels) or 0.0 for one in readings]
    return sum(after - before if after >= before else after for before, after in itertools.pairwise(values))


def density(readings: Sequence[Reading]) -> dict[str, float]:
    """Mean density by ``phase/method`` of what ran during the readings."""
    found = {}
    for phase, method in _keys(readings[-1], f"{DENSITY}_count") if readings else ():
        count = _growth(readings, f"{DENSITY}_count", phase=phase, method=method)
        if count:
            found[f"{phase}/{method}"] = _growth(readings, f"{DENSITY}_sum", phase=phase, method=method) / count
    return found


def fallback_share(readings: Sequence[Reading]) -> dict[str, float]:
    """Share of chunks and decode steps that asked for a method and ran dense, by ``phase/method``."""
    found = {}
    keys = [key for name in (f"{DENSITY}_count", FALLBACKS) for key in (_keys(readings[-1], name) if readings else ())]
    for phase, method in dict.fromkeys(keys):
        dense = _growth(readings, FALLBACKS, phase=phase, method=method)
        sparse = _growth(readings, f"{DENSITY}_count", phase=phase, method=method)
        if dense + sparse:
            found[f"{phase}/{method}"] = dense / (dense + sparse)
    return found


def fallbacks(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """Fallbacks during the readings: ``phase``, ``method``, ``reason``, ``count``."""
    labels: dict[tuple[str, str, str], None] = {}
    for one in readings[-1]["samples"] if readings else ():
        if one["name"] == FALLBACKS:
            labels[one["labels"]["phase"], one["labels"]["method"], one["labels"]["reason"]] = None
    counts = [
        {"phase": phase, "method": method, "reason": reason, "count": count}
        for phase, method, reason in labels
        if (count := _growth(readings, FALLBACKS, phase=phase, method=method, reason=reason))
    ]
    return sorted(counts, key=lambda one: -one["count"])


def time_series(metrics: Sequence[Reading]) -> dict[str, list[tuple[float, float]] | None]:
    """Each of `SERIES` as (seconds, value); none where the server does not have the metric."""
    found: dict[str, list[tuple[float, float]] | None] = {}
    for label, name, unit in SERIES:
        points = [
            (one["seconds"], value / unit)
            for one in metrics
            if "samples" in one and (value := total(one, name)) is not None
        ]
        found[label] = points or None
    return found


def density_series(metrics: Sequence[Reading]) -> dict[str, list[tuple[float, float]]]:
    """Density of what ran between two readings, by ``phase/method``."""
    readings = [one for one in metrics if "samples" in one]
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for before, after in itertools.pairwise(readings):
        for key, value in density([before, after]).items():
            found[key].append((after["seconds"], value))
    return found
