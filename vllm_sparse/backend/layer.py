"""What the parts of a layer's forward get: of the call, and of the platform that serves it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.host_copy import to_device

if TYPE_CHECKING:
    from vllm_sparse.backend.summaries import StoredSummaries
    from vllm_sparse.keys import PagedKeys
    from vllm_sparse.step.launch import Executor
    from vllm_sparse.step.plan import RowSpan


@dataclass(frozen=True)
class LayerCall:
    """One forward of one attention layer.

    Attributes:
        layer: vLLM's attention layer.
        index: of the layer among those of the model that may be sparse.
        query: ``[tokens, query_heads, head_size]``.
        key: ``[tokens, kv_heads, head_size]``; the stock paged kernels read the cache and only pass this through.
        value: likewise.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major (LBHNC).
        metadata: vLLM's attention metadata of the step.
        output: as the query, written.
        scale: softmax scale of queries and keys as `query` and `kv_cache` hold them.
    """

    layer: Any
    index: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    metadata: Any
    output: torch.Tensor
    scale: float

    @property
    def block_table(self) -> torch.Tensor:
        """int32 ``[batch, blocks]``."""
        table: torch.Tensor = self.metadata.block_table
        return table

    @property
    def block_size_tokens(self) -> int:
        """Tokens of a KV-cache block."""
        return self.kv_cache.shape[2]


def seq_lens_of(seq_lens: torch.Tensor, spans: list[RowSpan]) -> torch.Tensor:
    """Context of each span: of its row, without the tokens that follow it in the same step.

    Args:
        seq_lens: int32 ``[spans]`` of their rows.
        spans: the spans.
    """
    later = [span.later_tokens for span in spans]
    if not any(later):
        return seq_lens
    return seq_lens - to_device(torch.tensor(later, dtype=seq_lens.dtype), seq_lens.device)


class LayerPlatform:
    """What differs between the platforms, and what a layer keeps; a mixin before a stock implementation."""

    num_heads: int
    num_kv_heads: int
    scale: float
    logits_soft_cap: float
    """0: none."""
    summaries: StoredSummaries
    layer_number: int
    """Of the layer among those of the model that may be sparse, from 0; the metadata builder tells it."""
    first_query_head: int
    """The model's number of this process's first query head."""
    _executor: Executor | None = None

    def take_selection_memory(self, query: torch.Tensor) -> None:
        """Take what choosing for a prompt chunk takes at the most, for a moment, while vLLM measures memory.

        Args:
            query: as in `LayerCall`, of the largest step.
        """

    def as_read(self, call: LayerCall) -> LayerCall:
        """A call as methods and the executor read it."""
        return call

    @abstractmethod
    def make_executor(self, layer: Any) -> Executor:
        """The platform's executor for this layer."""

    @abstractmethod
    def keys_of(self, layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> PagedKeys:
        """A request's keys, read in the platform's packing."""

    @abstractmethod
    def prefill_page_size(self, wanted_tokens: int, block_size_tokens: int) -> int:
        """Page size of the executor for a method that chooses `wanted_tokens` at a time, given the cache's block."""

    @abstractmethod
    def decode_page_size(self, block_size_tokens: int) -> int:
        """Page size of the executor in decoding, given the cache's block size."""

    @abstractmethod
    def dense_subset(self, layer: Any, query: torch.Tensor, metadata: Any, spans: list[RowSpan]) -> Any:
        """Stock metadata for some rows of the step, whose query tokens are gathered in that order."""

    def dense_rows(
        self, metadata: Any, seq_lens: torch.Tensor, block_table: torch.Tensor, query_starts: torch.Tensor
    ) -> Any:
        """Stock metadata for decode rows that are served at once, with lengths of their own.

        Args:
            metadata: of the whole step.
            seq_lens: int32 ``[rows]``.
            block_table: int32 ``[rows, blocks]``.
            query_starts: int32 ``[rows + 1]``: 0, 1 and so on.
        """
        raise NotImplementedError(f"{type(self).__name__} serves decode rows one by one")

    @abstractmethod
    def stock_forward(self, call: LayerCall, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        """The stock kernel over some rows of a call.

        Args:
            call: of the layer.
            query: ``[tokens, query_heads, head_size]`` of these rows.
            metadata: stock metadata of these rows.
            output: as the query, written.
        """

    def executor(self, layer: Any) -> Executor:
        """The layer's executor, made on first use: the layer must have its cache by then."""
        if self._executor is None:
            self._executor = self.make_executor(layer)
        return self._executor

    def row_keys(self, call: LayerCall, span: RowSpan) -> PagedKeys:
        """The keys of a row's request, this step's included."""
        return self.keys_of(call.layer, call.kv_cache, call.block_table[span.row], span.seq_len)
