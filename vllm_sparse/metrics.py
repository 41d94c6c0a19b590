"""Prometheus metrics of the worker processes and the way they reach the server's ``/metrics``.

vLLM serves the API server's registry, which workers cannot reach. The API server therefore makes a private directory
for prometheus_client's multi-process files before it starts the engine (`announce_directory`), workers write there
(`WorkerMetrics`), and the API server merges it back (`vllm_sparse.server.collector`). Where vLLM itself runs several
API servers it has set such a directory up already, and that one is used.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import prometheus_client
import torch

if TYPE_CHECKING:
    from vllm_sparse.backend.plan import RowSpan

# Handed to child processes through the environment, not meant to be set by users.
DIRECTORY_VARIABLE = "SPARSE_METRICS_DIRECTORY"
PROMETHEUS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

# Below vLLM's own name, so that its logging configuration applies.
logger = logging.getLogger("vllm.sparse")

FALLBACK_REASONS = {
    "short_context": "its context is shorter than sparse_min_tokens, or no longer than what the method reads",
    "short_chunk": "the chunk holds fewer tokens than the method needs",
    "no_room": "other requests of the step left no room to score its cached tokens",
    "speculative": "verification steps of speculative decoding are not supported yet",
}

DENSITY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)


def announce_directory() -> None:
    """In the API server, before the engine starts: make the directory that its children write metrics to."""
    if PROMETHEUS_VARIABLE in os.environ or DIRECTORY_VARIABLE in os.environ:
        return
    directory = tempfile.mkdtemp(prefix="vllm-sparse-metrics-")
    os.environ[DIRECTORY_VARIABLE] = directory
    owner = os.getpid()
    _announcers.append(owner)

    def remove() -> None:
        # A forked child inherits this hook; the directory is not its own.
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)


# The process that announced, whose own metrics need no files. A forked child inherits the entry under another pid.
_announcers: list[int] = []


def _write_to_announced_directory() -> None:
    """In a worker, before its first metric: switch this process to multi-process files."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None or os.getpid() in _announcers or PROMETHEUS_VARIABLE in os.environ:
        return
    os.environ[PROMETHEUS_VARIABLE] = directory
    prometheus_client.values.ValueClass = prometheus_client.values.MultiProcessValue()  # type: ignore[no-untyped-call]


@dataclass
class RowDensity:
    """Kept over candidate KV tokens of one row's step, summed over its sparse layers; kept counts stay on the device.

    Attributes:
        phase: ``prefill`` or ``decode``.
        method: name of the method.
        kept: tokens read, one scalar a layer.
        candidates: tokens in reach, of all layers.
    """

    phase: str
    method: str
    kept: list[torch.Tensor] = field(default_factory=list)
    candidates: int = 0

    def add(self, kept_tokens: torch.Tensor, span: RowSpan, query_block_tokens: int, list_heads: int) -> None:
        """Count one layer.

        Args:
            kept_tokens: int32 ``[rows]``.
            span: the request's place in the step.
            query_block_tokens: query tokens that share a list.
            list_heads: heads that have a list of their own, one row per query block.
        """
        self.kept.append(kept_tokens.sum())
        first = span.context_tokens - span.query_tokens + query_block_tokens
        row_contexts = [*range(first, span.context_tokens, query_block_tokens), span.context_tokens]
        self.candidates += list_heads * sum(row_contexts)


class WorkerMetrics:
    """Metrics of one worker. Ranks other than the first of a tensor-parallel group record nothing: they run the same
    rows."""

    _instance: WorkerMetrics | None = None

    def __init__(self, recording: bool) -> None:
        self._recording = recording
        self._pending: list[tuple[torch.cuda.Event, torch.Tensor, list[RowDensity]]] = []
        self._logged: set[tuple[str, str, str]] = set()
        if not recording:
            return
        _write_to_announced_directory()
        self._density = prometheus_client.Histogram(
            "vllm_sparse_density_ratio",
            "KV tokens read over KV tokens in reach, in the layers that a method makes sparse; one observation per "
            "prefill chunk or decode step of a request.",
            ["phase", "method"],
            buckets=DENSITY_BUCKETS,
        )
        self._buffer_bytes = prometheus_client.Gauge(
            "vllm_sparse_decode_buffer_bytes",
            "Device memory that is kept for decode steps beside the KV cache, of one rank.",
            multiprocess_mode="livemostrecent",
        )
        self._fallbacks = prometheus_client.Counter(
            "vllm_sparse_fallbacks",
            "Prefill chunks and decode steps of requests that asked for a sparse method and ran dense.",
            ["phase", "method", "reason"],
        )

    @classmethod
    def get(cls) -> WorkerMetrics:
        """The metrics of this process, made on first use."""
        if cls._instance is None:
            from vllm.distributed import get_tensor_model_parallel_rank

            cls._instance = cls(recording=get_tensor_model_parallel_rank() == 0)
        return cls._instance

    def set_buffer_bytes(self, size_bytes: int) -> None:
        """Device memory kept for decode steps."""
        if self._recording:
            self._buffer_bytes.set(size_bytes)

    def observe_density(self, phase: str, method: str, density: float) -> None:
        """One row's density in one step, 0 to 1, where the host knows it."""
        if self._recording:
            self._density.labels(phase, method).observe(density)

    def count_fallback(self, phase: str, method: str, reason: str) -> None:
        """A row that asked for `method` and runs dense; `reason` is a key of `FALLBACK_REASONS`."""
        if not self._recording:
            return
        self._fallbacks.labels(phase, method, reason).inc()
        if (phase, method, reason) not in self._logged:
            self._logged.add((phase, method, reason))
            logger.info(
                "A request that asked for %s in %s ran a step dense: %s. Logged once; "
                'vllm_sparse_fallbacks_total{reason="%s"} counts them.',
                method,
                "its prefill" if phase == "prefill" else "decoding",
                FALLBACK_REASONS[reason],
                reason,
            )

    def finish_step(self, densities: list[RowDensity]) -> None:
        """All layers of the step are queued: fetch the rows' kept counts without waiting for the device."""
        densities = [density for density in densities if density.kept]
        if not densities or not self._recording:
            return
        kept = torch.stack([torch.stack(density.kept).sum() for density in densities])
        if not kept.is_cuda:
            self._observe(kept, densities)
            return
        host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
        host.copy_(kept, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((event, host, densities))

    def collect_finished(self) -> None:
        """Observe the rows whose counts have arrived; called once a step."""
        while self._pending and self._pending[0][0].query():  # type: ignore[no-untyped-call]
            _, host, densities = self._pending.pop(0)
            self._observe(host, densities)

    def _observe(self, kept: torch.Tensor, densities: list[RowDensity]) -> None:
        for density, tokens in zip(densities, kept.tolist(), strict=True):
            self._density.labels(density.phase, density.method).observe(tokens / density.candidates)
