"""Metrics of one worker: what its steps read, how well, how fast, and where they ran dense."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import prometheus_client
import torch

from vllm_sparse.methods.decode import reading_layers
from vllm_sparse.metrics.batch_recall import EagerRecall
from vllm_sparse.metrics.density import Geometry, RecentDensity, RowDensity
from vllm_sparse.metrics.directory import write_to_announced_directory
from vllm_sparse.metrics.histogram import observe_all
from vllm_sparse.metrics.memory import MemoryMetrics
from vllm_sparse.metrics.recall import attention_recall
from vllm_sparse.metrics.timing import NO_TIMER, StepTimer

if TYPE_CHECKING:
    from vllm_sparse.backend.decode import RowSetting
    from vllm_sparse.keys import PagedKeys
    from vllm_sparse.metrics.graph_timing import GraphTimer
    from vllm_sparse.pages import PageList
    from vllm_sparse.step.plan import BatchRow, StepPlan

# Below vLLM's own name, so that its logging configuration applies.
logger = logging.getLogger("vllm.sparse")

FALLBACK_REASONS = {
    "short_context": "its context is shorter than sparse_min_tokens, or no longer than what the method reads",
    "short_chunk": "the chunk holds fewer tokens than the method needs",
    "no_room": "other requests of the step left no room to score its cached tokens",
    "speculative": "verification steps of speculative decoding are not supported yet",
}

DENSITY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
RECALL_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995, 1.0)


@dataclass(frozen=True)
class Sampling:
    """How often what costs more than a count is measured, by lot; 0: never.

    Attributes:
        timing_interval_steps: in one of so many steps with sparse rows, selection and attention are timed.
        recall_interval_steps: in one of so many with sparse rows of a phase, the recall of one of them in one layer is
            measured.
    """

    timing_interval_steps: int = 0
    recall_interval_steps: int = 0


class _Rows:
    """Prometheus metrics of rows, which one rank of a tensor-parallel group keeps for all: they run the same rows."""

    def __init__(self) -> None:
        labels = ["phase", "method"]
        self._density = prometheus_client.Histogram(
            "vllm_sparse_density_ratio",
            "KV tokens read over KV tokens in reach, in the layers that a method makes sparse; one observation per "
            "prefill chunk or decode step of a request.",
            labels,
            buckets=DENSITY_BUCKETS,
        )
        self.fallbacks = prometheus_client.Counter(
            "vllm_sparse_fallbacks",
            "Prefill chunks and decode steps of requests that asked for a sparse method and ran dense.",
            [*labels, "reason"],
        )
        self._read = prometheus_client.Counter(
            "vllm_sparse_kv_read_bytes",
            "KV-cache bytes that sparse prefill chunks and decode steps of one rank read, in all layers: of each query "
            "block and head that has a list, the list, and the whole context in dense layers.",
            labels,
        )
        self._saved = prometheus_client.Counter(
            "vllm_sparse_kv_saved_bytes",
            "KV-cache bytes in reach of the same chunks and steps that they did not read.",
            labels,
        )
        self.recall = prometheus_client.Histogram(
            "vllm_sparse_recall_ratio",
            "Attention mass that the lists keep, of sampled queries in one sampled layer of a sampled chunk or decode "
            "step; one observation per query head.",
            labels,
            buckets=RECALL_BUCKETS,
        )
        self.selection_seconds = prometheus_client.Counter(
            "vllm_sparse_selection_seconds",
            "Time of choosing lists and of arranging rows for them, in sampled steps.",
            labels,
        )
        self.attention_seconds = prometheus_client.Counter(
            "vllm_sparse_attention_seconds", "Time of the attention kernel over lists, in sampled steps.", labels
        )
        self.total_seconds = prometheus_client.Counter(
            "vllm_sparse_attention_total_seconds",
            "Time of the sparse layers' attention with its selection, in sampled steps.",
            labels,
        )
        self.timed = prometheus_client.Counter(
            "vllm_sparse_timed_rows", "Prefill chunks and decode steps of requests in sampled steps.", labels
        )
        self._of_methods: dict[tuple[str, str], _MethodRows] = {}

    def of(self, phase: str, method: str) -> _MethodRows:
        """What is counted in every step; looking labels up takes longer than counting."""
        found = self._of_methods.get((phase, method))
        if found is None:
            key = phase, method
            found = _MethodRows(self._density.labels(*key), self._read.labels(*key), self._saved.labels(*key))
            self._of_methods[phase, method] = found
        return found


@dataclass(frozen=True)
class _MethodRows:
    """Metrics of one phase and method."""

    density: prometheus_client.Histogram
    read_bytes: prometheus_client.Counter
    saved_bytes: prometheus_client.Counter


class WorkerMetrics:
    """Metrics of one worker.

    Args:
        recording: of rows; other ranks than the first of a tensor-parallel group run the same ones.
        memory: gauges of this rank.
        rank: tensor-parallel rank.
        engine: data-parallel index.

    Attributes:
        sampling: what is measured how often.
    """

    _instance: WorkerMetrics | None = None

    def __init__(self, recording: bool, memory: MemoryMetrics | None = None, rank: int = 0, engine: int = 0) -> None:
        self.memory = memory
        self._engine, self._rank = engine, rank
        self._pending: list[tuple[torch.cuda.Event, Callable[[], None]]] = []
        self._logged: set[tuple[str, str, str]] = set()
        self.sampling = Sampling()
        self._geometry: Geometry | None = None
        self._recent: RecentDensity | None = None
        self._rows: _Rows | None = None
        if recording:
            self._rows = _Rows()

    @classmethod
    def get(cls, engine: int = 0) -> WorkerMetrics:
        """The metrics of this process, made on first use, when its data-parallel index is told."""
        if cls._instance is None:
            from vllm.distributed import get_tensor_model_parallel_rank

            rank = get_tensor_model_parallel_rank()
            write_to_announced_directory()
            cls._instance = cls(rank == 0, MemoryMetrics(engine, rank), rank, engine)
        return cls._instance

    def start_serving(self, geometry: Geometry, sampling: Sampling) -> None:
        """The model is there.

        Args:
            geometry: its attention layers; without it neither bytes nor late densities are counted.
            sampling: what is measured how often.
        """
        if geometry != self._geometry:
            self._geometry, self._recent = geometry, RecentDensity(geometry)
        self.sampling = sampling

    def stats(self) -> dict[str, Any]:
        """Densities of late rows in each layer and query head of this rank, as JSON."""
        recent = {} if self._recent is None else self._recent.as_json()
        return {"engine": self._engine, "rank": self._rank, "density": recent}

    def count_fallback(self, phase: str, method: str, reason: str, rows: int = 1) -> None:
        """Rows that asked for `method` and run dense; `reason` is a key of `FALLBACK_REASONS`."""
        if self._rows is None:
            return
        self._rows.fallbacks.labels(phase, method, reason).inc(rows)
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

    def observe_batch(self, batch: Sequence[BatchRow]) -> None:
        """Decode rows that are served at once, whose lists' lengths the host knows; called when their step is queued.

        The device is busy with them then: before that, the time that counting takes would be the step's.
        """
        # Requests of equal settings share their method, and one cannot afford to compare settings.
        groups: dict[int, tuple[RowSetting, list[int]]] = {}
        for row in batch:
            setting = row.setting
            group = groups.get(id(setting.method))
            if group is None:
                groups[id(setting.method)] = setting, [row.span.context_tokens]
            else:
                group[1].append(row.span.context_tokens)
        for setting, contexts in groups.values():
            assert setting.method is not None
            name, reach = setting.method.name, np.array(contexts)
            kept = setting.method.list_tokens(reach)
            densities = (kept / reach).tolist()
            layers = reading_layers(setting.roles)
            if self._rows is not None:
                observe_all(self._rows.of("decode", name).density, densities)
            if self._geometry is None:
                continue
            reach_tokens = sum(contexts)
            saved_tokens = (reach_tokens - sum(kept.tolist())) * len(layers)
            all_tokens, kv_heads = reach_tokens * self._geometry.layers, self._geometry.kv_heads
            self._count_bytes("decode", name, all_tokens * kv_heads, saved_tokens * kv_heads)
            if self._recent is not None:
                self._recent.observe_alike("decode", name, layers, sum(densities) / len(contexts))

    def sample(self, plan: StepPlan) -> None:
        """Choose what is measured in a step that is about to run."""
        if self._rows is None:
            return
        decode_rows = len(plan.decode) + len(plan.batch)
        if (plan.prefill or decode_rows) and _is_due(self.sampling.timing_interval_steps):
            rows = [("prefill", row.method.name) for row in plan.prefill]
            rows += [("decode", row.method.name) for row in plan.decode]
            rows += [("decode", name) for name in plan.batch_methods]
            plan.timer = StepTimer(torch.cuda.is_available(), rows)
        if plan.prefill and _is_due(self.sampling.recall_interval_steps):
            chunk = random.choice(plan.prefill)
            chunk.recall_layer = random.randrange(chunk.method.dense_layers, plan.num_layers)
        if decode_rows and _is_due(self.sampling.recall_interval_steps):
            place = random.randrange(decode_rows)
            of_batch = place - len(plan.decode)
            roles = plan.decode[place].roles if of_batch < 0 else plan.batch[of_batch].setting.roles
            layers = reading_layers(roles)
            # Settings may leave no layer that reads a list.
            if layers and of_batch < 0:
                plan.decode[place].recall_layer = random.choice(layers)
            elif layers:
                plan.recall = EagerRecall(random.choice(layers), plan.batch[of_batch], of_batch, self)

    def observe_recall(
        self,
        phase: str,
        method: str,
        query: torch.Tensor,
        keys: PagedKeys,
        lists: PageList,
        query_block: int,
        scale: float,
    ) -> None:
        """Measure the attention-mass recall of a row in one layer; arguments as of `attention_recall`."""
        assert self._rows is not None
        histogram = self._rows.recall.labels(phase, method)
        self._fetch(
            attention_recall(query, keys, lists, query_block, scale),
            lambda recall: observe_all(histogram, recall.tolist()),
        )

    def finish_step(self, densities: Sequence[RowDensity], timer: StepTimer = NO_TIMER) -> None:
        """All layers of the step are queued: fetch the rows' kept counts and times without waiting for the device."""
        densities = [density for density in densities if density.kept]
        if densities:
            kept = torch.cat([kept for density in densities for kept in density.kept])
            self._fetch(kept, lambda host: self._observe(host, densities))
        if timer.rows:
            self._after_device(lambda: self._count_seconds(timer.seconds(), timer.rows))

    def observe_graph(self, timer: GraphTimer, rows: Counter[tuple[str, str]]) -> None:
        """A graph is queued whose times count.

        Args:
            timer: of the graph.
            rows: of each phase and method.
        """
        self._fetch(timer.stamps, lambda stamps: self._count_seconds(timer.seconds_by_rows(stamps, rows), rows))

    def collect_finished(self) -> None:
        """Take what has arrived from the device; called once a step."""
        if self.memory is not None:
            self.memory.update()
        while self._pending and self._pending[0][0].query():  # type: ignore[no-untyped-call]
            self._pending.pop(0)[1]()

    def _fetch(self, values: torch.Tensor, take: Callable[[np.ndarray], None]) -> None:
        """Hand numbers to a function when they have arrived on the host."""
        if not values.is_cuda:
            take(values.numpy())
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        self._after_device(lambda: take(host.numpy()))

    def _after_device(self, call: Callable[[], None]) -> None:
        """Call when the device has done what is queued."""
        if not torch.cuda.is_available():
            call()
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((event, call))

    def _observe(self, kept: np.ndarray, densities: Sequence[RowDensity]) -> None:
        start = 0
        for row in densities:
            tokens = row.kept_by_head(kept[start : start + row.numbers])
            start += row.numbers
            kept_tokens, reach = int(tokens.sum()), row.candidates * tokens.size
            if self._rows is not None:
                self._rows.of(row.phase, row.method).density.observe(kept_tokens / reach)
            if self._geometry is not None:
                all_layers = row.candidates * row.list_heads * self._geometry.layers
                self._count_bytes(row.phase, row.method, all_layers, reach - kept_tokens)
            if self._recent is not None:
                self._recent.observe(row.phase, row.method, row.layers, tokens / row.candidates)

    def _count_bytes(self, phase: str, method: str, reach_tokens: int, saved_tokens: int) -> None:
        if self._rows is None or self._geometry is None:
            return
        rows, token_bytes = self._rows.of(phase, method), self._geometry.token_bytes
        rows.read_bytes.inc((reach_tokens - saved_tokens) * token_bytes)
        rows.saved_bytes.inc(saved_tokens * token_bytes)

    def _count_seconds(
        self, seconds: Mapping[tuple[str, str], tuple[float, float]], rows: Counter[tuple[str, str]]
    ) -> None:
        """Of selection and of attention, and rows of a timed step, each by phase and method."""
        assert self._rows is not None
        for key, (selection, attention) in seconds.items():
            self._rows.selection_seconds.labels(*key).inc(selection)
            self._rows.attention_seconds.labels(*key).inc(attention)
            self._rows.total_seconds.labels(*key).inc(selection + attention)
        for key, count in rows.items():
            self._rows.timed.labels(*key).inc(count)


def _is_due(interval_steps: int) -> bool:
    """By lot: what methods do in one of several steps would fall on all of the steps at equal intervals, or on none."""
    return interval_steps > 0 and random.randrange(interval_steps) == 0
