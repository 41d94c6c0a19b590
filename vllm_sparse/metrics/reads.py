"""What sparse rows read of what was in reach: densities, bytes, and late densities of each layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import prometheus_client

from vllm_sparse.metrics.density import Geometry, RecentDensity, RowDensity
from vllm_sparse.metrics.histogram import observe_all
from vllm_sparse.step.roles import reading_layers

if TYPE_CHECKING:
    from vllm_sparse.step.plan import BatchRow, DenseStepRow
    from vllm_sparse.step.requests import RowSetting

DENSITY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
LABELS = ["model_name", "phase", "method"]


@dataclass(frozen=True)
class _MethodReads:
    """Prometheus metrics of one phase and method."""

    density: prometheus_client.Histogram
    read_bytes: prometheus_client.Counter
    saved_bytes: prometheus_client.Counter


class _ReadCounters:
    """Prometheus metrics of all phases and methods."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._density = prometheus_client.Histogram(
            "vllm_sparse_density_ratio",
            "KV tokens read over KV tokens in reach, in the layers that a method makes sparse; one observation per "
            "prefill chunk or decode step of a request.",
            LABELS,
            buckets=DENSITY_BUCKETS,
        )
        self._read = prometheus_client.Counter(
            "vllm_sparse_kv_read_bytes",
            "KV-cache bytes that sparse prefill chunks and decode steps of one rank read, in all layers: of each query "
            "block and head that has a list, the list, and the whole context in dense layers.",
            LABELS,
        )
        self._saved = prometheus_client.Counter(
            "vllm_sparse_kv_saved_bytes",
            "KV-cache bytes in reach of the same chunks and steps that they did not read.",
            LABELS,
        )
        self._of_methods: dict[tuple[str, str], _MethodReads] = {}

    def of(self, phase: str, method: str) -> _MethodReads:
        """What is counted in every step; looking labels up takes longer than counting."""
        found = self._of_methods.get((phase, method))
        if found is None:
            key = self._model_name, phase, method
            found = _MethodReads(self._density.labels(*key), self._read.labels(*key), self._saved.labels(*key))
            self._of_methods[phase, method] = found
        return found


class ReadMetrics:
    """What rows read.

    Args:
        recording: in Prometheus metrics too; other ranks than the first of a tensor-parallel group keep late densities
            of their own heads only.
        model_name: label of the metrics, as of vLLM's own.
        counts_rows: in these metrics; other stages of a pipeline than the last count bytes of their layers only.
    """

    def __init__(self, recording: bool, model_name: str, counts_rows: bool = True) -> None:
        self._counts_rows = recording and counts_rows
        self._counters = _ReadCounters(model_name) if recording else None
        self._geometry: Geometry | None = None
        self._recent: RecentDensity | None = None

    def start_serving(self, geometry: Geometry) -> None:
        """The model is there; before that neither bytes nor late densities are counted."""
        if geometry != self._geometry:
            self._geometry, self._recent = geometry, RecentDensity(geometry)

    @property
    def layers(self) -> range:
        """Numbers of the attention layers of this process; none before the model is there."""
        return range(0) if self._geometry is None else self._geometry.layers

    def recent(self) -> dict[str, Any]:
        """Densities of late rows in each layer and query head, as JSON."""
        return {} if self._recent is None else self._recent.as_json()

    def observe_lists(self, kept: np.ndarray, densities: Sequence[RowDensity]) -> None:
        """Rows whose lists were counted on the device.

        Args:
            kept: int32, the rows' `RowDensity.kept` one after the other, on the host.
            densities: of the rows.
        """
        start = 0
        for row in densities:
            tokens = row.kept_by_head(kept[start : start + row.numbers])
            start += row.numbers
            kept_tokens, reach = int(tokens.sum()), row.candidates * tokens.size
            self._observe_densities(row.phase, row.method, [kept_tokens / reach])
            if self._geometry is not None:
                all_layers = row.candidates * row.list_heads * len(self._geometry.layers)
                self._count_bytes(row.phase, row.method, all_layers, reach - kept_tokens)
            if self._recent is not None:
                self._recent.observe(row.phase, row.method, row.layers, tokens / row.candidates)

    def observe_batch(self, batch: Sequence[BatchRow]) -> None:
        """Decode rows that are served at once, whose lists' lengths the host knows (`WorkerMetrics.observe_batch`)."""
        # Requests of equal settings share their method and roles, and one cannot afford to compare settings.
        groups: dict[tuple[int, int], tuple[RowSetting, list[int]]] = {}
        for row in batch:
            setting = row.setting
            key = id(setting.method), id(setting.roles)
            group = groups.get(key)
            if group is None:
                groups[key] = setting, [row.span.seq_len]
            else:
                group[1].append(row.span.seq_len)
        for setting, seq_lens in groups.values():
            assert setting.method is not None
            name, reach = setting.method.name, np.array(seq_lens)
            kept = setting.method.list_tokens(reach)
            densities = (kept / reach).tolist()
            layers = reading_layers(setting.roles)
            self._observe_densities("decode", name, densities)
            if self._geometry is None:
                continue
            reach_tokens = sum(seq_lens)
            saved_tokens = (reach_tokens - sum(kept.tolist())) * len(layers)
            all_tokens, kv_heads = reach_tokens * len(self._geometry.layers), self._geometry.kv_heads
            self._count_bytes("decode", name, all_tokens * kv_heads, saved_tokens * kv_heads)
            if self._recent is not None:
                self._recent.observe_alike("decode", name, layers, sum(densities) / len(seq_lens))

    def observe_dense_steps(self, rows: Sequence[DenseStepRow]) -> None:
        """Decode rows that read everything because their settings ask for it; with them the densities of a method are
        those of all its steps.
        """
        for row in rows:
            name = row.method.name
            self._observe_densities("decode", name, [1.0])
            if self._geometry is not None:
                tokens = row.span.seq_len * len(self._geometry.layers) * self._geometry.kv_heads
                self._count_bytes("decode", name, tokens, saved_tokens=0)
            if self._recent is not None:
                self._recent.observe_alike("decode", name, reading_layers(row.roles), 1.0)

    def _observe_densities(self, phase: str, method: str, densities: Sequence[float]) -> None:
        if self._counters is not None and self._counts_rows:
            observe_all(self._counters.of(phase, method).density, densities)

    def _count_bytes(self, phase: str, method: str, reach_tokens: int, saved_tokens: int) -> None:
        if self._counters is None or self._geometry is None:
            return
        counters, token_bytes = self._counters.of(phase, method), self._geometry.token_bytes
        counters.read_bytes.inc((reach_tokens - saved_tokens) * token_bytes)
        counters.saved_bytes.inc(saved_tokens * token_bytes)
