"""What the execution of a step remembers from layer to layer, beside its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.backend.decode_batch import BatchStep, DecodeStep
from vllm_sparse.backend.guard import NO_GUARD
from vllm_sparse.host_copy import indices_on

if TYPE_CHECKING:
    from vllm_sparse.backend.decode_buffers import DecodeBuffers
    from vllm_sparse.backend.guard import StepGuard
    from vllm_sparse.backend.prefill import ChunkLaunch
    from vllm_sparse.metrics import StepRecord
    from vllm_sparse.pages import PageList
    from vllm_sparse.step.launch import Launch
    from vllm_sparse.step.plan import DecodeRow, PrefillRow, RowSpan, StepPlan, SummaryRow


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
    """Who does what in a layer; layers of a cache group in which all rows have the same roles share one.

    Attributes:
        summarising: rows whose new keys are summarised.
        prefill: prompt chunks that are sparse.
        writing: decode rows that write a list.
        reading: decode rows that read a list.
        dense: rows for the stock kernel.
        dense_metadata: places of the dense rows' tokens in the step's queries, a slice where they are adjacent, else
            int64, and the stock kernel's metadata for them; made on first use.
        launches: what the reading rows need, made on first use after a list was written.
        chunk_launches: what the sparse prompt chunks need that no layer changes, made on first use.
    """

    summarising: list[SummaryRow]
    prefill: list[PrefillRow]
    writing: list[DecodeRow]
    reading: list[DecodeRow]
    dense: list[RowSpan]
    dense_metadata: tuple[slice | torch.Tensor, Any] | None = None
    launches: list[DecodeLaunch] | None = None
    chunk_launches: list[ChunkLaunch] | None = None


class StepExecution:
    """One step in execution; vLLM's metadata carries it through the layers.

    Args:
        plan: of the step.
        record: what is measured of it.
        buffers: what the server keeps for rows that are served at once, if it does.
        batch: the rows that are served at once, if they are known before the first layer.
        guard: of the step.
    """

    def __init__(
        self,
        plan: StepPlan,
        record: StepRecord,
        buffers: DecodeBuffers | None = None,
        batch: BatchStep | None = None,
        guard: StepGuard = NO_GUARD,
    ) -> None:
        self.plan = plan
        self.record = record
        self.guard = guard
        self._buffers = buffers
        self._batch = batch
        # Layers of several cache groups have a block table each.
        self._work: dict[tuple[Any, ...], LayerWork] = {}
        # By the row's index in the batch.
        self._lists: dict[int, PageList] = {}

    @property
    def serves_at_once(self) -> bool:
        """The step has rows that are served at once."""
        return self._batch is not None or bool(self.plan.batch)

    def work(self, layer: int, block_table: torch.Tensor) -> LayerWork:
        """Who does what in a layer.

        Args:
            layer: index of the layer among those that may be sparse.
            block_table: int32 ``[batch, blocks]`` of the layer's cache group, the step's own object.
        """
        plan = self.plan
        self.guard.collect()
        roles = (
            id(block_table),
            tuple(row.roles[layer] for row in plan.summarising),
            tuple(row.is_sparse(layer) for row in plan.prefill),
            tuple(row.roles[layer] for row in plan.decode),
            tuple(row.setting.roles[layer].writes_list for row in plan.batch),
        )
        if roles not in self._work:
            prefill = [row for row in plan.prefill if row.is_sparse(layer)]
            reading = [row for row in plan.decode if row.roles[layer].reads_list]
            choosing = {row.span.row for row in plan.batch if row.setting.roles[layer].writes_list}
            # By their first tokens: a prompt chunk may have two spans.
            sparse = {row.span.query_start for rows in (prefill, reading, plan.batch) for row in rows}
            self._work[roles] = LayerWork(
                # Those that are served at once summarise their newest block as they choose.
                [
                    row
                    for row in plan.summarising
                    if row.roles[layer].writes_list and (row.catches_up or row.span.row not in choosing)
                ],
                prefill,
                [row for row in plan.decode if row.roles[layer].writes_list],
                reading,
                [span for span in plan.spans if span.query_start not in sparse],
            )
        return self._work[roles]

    def write_list(self, row: DecodeRow, pages: PageList) -> None:
        """Keep a row's list for this layer and those that follow."""
        self._lists[row.span.row] = pages
        for work in self._work.values():
            work.launches = None

    def list_of(self, row: DecodeRow) -> PageList:
        """The list that a row wrote last; a layer that reads one follows one that wrote it, or wrote it itself."""
        return self._lists[row.span.row]

    def batch(self, seq_lens: torch.Tensor, block_table: torch.Tensor) -> BatchStep:
        """The rows that are served at once, made in the first layer.

        Args:
            seq_lens: int32 ``[batch]``.
            block_table: int32 ``[batch, blocks]``.
        """
        if self._batch is None:
            assert self._buffers is not None, "rows are served at once where there are buffers"
            self._batch = _start_batch(self.plan, self._buffers, seq_lens, block_table)
        return self._batch


def _start_batch(
    plan: StepPlan, buffers: DecodeBuffers, seq_lens: torch.Tensor, block_table: torch.Tensor
) -> BatchStep:
    settings = [row.setting for row in plan.batch]
    methods = [setting.method for setting in settings if setting.method is not None]
    buffers = buffers.for_step(len(settings), max(method.longest_list_tokens for method in methods))
    buffers.tell(settings)
    rows = gather_index([row.span.row for row in plan.batch], seq_lens.device)
    step = DecodeStep(
        buffers,
        len(settings),
        buffers.launches(settings, all_sparse=True),
        seq_lens[rows],
        block_table[rows],
        sum(row.span.seq_len for row in plan.batch),
    )
    tokens = gather_index([row.span.query_start for row in plan.batch], seq_lens.device)
    return BatchStep(step, tokens, [method.name for method in methods])


def gather_index(indices: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """Indices to gather by: a slice where they are adjacent, which copies nothing."""
    first = indices[0]
    if list(indices) == list(range(first, first + len(indices))):
        return slice(first, indices[-1] + 1)
    return indices_on(device, indices)
