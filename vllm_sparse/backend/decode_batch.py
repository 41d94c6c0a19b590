"""Decode rows on a GPU: all rows of a step at once, what each does being read on the device.

In each layer at most three things are launched, whatever the rows: the stock kernel over the rows that read everything,
in which the others have length 0; the choice of each method by which some row may write a list; and the stock kernel
over the lists, in which rows that read everything have length 0. The same launches serve any batch of one size, which
is what a CUDA graph needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_sparse.backend.decode_buffers import FRESH, KNOBS, LEAST_CONTEXT, METHOD, SCORED, SLOT, DecodeBuffers
from vllm_sparse.kernels.decode_roles import LayerContexts, RowSettings
from vllm_sparse.metrics.timing import ASIDE, ATTENTION, SELECTION, Mark, ignore
from vllm_sparse.step.launch import Executor, Launch, LayerLaunches
from vllm_sparse.step.rows import DecodeRows, RowsPlace, TokenLists

if TYPE_CHECKING:
    from vllm_sparse.backend.guard import StepGuard
    from vllm_sparse.backend.layer import LayerCall, LayerPlatform
    from vllm_sparse.kernels.page_summaries import SummaryKind
    from vllm_sparse.metrics import StepRecord


class DenseAttention(Protocol):
    """The stock kernel over decode rows, each with a length of its own."""

    def __call__(self, query: torch.Tensor, seq_lens: torch.Tensor, output: torch.Tensor, /) -> None:
        """Attend.

        Args:
            query: ``[rows, query_heads, head_size]``.
            seq_lens: int32 ``[rows]``; rows of 0 read nothing, and their output is anything.
            output: as the query, written.
        """


@dataclass(frozen=True)
class BatchLayer:
    """One layer's attention for rows that are served at once.

    Attributes:
        index: of the attention layer.
        query: ``[rows, query_heads, head_size]`` of each row's newest token.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major (LBHNC).
        scale: softmax scale.
        output: as the query, written.
        executor: the stock kernel over lists.
        dense: the stock kernel over whole contexts.
        summaries: of the layer's pages, by physical block, of each kind that a method asks for.
        mark: of the layer, where it is timed; attention over whole contexts counts for nothing.
        soft_cap: on logits; 0: none.
    """

    index: int
    query: torch.Tensor
    kv_cache: torch.Tensor
    scale: float
    output: torch.Tensor
    executor: Executor
    dense: DenseAttention
    summaries: Mapping[SummaryKind, torch.Tensor]
    mark: Mark = ignore
    soft_cap: float = 0.0


class DecodeStep:
    """The decode rows of one step, layer by layer.

    Args:
        buffers: what the rows' settings were told to.
        rows: in the step.
        launches: of each layer.
        seq_lens: int32 ``[rows]`` tokens in the rows' caches; 0 for rows that pad the batch.
        block_table: int32 ``[rows, blocks]``.
        capacity_tokens: tokens that there is room to score.
    """

    def __init__(
        self,
        buffers: DecodeBuffers,
        rows: int,
        launches: Sequence[LayerLaunches],
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        capacity_tokens: int,
    ) -> None:
        assert buffers.holds(rows, 1), "kernels would write past the buffers"
        lists = rows * buffers.size.kv_heads
        self.first_layer = buffers.size.layers.start
        self.launches = launches
        self.seq_lens = seq_lens
        self.block_table = block_table
        self.capacity_tokens = capacity_tokens
        self.methods = buffers.methods
        self.memories = buffers.memories
        self.settings = buffers.settings[:rows]
        self.row_settings = RowSettings(
            self.settings[:, METHOD], self.settings[:, LEAST_CONTEXT], self.settings[:, SCORED], buffers.roles[:rows]
        )
        self.contexts = LayerContexts(
            buffers.contexts.starts[:rows],
            buffers.contexts.dense[:, :rows],
            buffers.contexts.members[:, :rows],
            buffers.contexts.choosing[..., :rows],
            buffers.contexts.kept_tokens[:, :lists],
        )
        self.lists = TokenLists(buffers.lists.slots[:lists], buffers.lists.kept_tokens[:lists])
        self.query_starts = buffers.query_starts[: lists + 1]

    def attend(self, at: BatchLayer) -> None:
        """Attend in one layer; layers come in order."""
        # Imported here: there is Triton only where there is a GPU.
        from vllm_sparse.kernels.decode_roles import triton as decode_roles

        layer, launches = at.index, self.launches[at.index]
        if layer == self.first_layer:
            at.mark(ASIDE)
            decode_roles.layer_contexts(self.row_settings, self.seq_lens, self.capacity_tokens, self.contexts)
            at.mark(SELECTION)
        if launches.dense:
            at.dense(at.query, self.contexts.dense[layer], at.output)
        if launches.dense or layer > 0:
            at.mark(ASIDE)
        numbers = sorted({*launches.writing_ahead, *launches.writing_here})
        for number in numbers:
            # Lengths that stand here are read here; rows that read everything leave theirs aside.
            here = number in launches.writing_here
            lists = replace(self.lists, kept_tokens=self.contexts.kept_tokens[layer]) if here else self.lists
            self._choose(number, at, lists)
            if number in launches.writing_ahead:
                choosing = self.contexts.choosing[number, layer]
                decode_roles.pass_on(self.row_settings, layer, choosing, lists.kept_tokens, self.contexts)
        if numbers:
            at.mark(SELECTION)
        if launches.reading:
            self._read(at, launches.dense)

    def _choose(self, number: int, at: BatchLayer, lists: TokenLists) -> None:
        """Let rows choose by a method."""
        method, layer = self.methods[number], at.index
        rows = DecodeRows(at.query, at.kv_cache, self.block_table, self.contexts.choosing[number, layer], at.scale)
        place = RowsPlace(
            self.contexts.starts,
            self.capacity_tokens,
            self.settings[:, SLOT],
            self.settings[:, FRESH],
            self.contexts.members[number],
            layer,
            None if method.summaries is None else at.summaries[method.summaries],
            self.memories[method.name],
        )
        method.choose_rows(rows, self.settings[:, KNOBS:], place, lists)

    def _read(self, at: BatchLayer, merge: bool) -> None:
        """Attend over the lists, and merge with the rows that read everything."""
        from vllm_sparse.kernels.decode_roles import triton as decode_roles

        query, output = at.query, at.output
        kept_tokens = self.contexts.kept_tokens[at.index]
        lists, head_size = kept_tokens.shape[0], query.shape[2]
        launch = Launch(self.query_starts, 1, self.lists.slots, kept_tokens, 1)
        sparse = torch.empty_like(query) if merge else output
        queries = query.reshape(lists, -1, head_size)
        at.executor.run(launch, queries, sparse.view(lists, -1, head_size), at.kv_cache, at.scale)
        at.mark(ATTENTION)
        if merge:
            decode_roles.take_sparse(self.contexts.dense[at.index], sparse, output)
            at.mark(SELECTION)

    def layer_lists(self, at: BatchLayer) -> tuple[DecodeRows, TokenLists]:
        """The rows in a layer that has attended, and the lists that they have read there."""
        rows = DecodeRows(at.query, at.kv_cache, self.block_table, self.seq_lens, at.scale, at.soft_cap)
        return rows, TokenLists(self.lists.slots, self.contexts.kept_tokens[at.index])


@dataclass(frozen=True)
class BatchStep:
    """The rows of a step that are served at once.

    Attributes:
        step: the rows.
        tokens: their places in the step's queries: a slice where they are adjacent, else int64 ``[rows]``.
        method_names: of each row, for the timer; empty in a graph, whose rows are known to a step that replays it.
    """

    step: DecodeStep
    tokens: slice | torch.Tensor
    method_names: Sequence[str] = ()


def serve_rows(
    platform: LayerPlatform, call: LayerCall, batch: BatchStep, record: StepRecord, guard: StepGuard
) -> None:
    """Serve the rows in one layer.

    Args:
        platform: of the layer.
        call: of the layer.
        batch: the rows.
        record: what is measured of the step.
        guard: of the step.
    """
    step = batch.step

    def dense(query: torch.Tensor, seq_lens: torch.Tensor, output: torch.Tensor) -> None:
        starts = step.query_starts[: seq_lens.shape[0] + 1]
        metadata = platform.dense_rows(call.metadata, seq_lens, step.block_table, starts)
        platform.stock_forward(call, query, metadata, output)

    for method in step.methods:
        if method.summaries is not None:
            platform.summaries.of(method.summaries, call.kv_cache)
    # A copy unless the rows are adjacent.
    target = call.output[batch.tokens]
    at = BatchLayer(
        call.index,
        call.query[batch.tokens],
        call.kv_cache,
        call.scale,
        target,
        platform.executor(call.layer),
        dense,
        platform.summaries.by_kind,
        record.timer.marks(call.index, batch.method_names),
        platform.logits_soft_cap,
    )
    step.attend(at)
    if not isinstance(batch.tokens, slice):
        call.output[batch.tokens] = target
    if record.batch_recall is not None and record.batch_recall.layer == call.index:
        record.batch_recall.take(*step.layer_lists(at))
    for taker in guard.takers(call.index):
        taker.take(*step.layer_lists(at))
