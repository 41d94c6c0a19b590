"""One step's plan: which rows of the batch are sparse, by which method, and what they have chosen so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.executors import Launch
from vllm_sparse.metrics import PrefillDensity, WorkerMetrics
from vllm_sparse.pages import PageList, concatenate, to_physical
from vllm_sparse.params import SparseParams

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.methods.base import DecodeMethod, PrefillMethod


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
    """A request whose chunk is sparse."""

    span: RowSpan
    method: PrefillMethod
    density: PrefillDensity


@dataclass
class DecodeRow:
    """A request whose decode step is sparse. Its list lives for this step only."""

    span: RowSpan
    method: DecodeMethod
    roles: list[str]
    pages: PageList | None = None


@dataclass
class DecodeLaunches:
    """The decode rows of one layer as launches; valid as long as no row chooses again."""

    rows: tuple[int, ...]
    launches: list[tuple[torch.Tensor, Launch]]
    """Token index ``[rows]`` into the step's queries, and the launch."""


@dataclass
class StepPlan:
    """Sparse rows of one step.

    Attributes:
        spans: all rows that hold tokens, in batch order.
        prefill: sparse chunks.
        decode: sparse decode rows.
        last_layer: the layer after which the step's densities are complete.
        metrics: where they go.
        dense_metadata: the stock backend's metadata for subsets of rows, by the rows.
    """

    spans: list[RowSpan]
    prefill: list[PrefillRow]
    decode: list[DecodeRow]
    last_layer: int
    metrics: WorkerMetrics
    dense_metadata: dict[tuple[int, ...], Any] = field(default_factory=dict)
    _launches: DecodeLaunches | None = None

    def prefill_rows(self, layer: int) -> list[PrefillRow]:
        """Chunks that are sparse in this layer."""
        return [row for row in self.prefill if layer >= row.method.dense_layers]

    def decode_rows(self, layer: int) -> list[DecodeRow]:
        """Decode rows that read their list in this layer."""
        return [row for row in self.decode if row.roles[layer] == "reuse"]

    def selecting_rows(self, layer: int) -> list[DecodeRow]:
        """Decode rows that choose their list in this layer."""
        return [row for row in self.decode if row.roles[layer] == "select"]

    def choose(self, row: DecodeRow, pages: PageList) -> None:
        """Keep a row's list for the layers that follow."""
        row.pages = pages
        self._launches = None

    def decode_launches(
        self, rows: list[DecodeRow], block_table: torch.Tensor, num_heads: int, num_kv_heads: int, block_size: int
    ) -> list[tuple[torch.Tensor, Launch]]:
        """Launches over the lists of `rows`; all layers share a block table, so they are built once per choice.

        Args:
            rows: decode rows that hold a list.
            block_table: int32 ``[batch, blocks]``.
            num_heads: query heads.
            num_kv_heads: KV heads.
            block_size: tokens of a KV-cache block.
        """
        key = tuple(row.span.row for row in rows)
        if self._launches is not None and self._launches.rows == key:
            return self._launches.launches
        by_lists: dict[int, list[DecodeRow]] = {}
        for row in rows:
            assert row.pages is not None, "a reuse layer follows a select layer"
            by_lists.setdefault(row.pages.pages.shape[0], []).append(row)
        launches = []
        device = block_table.device
        for lists_per_request, members in by_lists.items():
            count = len(members)
            page_list = concatenate([row.pages for row in members if row.pages is not None])
            batch_rows = torch.tensor([row.span.row for row in members], device=device)
            heads = torch.arange(lists_per_request, device=device) // (lists_per_request // num_kv_heads)
            pages = to_physical(
                page_list,
                block_table[batch_rows].repeat_interleave(lists_per_request, dim=0),
                heads.repeat(count),
                block_size,
                num_kv_heads,
            )
            starts = torch.arange(count * lists_per_request + 1, dtype=torch.int32, device=device)
            tokens = torch.tensor([row.span.query_start for row in members], device=device)
            launches.append((tokens, Launch(starts, 1, pages, page_list.kept_tokens, page_list.page_size_tokens)))
        self._launches = DecodeLaunches(key, launches)
        return launches

    def record_decode_density(self, row: DecodeRow) -> None:
        """Densities of decode lists are known on the host: every list of a request is equally long."""
        assert row.pages is not None
        width, page_size = row.pages.pages.shape[1], row.pages.page_size_tokens
        kept = (width - 1) * page_size + (row.span.context_tokens - 1) % page_size + 1
        self.metrics.observe_density("decode", row.method.name, kept / row.span.context_tokens)


def plan_step(
    common: CommonAttentionMetadata,
    sparse_rows: dict[int, SparseParams],
    num_layers: int,
    speculative: bool,
    metrics: WorkerMetrics,
) -> StepPlan | None:
    """Decide which rows of a step run sparse, and count those that asked for it and run dense.

    Args:
        common: vLLM's description of the step.
        sparse_rows: parameters of the rows whose request is not all dense.
        num_layers: layers of the model.
        speculative: the server drafts tokens; verification rows run dense.
        metrics: receives fallbacks and densities.

    Returns:
        The plan, or None if every row runs dense.
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
    prefill: list[PrefillRow] = []
    decode: list[DecodeRow] = []
    for span in spans:
        params = sparse_rows.get(span.row)
        if params is None:
            continue
        in_prompt = span.row < len(prefilling) and prefilling[span.row]
        if in_prompt or (span.query_tokens > 1 and not speculative):
            if params.prefill is None:
                continue
            if span.context_tokens < params.min_tokens:
                metrics.count_fallback("prefill", params.prefill.name, "short_context")
            elif span.query_tokens < params.prefill.min_query_tokens:
                metrics.count_fallback("prefill", params.prefill.name, "short_chunk")
            else:
                prefill.append(PrefillRow(span, params.prefill, PrefillDensity(params.prefill.name)))
        elif params.decode is not None:
            if speculative:
                metrics.count_fallback("decode", params.decode.name, "speculative")
            elif span.context_tokens < params.min_tokens or span.context_tokens <= params.decode.budget_tokens:
                metrics.count_fallback("decode", params.decode.name, "short_context")
            else:
                decode.append(DecodeRow(span, params.decode, params.decode.layer_roles(num_layers)))
    if not prefill and not decode:
        return None
    return StepPlan(spans, prefill, decode, num_layers - 1, metrics)
