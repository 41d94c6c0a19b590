"""One step's plan: which rows of the batch are sparse, by which method, and what they have chosen so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.backend.decode import DecodeBuffers, DecodeStep, RowSetting
from vllm_sparse.methods.decode import CHOOSING_ROLES, READING_ROLES, BatchDecodeMethod
from vllm_sparse.metrics import RowDensity, WorkerMetrics
from vllm_sparse.metrics.batch_recall import RecallLayer
from vllm_sparse.metrics.timing import NO_TIMER, StepTimer
from vllm_sparse.pages import PageList, concatenate, to_physical
from vllm_sparse.step.launch import Launch

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.kernels.page_summaries import SummaryKind
    from vllm_sparse.methods.decode import DecodeMethod, LayerMemory
    from vllm_sparse.methods.prefill import PrefillMethod
    from vllm_sparse.step.requests import SparseRequest


@dataclass(frozen=True)
class RowSpan:
    """A request's place in the step's tensors.

    Attributes:
        row: index in the batch.
        query_start: its first token in the step's query tensor.
        query_tokens: its tokens in this step.
        context_tokens: tokens in its KV cache, this step's included.
    """

    row: int
    query_start: int
    query_tokens: int
    context_tokens: int


@dataclass
class PrefillRow:
    """A request whose chunk is sparse; in layer `recall_layer`, if any, its recall is measured."""

    span: RowSpan
    method: PrefillMethod
    density: RowDensity
    recall_layer: int | None = None


@dataclass
class DecodeRow:
    """A request whose decode step is sparse. Its list lives for this step only, its memory as long as its slot.

    In layer `recall_layer`, if any, its recall is measured.
    """

    span: RowSpan
    method: DecodeMethod
    roles: tuple[str, ...]
    density: RowDensity
    memory: dict[int, LayerMemory]
    pages: PageList | None = None
    recall_layer: int | None = None


@dataclass
class BatchRow:
    """A request whose decode step is sparse and is served with all others of the step at once."""

    span: RowSpan
    setting: RowSetting


@dataclass(frozen=True)
class BatchStep:
    """The rows that are served at once, and their places in the step's queries as in `DecodeLaunch`."""

    step: DecodeStep
    tokens: slice | torch.Tensor


@dataclass(frozen=True)
class SummaryRow:
    """A request whose new keys are summarised, sparse or dense, in the layers in which its decode method chooses."""

    span: RowSpan
    method: DecodeMethod
    kind: SummaryKind
    roles: tuple[str, ...]


@dataclass(frozen=True)
class DecodeLaunch:
    """Decode rows in one launch.

    Attributes:
        tokens: their places in the step's queries: a slice where they are adjacent, else int64 ``[requests]``.
        launch: the launch.
    """

    tokens: slice | torch.Tensor
    launch: Launch


@dataclass
class LayerWork:
    """Who does what in a layer; layers in which all rows have the same roles share one.

    Attributes:
        summarising: rows whose new keys are summarised.
        prefill: chunks that are sparse.
        reading: decode rows that read a list.
        choosing: decode rows that choose a list.
        dense: rows for the stock kernel.
        dense_metadata: what the stock kernel needs for them, made on first use.
        launches: what the reading rows need, made on first use after a choice.
    """

    summarising: list[SummaryRow]
    prefill: list[PrefillRow]
    reading: list[DecodeRow]
    choosing: list[DecodeRow]
    dense: list[RowSpan]
    dense_metadata: tuple[torch.Tensor, Any] | None = None
    launches: list[DecodeLaunch] | None = None


@dataclass
class StepPlan:
    """Sparse rows of one step.

    Attributes:
        spans: all rows that hold tokens, in batch order.
        summarising: rows whose new keys are summarised.
        prefill: sparse chunks.
        decode: sparse decode rows that are served one by one.
        batch: sparse decode rows that are served at once.
        buffers: what the server keeps for them, if it does.
        num_layers: layers of the model; after the last, the step's densities are complete.
        metrics: where they go.
        batch_step: the rows that are served at once, from the first layer on.
        timer: of the step, if it is sampled.
        recall: of a row that is served at once, if it is measured.
    """

    spans: list[RowSpan]
    summarising: list[SummaryRow]
    prefill: list[PrefillRow]
    decode: list[DecodeRow]
    batch: list[BatchRow]
    buffers: DecodeBuffers | None
    num_layers: int
    metrics: WorkerMetrics
    batch_step: BatchStep | None = None
    timer: StepTimer = NO_TIMER
    recall: RecallLayer | None = None
    _work: dict[tuple[Any, ...], LayerWork] = field(default_factory=dict)

    def work(self, layer: int) -> LayerWork:
        """Who does what in a layer."""
        roles = (
            tuple(row.roles[layer] for row in self.summarising),
            tuple(layer >= row.method.dense_layers for row in self.prefill),
            tuple(row.roles[layer] for row in self.decode),
        )
        if roles not in self._work:
            prefill = [row for row in self.prefill if layer >= row.method.dense_layers]
            reading = [row for row in self.decode if row.roles[layer] in READING_ROLES]
            sparse = {row.span.row for row in prefill} | {row.span.row for row in reading}
            at_once = {row.span.row for row in self.batch}
            sparse |= at_once
            self._work[roles] = LayerWork(
                # Those that are served at once do so as they choose.
                [row for row in self.summarising if row.roles[layer] in CHOOSING_ROLES and row.span.row not in at_once],
                prefill,
                reading,
                [row for row in self.decode if row.roles[layer] in CHOOSING_ROLES],
                [span for span in self.spans if span.row not in sparse],
            )
        return self._work[roles]

    @cached_property
    def batch_methods(self) -> list[str]:
        """Names of the methods of the rows that are served at once."""
        return [row.setting.method.name for row in self.batch if row.setting.method is not None]

    def start_batch(self, context_tokens: torch.Tensor, block_table: torch.Tensor) -> BatchStep:
        """The step of the rows that are served at once, made in the first layer.

        Args:
            context_tokens: int32 ``[batch]``.
            block_table: int32 ``[batch, blocks]``.
        """
        if self.batch_step is not None:
            return self.batch_step
        settings = [row.setting for row in self.batch]
        contexts = [row.span.context_tokens for row in self.batch]
        longest = max(row.setting.method.longest_list_tokens for row in self.batch if row.setting.method is not None)
        assert self.buffers is not None, "rows are served at once where there are buffers"
        buffers = self.buffers.for_step(len(self.batch), longest)
        buffers.say(settings)
        rows = places([row.span.row for row in self.batch], context_tokens.device)
        step = DecodeStep(
            buffers,
            len(self.batch),
            buffers.launches(settings, all_sparse=True),
            context_tokens[rows],
            block_table[rows],
            sum(contexts),
        )
        tokens = places([row.span.query_start for row in self.batch], context_tokens.device)
        self.batch_step = BatchStep(step, tokens)
        return self.batch_step

    def choose(self, row: DecodeRow, pages: PageList) -> None:
        """Keep a row's list for the layers that follow."""
        row.pages = pages
        for work in self._work.values():
            work.launches = None

    def decode_launches(
        self, work: LayerWork, block_table: torch.Tensor, num_kv_heads: int, block_size: int
    ) -> list[DecodeLaunch]:
        """Launches over the lists of a layer's reading rows; all layers share a block table.

        Args:
            work: of the layer.
            block_table: int32 ``[batch, blocks]``.
            num_kv_heads: KV heads.
            block_size: tokens of a KV-cache block.
        """
        if work.launches is not None:
            return work.launches
        by_lists: dict[int, list[DecodeRow]] = {}
        for row in work.reading:
            assert row.pages is not None, "a layer that reads a list follows one that chose it"
            by_lists.setdefault(row.pages.pages.shape[0], []).append(row)
        device = block_table.device
        work.launches = []
        for lists_per_request, members in by_lists.items():
            page_list = concatenate([row.pages for row in members if row.pages is not None])
            batch_rows = torch.tensor([row.span.row for row in members], device=device)
            heads = torch.arange(lists_per_request, device=device) // (lists_per_request // num_kv_heads)
            pages = to_physical(
                page_list,
                block_table[batch_rows].repeat_interleave(lists_per_request, dim=0),
                heads.repeat(len(members)),
                block_size,
                num_kv_heads,
            )
            starts = torch.arange(page_list.kept_tokens.shape[0] + 1, dtype=torch.int32, device=device)
            tokens = places([row.span.query_start for row in members], device)
            launch = Launch(starts, 1, pages, page_list.kept_tokens, page_list.page_size_tokens)
            work.launches.append(DecodeLaunch(tokens, launch))
        return work.launches


def places(indices: list[int], device: torch.device) -> slice | torch.Tensor:
    """Indices to gather by: a slice where they are adjacent, which copies nothing."""
    if indices == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[-1] + 1)
    return torch.tensor(indices, device=device)


def plan_step(
    common: CommonAttentionMetadata,
    sparse_rows: dict[int, SparseRequest],
    num_layers: int,
    speculative: bool,
    metrics: WorkerMetrics,
    batch_capacity_tokens: int,
    buffers: DecodeBuffers | None,
) -> StepPlan | None:
    """Decide which rows of a step run sparse, and count those that asked for it and run dense.

    Args:
        common: vLLM's description of the step.
        sparse_rows: the rows whose request is not all dense.
        num_layers: layers of the model.
        speculative: the server drafts tokens; verification rows run dense.
        metrics: receives fallbacks and densities.
        batch_capacity_tokens: tokens that there is room to score of decode rows that are served at once.
        buffers: what the server keeps for these; None where all are served one by one.

    Returns:
        The plan, or None if every row runs dense and leaves nothing behind for later steps.
    """
    if not sparse_rows or common.causal is not True:
        return None
    starts = common.query_start_loc_cpu.tolist()
    assert common.seq_lens_cpu_upper_bound is not None
    contexts = common.seq_lens_cpu_upper_bound.tolist()
    prefilling = [] if common.is_prefilling is None else common.is_prefilling.tolist()
    spans = [
        RowSpan(row, starts[row], starts[row + 1] - starts[row], contexts[row])
        for row in range(common.num_reqs)
        if starts[row + 1] > starts[row]
    ]
    summarising: list[SummaryRow] = []
    prefill: list[PrefillRow] = []
    decode: list[DecodeRow] = []
    batch: list[BatchRow] = []
    fallbacks: Counter[tuple[str, str, str]] = Counter()
    scored_tokens = 0
    for span in spans:
        request = sparse_rows.get(span.row)
        if request is None:
            continue
        params = request.params
        if params.decode is not None and params.decode.summaries is not None and not speculative:
            roles = layer_roles(params.decode, num_layers)
            summarising.append(SummaryRow(span, params.decode, params.decode.summaries, roles))
        in_prompt = span.row < len(prefilling) and prefilling[span.row]
        if in_prompt or (span.query_tokens > 1 and not speculative):
            if params.prefill is None:
                continue
            if span.context_tokens < params.min_tokens:
                fallbacks["prefill", params.prefill.name, "short_context"] += 1
            elif span.query_tokens < params.prefill.min_query_tokens:
                fallbacks["prefill", params.prefill.name, "short_chunk"] += 1
            else:
                prefill.append(PrefillRow(span, params.prefill, RowDensity("prefill", params.prefill.name)))
        elif params.decode is not None:
            if speculative:
                fallbacks["decode", params.decode.name, "speculative"] += 1
                continue
            if span.context_tokens < params.min_tokens or span.context_tokens <= params.decode.budget_tokens:
                fallbacks["decode", params.decode.name, "short_context"] += 1
                continue
            roles = layer_roles(params.decode, num_layers)
            if buffers is not None and buffers.serves(params.decode):
                scored_tokens += span.context_tokens if params.decode.scores_tokens else 0
                if scored_tokens > batch_capacity_tokens:
                    fallbacks["decode", params.decode.name, "no_room"] += 1
                    continue
                batch.append(BatchRow(span, row_setting(request, roles)))
            else:
                density = RowDensity("decode", params.decode.name)
                decode.append(DecodeRow(span, params.decode, roles, density, request.memory))
    for row, count in fallbacks.items():
        metrics.count_fallback(*row, count)
    if not summarising and not prefill and not decode and not batch:
        return None
    return StepPlan(spans, summarising, prefill, decode, batch, buffers, num_layers, metrics)


def row_setting(request: SparseRequest, roles: tuple[str, ...]) -> RowSetting:
    """What a request's decode row is on the device; from now on its slot holds what it keeps."""
    method = request.params.decode
    assert isinstance(method, BatchDecodeMethod)
    least_context_tokens = max(request.params.min_tokens - 1, method.budget_tokens)
    setting = RowSetting(method, least_context_tokens, roles, request.slot, request.fresh)
    request.fresh = False
    return setting


@lru_cache(maxsize=1024)
def layer_roles(method: DecodeMethod, num_layers: int) -> tuple[str, ...]:
    """A method's layer roles, worked out once."""
    return tuple(method.layer_roles(num_layers))
